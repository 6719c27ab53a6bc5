"""Table 1: which units of B∖A are explored, and when exploration stops.

The numbers are top-1 % on ImageNet [V]. `:small` is CIFAR-10 with the small ResNet, where
exploration stops at the same shares of the run.

Hardware: a TPU slice or a machine of 8 GPUs for each run, not tried on any: an estimated 13
chip-hours of TPU v5e for 32,000 steps (docs/reproducing.md). `:small` one CPU core, 4 to 13 minutes
for 5,000 steps, more with other work on the machine.

Command:
    python -m experiments.sweep --config=configs/sweeps/table_1.py:small --workdir=runs/images
"""

from collections.abc import Iterator, Mapping

from configs.sweeps.figure_2b import EVERY_STEP
from experiments.config import check_variant

CONFIGS = {"": "configs/imagenet_resnet50.py", "small": "configs/cifar10_small.py"}

EXPLORED = {"90/80": (73.03, 74.76), "95/90": (70.42, 68.48), "98/90": (None, None)}
STEPS = {"": 32_000, "small": 5_000}
# By the step of 32,000 at which exploration stops.
STOPPED = {0: 68.26, 5_000: 72.05, 16_000: 74.14, None: 74.65}


def get_sweep(variant: str = "") -> Iterator[tuple[None, str, Mapping[str, object], str]]:
    check_variant(variant, CONFIGS)
    config = CONFIGS[variant]
    every = {} if variant else EVERY_STEP
    for row, reported in EXPLORED.items():
        for own, accuracy in zip(({}, {"method.exploration_set": "random"}), reported, strict=True):
            told = f"{accuracy} % (table 1)" if accuracy else ""
            yield None, f"{config}:{row}", {**every, **own}, told
    for step, accuracy in STOPPED.items():
        stop = {} if step is None else {"method.stop_exploring_at": step * STEPS[variant] // 32_000}
        yield None, f"{config}:90/0", {**every, **stop}, f"{accuracy} % (table 1)"
