"""The images' half of the study: every run that a claim of the paper is held against on CIFAR-10.

docs/results.md has the claims and the results. Its rows are those of the other sweeps with `:small`
where they share them, and blocks, N:M, constant fan-in, and other exploration weights and refresh
intervals, of which the paper has no numbers.

Data: a folder of class folders, or `--config.data.name=cifar10` (tensorflow_datasets').
Hardware: one CPU core, 8 to 12 minutes a run (two at a time).

Command:
    python -m experiments.sweep --config=configs/sweeps/study_images.py --workdir=runs/images \
        --seeds=3 --jobs=2
"""

from collections.abc import Iterator, Mapping

CONFIG = "configs/cifar10_small.py"
TOP_KAST = (
    "90/80", "95/90", "80/0", "80/50", "80/80", "90/0", "90/50", "90/90", "95/80", "98/90", "98/95",
    "99/95",
)  # fmt: skip
METHODS = ("static", "set", "rigl", "snip", "snfs", "pruning", "dnw", "srigl", "small-dense")
OWN: dict[str, tuple[Mapping[str, object], ...]] = {
    "90/80": (
        {"method.exploration_set": "random"},
        *({"method.refresh_every": every} for every in (1, 10, 100)),
        *({"method.exploration_weight": weight} for weight in (0.0, 1e-5, 1e-3)),
        *({"method.pattern": f"block:{n}x{n}"} for n in (4, 8, 16)),
        {"method.pattern": "fan_in"},
    ),
    "95/90": ({"method.exploration_set": "random"},),
    "98/90": ({"method.exploration_set": "random"},),
    "90/0": tuple({"method.stop_exploring_at": step} for step in (0, 781, 2_500)),
    "pruning-90": ({"method.ranking": "global"},),
    "static-90": ({"method.distribution": "erk"},),
    "static-95": ({"method.distribution": "erk"},),
    "rigl-90": ({"method.distribution": "erk"},),
    "rigl-95": ({"method.distribution": "erk"},),
    "87.5/75": ({"method.pattern": "1:8"},),
}


def get_sweep() -> Iterator[tuple[None, str, Mapping[str, object]]]:
    methods = [f"{method}-{sparsity}" for sparsity in (90, 95) for method in METHODS]
    extreme = [f"{method}-{sparsity}" for sparsity in (98, 99) for method in ("static", "rigl")]
    for row in ("dense", *TOP_KAST, *methods, *extreme):
        yield None, f"{CONFIG}:{row}", {}
    for row, several in OWN.items():
        for own in several:
            yield None, f"{CONFIG}:{row}", own
