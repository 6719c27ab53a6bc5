"""Table 5: bits per character on enwik8 with 69 M parameters, with magnitude pruning.

The numbers are [V]. `:small` is the Transformer-XL of 2.9 M parameters.

Hardware: not tried on any at the paper's scale: an estimated 102 chip-hours of TPU v5e a run
(docs/reproducing.md). `:small` two CPU cores, 10 minutes for 2,000 steps of the dense model (0.28 s
each, 2026-11-30), and the test.

Command:
    python -m experiments.sweep --config=configs/sweeps/table_5.py:small --workdir=runs/texts \
        --config.data.name=text_file --config.data.file=enwik8
"""

from collections.abc import Iterator, Mapping

from experiments.config import check_variant

CONFIGS = {"": "configs/enwik8_69m.py", "small": "configs/enwik8_small.py"}
REPORTED = {
    "dense": 1.00,
    "pruning-80": 1.02,
    "pruning-90": 1.06,
    "pruning-95": 1.13,
    "80/0": 1.03,
    "80/60": 1.05,
    "90/0": 1.08,
    "90/80": 1.10,
    "95/0": 1.14,
    "95/90": 1.17,
}


def get_sweep(variant: str = "") -> Iterator[tuple[None, str, Mapping[str, object], str]]:
    check_variant(variant, CONFIGS)
    for row, bpc in REPORTED.items():
        yield None, f"{CONFIGS[variant]}:{row}", {}, f"{bpc:.2f} bpc (table 5)"
