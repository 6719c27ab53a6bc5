"""Table 5: bits per character on enwik8 with 69 M parameters, with magnitude pruning.

The numbers are [V]. `:small` is the study's Transformer-XL of 0.75 M parameters, and pruning has
the learning rate of the dense network.

Hardware: not tried on any at the paper's scale: an estimated 102 chip-hours of TPU v5e a run
(docs/reproducing.md). `:small` one CPU core, 13 to 90 minutes a run (the longer with other work on
the machine).

Command:
    python -m experiments.sweep --config=configs/sweeps/table_5.py:small --workdir=runs/texts \
        --config.data.name=text_file --config.data.file=enwik8
"""

from collections.abc import Iterator, Mapping

from experiments.config import check_variant

CONFIGS = {"": "configs/enwik8_69m.py", "small": "configs/enwik8_small.py"}
# It begins dense.
PRUNING: Mapping[str, object] = {"optimizer.learning_rate": 2e-3}
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
    study = ",study" if variant else ""
    for row, bpc in REPORTED.items():
        own = PRUNING if variant and row.startswith("pruning") else {}
        yield None, f"{CONFIGS[variant]}:{row}{study}", own, f"{bpc:.2f} bpc (table 5)"
