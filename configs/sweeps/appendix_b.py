"""Appendix B: all layers sparse, the first and the last one included.

The numbers are top-1 % on ImageNet, read off the vector figure [F]. `:small` is CIFAR-10 with the
small ResNet.

Hardware: a TPU slice or a machine of 8 GPUs for each run, not tried on any: an estimated 13
chip-hours of TPU v5e for 32,000 steps (docs/reproducing.md). `:small` one CPU core, 4 to 13 minutes
for 5,000 steps, more with other work on the machine.

Command:
    python -m experiments.sweep --config=configs/sweeps/appendix_b.py:small --workdir=runs/images
"""

from collections.abc import Iterator, Mapping

from configs.sweeps.figure_2b import EVERY_STEP
from experiments.config import check_variant

CONFIGS = {"": "configs/imagenet_resnet50.py", "small": "configs/cifar10_small.py"}

REPORTED = {
    "80/0": 75.64,
    "80/50": 74.78,
    "80/80": 72.19,
    "90/0": 74.42,
    "90/50": 74.09,
    "90/80": 73.07,
    "90/90": 69.55,
}


def get_sweep(variant: str = "") -> Iterator[tuple[None, str, Mapping[str, object], str]]:
    check_variant(variant, CONFIGS)
    every = {} if variant else EVERY_STEP
    for row, accuracy in REPORTED.items():
        yield None, f"{CONFIGS[variant]}:{row},all-sparse", every, f"{accuracy:.2f} % (appendix B)"
