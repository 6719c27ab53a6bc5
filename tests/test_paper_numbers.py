"""Each number of the paper, by what its run must be: a sweep plans that run and says the number.

The numbers are those of the paper's figures and tables, of RigL's table 1 and repository, and of
Transformer-XL's results that the paper compares with. A row is found by its resolved config, not by
its name.
"""

import functools
import re
from pathlib import Path

import pytest

from experiments import config as configs
from experiments.config.planned import plan

SWEEPS = Path(__file__).parent.parent / "configs" / "sweeps"
RESNET, EPOCHS = {"model.name": "resnet50", "batch_size": 4096}, 32_000
# The paper's main runs choose the sets in every step.
MAIN = {"dense rule": "(stem|head)/kernel", "method.refresh_every": 1}
DENSE = {"method.name": "dense"}
NARROWER = "model.small_dense.forward_density"


def kast(forward, backward, **own):
    return {"method.name": "top_kast", "forward": forward, "backward": backward, **own}


def grid(rows, **own):
    """{forward: {backward: number}} as {conditions: number}."""
    return [(kast(f, b, **own), number) for f, row in rows.items() for b, number in row.items()]


def others(forward, rows, own):
    return [
        ({"method.name": name, "forward": forward, **own, **schedule(name, own)}, n)
        for name, n in rows.items()
    ]


def schedule(name, own):
    """RigL's: in 32,000 steps, sets move until 25,000; Gale's pruning is from 10,000 to 25,000."""
    if "steps" not in own:
        return {}
    times = own["steps"] // EPOCHS
    moves = {"rigl": {"method.last_choice_at": 25_000 * times}}
    moves |= dict.fromkeys(("set", "snfs"), moves["rigl"])
    moves["pruning"] = {"method.begin_at": 10_000 * times, "method.end_at": 25_000 * times}
    return moves.get(name, {})


RIGL = {
    80: {
        "static_random": "70.6 ± .06 % at .23, .23", "snip": "72.0 ± .10 % at .23, .23",
        "set": "72.9 ± .39 % at .23, .23", "rigl": "74.6 ± .06 % at .23, .23",
        "pruning": "75.6 % at .56, .23", "dnw": "76 %",
    },
    90: {
        "static_random": "65.8 ± .04 % at .10, .10", "snip": "67.2 ± .12 % at .10, .10",
        "set": "69.6 ± .23 % at .10, .10", "rigl": "72.0 ± .05 % at .10, .10",
        "pruning": "73.9 % at .51, .10", "dnw": "74 %",
    },
}  # fmt: skip
ERK = {
    80: {
        "static_random": "72.1 ± .04 % at .42, .42", "rigl": "75.1 ± .05 % at .42, .42",
        "snfs": "75.2 ± .11 % at .61, .42",
    },
    90: {
        "static_random": "67.7 ± .12 % at .24, .24", "rigl": "73.0 ± .04 % at .25, .24",
        "snfs": "72.9 ± .06 % at .50, .24",
    },
}  # fmt: skip
SMALL_DENSE = {80: "72.1 ± .12 % at .20, .20", 90: "68.9 ± .10 % at .12, .12"}
# At 98 and 99 %, RigL's densities and its dense first layer follow from its FLOPs.
EXTREME = {"method.distribution": "erk", "dense rule": "stem/kernel"}
FIVE_TIMES = {80: "76.6 ± .06 % at 1.14, .23", 90: "75.7 ± .06 % at .52, .10"}


def rigl_paper(forward):
    at = {"steps": EPOCHS, "dense rule": "stem/kernel"}
    every = {"steps": EPOCHS, "dense rule": None, "method.distribution": "erk"}
    return [
        *others(forward, RIGL[forward], {**at, "method.distribution": "uniform"}),
        *others(forward, {"rigl": FIVE_TIMES[forward]}, {**at, "steps": 5 * EPOCHS}),
        *others(forward, ERK[forward], every),
        ({**DENSE, NARROWER: (100 - forward) / 100, **at}, SMALL_DENSE[forward]),
        ({**DENSE, NARROWER: 1.0}, "76.8 ± .09 % at 1, 1 (3.2e18 in training, 8.2e9"),
    ]  # fmt: skip


def lengths(steps, rows):
    return [({**where, "steps": steps * EPOCHS}, number) for where, number in rows]


EXPLORED = {(90, 80): ("73.03", "74.76"), (95, 90): ("70.42", "68.48")}
TABLE_6 = {(80, 50): ("75.03", "75.14"), (90, 80): ("73.03", "73.18"), (95, 90): ("70.42", "70.38")}
WRN = {
    "rigl": {50: ".942", 80: ".936", 90: ".929", 95: ".918"},
    "static_random": {50: ".941", 80: ".929", 90: ".915", 95: ".890"},
    "pruning": {50: ".940", 80: ".936", 90: ".933", 95: ".923"},
}

# By sweep: what must hold for its rows, and (what must hold for one row, its numbers).
NUMBERS = {
    "figure_2a": (
        RESNET,
        lengths(1, grid({80: {75: "73.98 % at .242", 70: "74.09 % at .258", 60: "74.59 % at .290",
                              50: "75.03 % at .323", 0: "75.59 % at .484", 80: "72.50 %"}}, **MAIN))
        + lengths(2, grid({80: {78: "74.18 % at .464", 79: "74.21 % at .458", 75: "74.61 % at .484",
                                60: "75.29 % at .581", 50: "75.43 % at .645",
                                0: "76.11 % at .968"}}, **MAIN))
        + lengths(5, grid({80: {80: "74.58 % at 1.129", 50: "75.28 % at 1.613",
                                0: "75.75 % at 2.419"}}, **MAIN))
        + rigl_paper(80),
    ),
    "figure_2b": (
        RESNET,
        lengths(1, grid({
            80: {0: "75.59", 50: "75.03", 60: "74.59", 70: "74.09", 75: "73.98", 80: "72.50"},
            90: {0: "74.65", 50: "73.99", 80: "73.03", 85: "72.44", 90: "69.67"},
            95: {0: "71.83", 50: "71.96", 80: "71.30", 90: "70.42"},
        }, **MAIN))
        + rigl_paper(90)
        + others(90, {"rigl": ".13"}, {"steps": EPOCHS, "dense rule": "stem/kernel"}),
    ),
    "figure_2b ": (  # sparseml's run: 100 epochs in batches of 400
        {"model.name": "resnet50", "batch_size": 400, "steps": round(100 * 1_281_167 / 400)},
        [(kast(90, 80), "72.5")],
    ),
    "figure_2c": (
        RESNET,
        lengths(1, grid({98: {95: "66.46 % at .061", 90: "67.06 % at .077"},
                         99: {98: "61.61 % at .045", 95: "61.73 % at .055"}}, **MAIN))
        + lengths(2, grid({98: {95: "68.87 % at .122", 90: "68.99 % at .155"},
                           99: {98: "63.95 % at .090"}}, **MAIN))
        + lengths(5, grid({98: {90: "70.67 % at .387"}}, **MAIN))
        + lengths(1, others(98, {"rigl": "61.2 % at .078"}, EXTREME))
        + lengths(5, others(98, {"rigl": "68.8 % at .39"}, EXTREME))
        + lengths(5, others(99, {"rigl": "61.86 % at .29"}, EXTREME))
        + lengths(10, others(99, {"rigl": "63.9 % at .58"}, EXTREME)),
    ),
    "table_1": (
        {**RESNET, "steps": EPOCHS, **MAIN},
        [
            (kast(f, b, **{"method.exploration_set": kind}), number)
            for (f, b), two in EXPLORED.items()
            for kind, number in zip(("magnitude", "random"), two, strict=True)
        ]
        + [
            (kast(90, 0, **{"method.stop_exploring_at": step}), number)
            for step, number in ((0, "68.26"), (5_000, "72.05"), (16_000, "74.14"), (None, "74.65"))
        ],
    ),
    "table_6": (
        {**RESNET, "steps": EPOCHS, **MAIN},
        [
            (kast(f, b, **{"method.refresh_every": every}), number)
            for (f, b), two in TABLE_6.items()
            for every, number in zip((1, 100), two, strict=True)
        ],
    ),
    "appendix_b": (
        {**RESNET, "steps": EPOCHS, "dense rule": None, "method.refresh_every": 1},
        grid({80: {0: "75.64", 50: "74.78", 80: "72.19"},
              90: {0: "74.42", 50: "74.09", 80: "73.07", 90: "69.55"}}),
    ),
    "figure_3": (
        {**RESNET, "steps": EPOCHS, "write_sets_every": 5_000, "method.refresh_every": 1},
        [
            (kast(80, 50), numbers)
            for numbers in (
                "30.6, 21.2, 15.9, 13.6, 10.1, 3.0, .3 %", "28.4, 4.1, .5, .5, .3, .1, 0",
                "31.3, 23.7, 18.9, 16.6, 12.5, 3.8, .4", "4.7, 3.5, 2.5, 2.1, 1.6, .2, 0 %",
                "about 5 %",
            )
        ],
    ),
    "table_2": (
        {"model.d_model": 1024, "model.n_layer": 24, "optimizer.learning_rate": 2e-4},
        [
            (DENSE, "0.99"),
            *grid({
                80: {0: "1.004, in the table 1.00", 60: "1.016", 80: "1.025, in the table 1.02"},
                90: {0: "1.021", 60: "1.033, in the table 1.03", 80: "1.046", 90: "1.083"},
                95: {0: "1.073", 60: "1.081", 80: "1.097"},
            }),
        ],
    ),
    "table_2 ": (  # Transformer-XL's own models
        DENSE,
        [
            ({"model.d_model": 1024, "optimizer.learning_rate": 2.5e-4}, "0.99"),
            ({"model.d_model": 512, "model.n_layer": 12}, "1.06"),
            ({"model.d_model": 512, "model.n_layer": 12}, "1.01"),
        ],
    ),
    "table_3": (
        {"model.d_model": 1024, "model.n_layer": 18, "optimizer.learning_rate": 2e-4},
        [
            (DENSE, "18.3"),
            *grid({80: {0: "19.8", 60: "21.3"}, 90: {80: "25.1"}, 95: {90: "32.2"}}),
        ],
    ),
    "table_3 ": (
        DENSE,
        [
            ({"model.d_model": 1024, "optimizer.learning_rate": 2.5e-4}, "18.3"),
            ({"model.d_model": 410, "model.n_layer": 16}, "24.0"),
            ({"name": "wikitext103_94m:dense"}, "21.5"),
        ],
    ),
    "table_5": (
        {"model.d_model": 512, "model.n_layer": 24},
        [
            (DENSE, "1.00"),
            *others(80, {"pruning": "1.02"}, {}),
            *others(90, {"pruning": "1.06"}, {}),
            *others(95, {"pruning": "1.13"}, {}),
            *grid({80: {0: "1.03", 60: "1.05"}, 90: {0: "1.08", 80: "1.10"},
                   95: {0: "1.14", 90: "1.17"}}),
        ],
    ),
    "rigl_cifar10": (
        {"model.name": "wrn_22_2", "dense rule": "stem/kernel", "batch_size": 128},
        [
            ({"method.name": name, "forward": f, "method.distribution": "erk"}, number)
            for name, row in WRN.items()
            for f, number in row.items()
        ],
    ),
}  # fmt: skip
ALL = [
    (sweep, {**common, **where}, number)
    for sweep, (common, rows) in NUMBERS.items()
    for where, number in rows
]


@functools.cache
def planned(sweep):
    """What the paper reports for each row, with the row's resolved config."""
    runs = plan(f"{SWEEPS / sweep}.py", 1)
    return [(run.paper, configs.resolve(run.config, run.overrides)) for run in runs]


def value(config, key):
    if key == "dense rule":  # the first rule, where it makes a layer dense
        of_dense = config.model.get("small_dense", {}).get("rules") or ((None, None),)
        pattern, spec = (config.method.get("rules") or of_dense)[0]
        return pattern if spec == "dense" and pattern != ".*" else None
    if key in ("forward", "backward"):
        density = config.method.get(f"{key}_density")
        return None if density is None else round(100 - 100 * density, 6)
    found = config
    for part in key.split("."):
        found = found.get(part) if found is not None else None
    return found


def meets(config, where):
    return all(value(config, key) == wanted for key, wanted in where.items())


@pytest.mark.parametrize(("sweep", "where", "number"), ALL, ids=lambda v: str(v)[:40])
def test_a_sweep_plans_the_run_of_each_number(sweep, where, number):
    told = [paper for paper, config in planned(sweep.strip()) if meets(config, where)]
    assert told, "no row has this config"
    whole = rf"(?<![\d.±]){'0?' * number.startswith('.')}{re.escape(number)}(?![\d])"
    assert [text for text in told if re.search(whole, text)], told


# Numbers that are no results: those of figures and tables, and sizes of other models.
NO_RESULTS = (
    r"\b(?:figure|table|issue|request) \d+\w?\b(?!\.\d)|Transformer-XL, 44 M|All-Attention, 39 M"
)


def numbers(text):
    return {found.lstrip("0") for found in re.findall(r"\d*\.?\d+(?:e\d+)?", text)}


def test_every_number_is_here():
    """A number in a sweep that this file does not have was changed, or has no test."""
    for sweep in sorted({sweep.strip() for sweep in NUMBERS}):
        for paper, config in planned(sweep):
            of_row = [
                number
                for name, where, number in ALL
                if name.strip() == sweep and meets(config, where)
            ]
            told = numbers(re.sub(NO_RESULTS, "", paper))
            assert told <= numbers(" ".join(of_row)), (sweep, config.name, paper)
            assert bool(of_row) == bool(paper), (sweep, config.name)


STUDY = {
    "study_images": {
        "90-80": "73.03 %", "90-80+exploration_set-random": "74.76 %", "static-90": "65.8 ± .04 %",
        "90-0+stop_exploring_at-781": "72.05 %", "90-80+refresh_every-100": "73.18 %",
        "80-50": "75.03 %", "98-90": "67.06 %", "dense": "76.8 ± .09 %", "rigl-98": "",
        "rigl-98+distribution-erk": "61.2 %",
        "small-dense-90": "68.9 ± .10 %", "static-98": "", "90-80+refresh_every-10": "",
    },
    "study_options": {
        "rigl-90+distribution-erk": "73.0 ± .04 %", "snip-90": "67.2 ± .12 %",
        "dnw-90+learning_rate-0.05": "74 %", "90-80+exploration_weight-0.001": "",
    },
    "study_texts": {
        "80-0+study": "1.004, in the table 1.00 bpc (table 2, figure 3c); 1.03 bpc (table 5)",
        "pruning-90+study": "1.06 bpc", "90-60+study": "1.033, in the table 1.03 bpc",
        "set-90+study": "", "pruning-80+study+learning_rate-0.002": "1.02 bpc",
    },
}  # fmt: skip


@pytest.mark.parametrize("sweep", STUDY)
def test_the_rows_of_the_study_stand_beside_the_numbers_of_the_paper(sweep):
    told = {run.row: run.paper for run in plan(f"{SWEEPS / sweep}.py", 1)}
    for row, number in STUDY[sweep].items():
        assert bool(told[row]) == bool(number), row
        assert told[row].startswith(number), row
