"""Table 3: perplexity on WikiText-103.

The numbers are [V]. `:small` is the study's Transformer-XL of 0.75 M parameters on enwik8, whose
metric is bits per character, with a dense model of a third of the parameters in the place of that
of 94 M.

Hardware: not tried on any at the paper's scale: an estimated 2,500 chip-hours of TPU v5e a run, 920
of the model of 94 M (docs/reproducing.md). `:small` one CPU core, 13 to 90 minutes a run (the
longer with other work on the machine).

Command:
    python -m experiments.sweep --config=configs/sweeps/table_3.py:small --workdir=runs/texts \
        --config.data.name=text_file --config.data.file=enwik8
"""

from collections.abc import Iterator, Mapping

from experiments.config import check_variant

CONFIGS = {"": "configs/wikitext103_large.py", "small": "configs/enwik8_small.py"}
WITH_94M = "configs/wikitext103_94m.py:dense"
REPORTED = {"dense": 18.3, "80/0": 19.8, "80/60": 21.3, "90/80": 25.1, "95/90": 32.2}


def get_sweep(variant: str = "") -> Iterator[tuple[str | None, str, Mapping[str, object], str]]:
    check_variant(variant, CONFIGS)
    study = ",study" if variant else ""
    for row, perplexity in REPORTED.items():
        yield None, f"{CONFIGS[variant]}:{row}{study}", {}, f"{perplexity} perplexity (table 3)"
    of_94m = f"{CONFIGS[variant]}:small-dense-67{study}" if variant else WITH_94M
    yield "dense-94m", of_94m, {}, "21.5 perplexity (table 3)"
    if not variant:
        own = "18.3 perplexity (Transformer-XL)"
        yield None, f"{CONFIGS[variant]}:dense,reference", {}, own
        base = "configs/wikitext103_base.py:dense"
        yield "dense-base", base, {}, "24.0 perplexity (Transformer-XL)"
