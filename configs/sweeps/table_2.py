"""Table 2 and figure 3c: bits per character on enwik8, 277 M parameters.

The numbers are read off the vector figure [F]; the table [V] rounds those of 0/0, 80/0, 80/80 and
90/60. In addition it has Transformer-XL of 44 M parameters (1.06) and All-Attention of 39 M (1.01).
`:small` is the study's Transformer-XL of 0.75 M parameters.

Hardware: not tried on any at the paper's scale: an estimated 300 chip-hours of TPU v5e a run
(docs/reproducing.md). `:small` one CPU core, 13 to 90 minutes a run (the longer with other work on
the machine).

Command:
    python -m experiments.sweep --config=configs/sweeps/table_2.py:small --workdir=runs/texts \
        --config.data.name=text_file --config.data.file=enwik8
"""

from collections.abc import Iterator, Mapping

from experiments.config import check_variant

CONFIGS = {"": "configs/enwik8_large.py", "small": "configs/enwik8_small.py"}
REPORTED = {
    "dense": "0.99",
    "80/0": "1.004, in the table 1.00",
    "80/60": "1.016",
    "80/80": "1.025, in the table 1.02",
    "90/0": "1.021",
    "90/60": "1.033, in the table 1.03",
    "90/80": "1.046",
    "90/90": "1.083",
    "95/0": "1.073",
    "95/60": "1.081",
    "95/80": "1.097",
}


def get_sweep(variant: str = "") -> Iterator[tuple[str | None, str, Mapping[str, object], str]]:
    check_variant(variant, CONFIGS)
    study = ",study" if variant else ""
    for row, bpc in REPORTED.items():
        yield None, f"{CONFIGS[variant]}:{row}{study}", {}, f"{bpc} bpc (table 2, figure 3c)"
    other = "All-Attention, 39 M, another model: 1.01"
    reference = f"Transformer-XL, 44 M: 1.06 bpc (table 2; {other})"
    if not variant:
        own = "0.99 bpc (Transformer-XL)"
        yield None, f"{CONFIGS[variant]}:dense,reference", {}, own
    # 44 of 277 M parameters are 16 %.
    base = (
        f"{CONFIGS[variant]}:small-dense-84{study}" if variant else "configs/enwik8_base.py:dense"
    )
    yield "transformer_xl_base", base, {}, reference
