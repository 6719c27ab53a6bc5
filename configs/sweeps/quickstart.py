"""The runs of scripts/quickstart: dense, and four ways to choose the weights at 95 % and 98 %.

A fixed random mask, SET, RigL and Top-KAST. It reproduces no row of the paper. Hardware: two CPU
cores, two to four minutes in all (two runs at a time).

Command:
    python -m experiments.sweep --config=configs/sweeps/quickstart.py --workdir=runs/quickstart
"""

from collections.abc import Iterator

VARIANTS = {
    "dense": "dense",
    "static_95": "static-95",
    "set_95": "set-95",
    "rigl_95": "rigl-95",
    "top_kast_95": "95/90",
    "static_98": "static-98",
    "set_98": "set-98",
    "rigl_98": "rigl-98",
    "top_kast_98": "98/95",
}


def get_sweep() -> Iterator[tuple[str, str, dict[str, object]]]:
    for name, variant in VARIANTS.items():
        yield name, f"configs/digits_lenet.py:{variant}", {}
