"""The texts' half of the study: the runs that the paper's claims on language are held against.

A Transformer-XL of 0.75 M parameters (`configs/enwik8_small.py:…,study`) sees 8.2 M bytes of
enwik8. docs/results.md has the claims and the results. `:rates` trains each method for a quarter of
the steps at three learning rates, without a test; compare the mean training loss of the last 500
steps. `:suspects` asks in runs of that length why Top-KAST is behind a fixed random mask: more
refreshes, other weights of the penalty, a decoupled penalty, AdamW's decay of all matrices in its
place, and a start at zero for what enters B; `rates-90-80-0.004` and `rates-static-90-0.004` are
the same without a change. Some rows of the study have another learning rate than their config, and
two of them an earlier end of pruning. The paper's numbers beside the rows are those of its models
of 277 M (table 2, figure 3c) and of 69 M parameters (table 5).

Data: `--config.data.name=text_file --config.data.file=enwik8`, any file of raw text.
Hardware: one CPU core, 13 to 90 minutes a run; `:rates` 3 to 28 minutes (the longer with other work
on the machine).

Command:
    python -m experiments.sweep --config=configs/sweeps/study_texts.py --workdir=runs/texts \
        --jobs=2 --config.data.name=text_file --config.data.file=enwik8
"""

from collections.abc import Iterator, Mapping

from configs.sweeps import table_2, table_5
from experiments.config import check_variant, reported

CONFIG = "configs/enwik8_small.py"
METHODS = ("dense", "small-dense-90", "static-90", "set-90", "rigl-90", "pruning-90", "90/80")
TOP_KAST = ("80/0", "80/60", "80/80", "90/0", "90/60", "95/90")
RATES = (2e-3, 4e-3, 8e-3)
EARLIER: Mapping[str, object] = {
    **table_5.PRUNING, "method.begin_at": 800, "method.end_at": 4_000
}  # fmt: skip
SHORT: Mapping[str, object] = {"steps": 2_000, "eval_at_end": False}
SUSPECTS: Mapping[str, Mapping[str, object]] = {
    "refresh_every-25": {"method.refresh_every": 25},
    "exploration_weight-0": {"method.exploration_weight": 0.0},
    "exploration_weight-0.001": {"method.exploration_weight": 1e-3},
    **{
        f"decoupled-{decay:g}": {
            "method.exploration_weight": 0.0,
            "method.exploration_decay": decay,
        }
        for decay in (0.1, 0.3, 1.0)
    },
    "weight_decay-0.1": {
        "method.exploration_weight": 0.0,
        "optimizer.name": "adamw",
        "optimizer.weight_decay": 0.1,
    },
    "zero_start": {"method.name": "docs.examples.zero_start:zero_start"},
}


def get_sweep(variant: str = "") -> Iterator[tuple[str | None, str, Mapping[str, object], str]]:
    check_variant(variant, ("", "rates", "suspects"))
    if variant == "rates":
        for row in METHODS:
            for rate in RATES:
                name = f"rates-{row.replace('/', '-')}-{rate:g}"
                own = {**SHORT, "optimizer.learning_rate": rate}
                yield name, f"{CONFIG}:{row},study", own, ""
        return
    if variant == "suspects":
        for name, suspect in SUSPECTS.items():
            yield f"suspects-{name}", f"{CONFIG}:90/80,study", {**SHORT, **suspect}, ""
        return
    paper = reported(table_2.get_sweep("small"), table_5.get_sweep("small"))
    # Twice and half the rate. Pruning, which begins dense, also has a removal from a tenth to half
    # of the steps, where that of the trainer is from a fifth to four fifths.
    fast = ("static-90", "90/80", "set-90", "rigl-90", "small-dense-90")
    slow = ("pruning-90", "pruning-80", "90/80", "small-dense-90", "static-90", "set-90")
    rows: list[tuple[str, Mapping[str, object]]] = [
        *((row, {}) for row in (*METHODS, "small-dense-80", *TOP_KAST)),
        *((row, {"optimizer.learning_rate": 8e-3}) for row in fast),
        *((row, {"optimizer.learning_rate": 2e-3}) for row in slow),
        *((row, EARLIER) for row in ("pruning-90", "pruning-80")),
    ]
    for row, different in rows:
        config = f"{CONFIG}:{row},study"
        # Rows of another rate have the number of their sparsity beside them too.
        yield None, config, different, paper(config, {}) or paper(config, table_5.PRUNING)
    for weight in ("0.3", "0.1"):
        name = f"90-80+study+decoupled-{weight}"
        yield name, f"{CONFIG}:90/80,study", SUSPECTS[f"decoupled-{weight}"], ""
