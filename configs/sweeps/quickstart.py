"""The five runs of scripts/quickstart: dense, Top-KAST and a fixed random mask at 90 % and 98 %.

It reproduces no row of the paper. Hardware: two CPU cores, three to five minutes in all.

Command:
    python -m experiments.sweep --config=configs/sweeps/quickstart.py --workdir=runs/quickstart
"""

from collections.abc import Iterator

VARIANTS = {
    "dense": "dense",
    "top_kast_90": "90/80",
    "top_kast_98": "98/90",
    "static_90": "static-90",
    "static_98": "static-98",
}


def get_sweep() -> Iterator[tuple[str, str, dict[str, object]]]:
    for name, variant in VARIANTS.items():
        yield name, f"configs/quickstart.py:{variant}", {}
