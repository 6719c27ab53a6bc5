"""The images' half of the study: the runs that test the paper's claims on CIFAR-10.

docs/results.md has the claims and the results. Rows that the other sweeps have with `:small` are
the same here, and have the numbers that the paper reports for ImageNet beside them.
`study_options.py` has the rows on which no claim rests.

Data: tensorflow_datasets' cifar10 (`scripts/prepare_tfds cifar10`), or a folder of class folders:
`--config.data.name=image_folder --config.data.dir=DIR`, which docs/results.md used.
Hardware: one CPU core, 4 to 13 minutes a run, more with other work on the machine.

Command:
    python -m experiments.sweep --config=configs/sweeps/study_images.py --workdir=runs/images \
        --seeds=3 --jobs=2
"""

from collections.abc import Iterator, Mapping, Sequence

from configs.sweeps import figure_2a, figure_2b, figure_2c, table_1, table_6
from experiments.config import reported

CONFIG = "configs/cifar10_small.py"
TOP_KAST = (
    "90/80", "95/90", "80/0", "80/50", "80/80", "90/0", "90/50", "90/90", "95/80", "98/90", "98/95",
    "99/90", "99/95",
)  # fmt: skip
METHODS = (
    "small-dense-90", "pruning-90", "static-90", "set-90", "rigl-90", "static-95", "set-95",
    "rigl-95", "static-98", "set-98", "rigl-98", "static-99", "set-99", "rigl-99",
)  # fmt: skip
OWN: dict[str, tuple[Mapping[str, object], ...]] = {
    "90/80": (
        {"method.exploration_set": "random"},
        *({"method.refresh_every": every} for every in (1, 10, 100)),
    ),
    "95/90": ({"method.exploration_set": "random"},),
    "98/90": ({"method.exploration_set": "random"},),
    "90/0": tuple({"method.stop_exploring_at": step} for step in (0, 781, 2_500)),
    # The paper's RigL of 98 and 99 % has these densities (`figure_2c.py`).
    **{row: ({"method.distribution": "erk"},) for row in ("rigl-98", "rigl-99")},
}


def get_sweep() -> Iterator[tuple[None, str, Mapping[str, object], str]]:
    sweeps = (table_1, table_6, figure_2b, figure_2a, figure_2c)
    paper = reported(*(sweep.get_sweep("small") for sweep in sweeps))
    rows: Mapping[str, Sequence[Mapping[str, object]]] = {
        row: [{}] for row in ("dense", *METHODS, *TOP_KAST)
    }
    for each in (rows, OWN):
        for row, several in each.items():
            for own in several:
                yield None, f"{CONFIG}:{row}", own, paper(f"{CONFIG}:{row}", own)
