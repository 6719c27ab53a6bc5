"""Figure 2c: accuracy against training FLOPs at 98 % and 99 % sparsity.

The numbers are top-1 % on ImageNet, read off the vector figure [F]; the backward densities follow
from the FLOPs of the points [C]. RigL's FLOPs are those of Erdős–Rényi densities with a dense first
layer [C], which its repository says of the point at .29 [V]. RigL with uniform densities and fixed
random masks are added. `:small` is CIFAR-10 with the small ResNet, where each method has the first
and the last layer dense.

Hardware: a TPU slice or a machine of 8 GPUs for each run, not tried on any: an estimated 13
chip-hours of TPU v5e for 32,000 steps (docs/reproducing.md). `:small` one CPU core, 4 to 13 minutes
for 5,000 steps, more with other work on the machine.

Command:
    python -m experiments.sweep --config=configs/sweeps/figure_2c.py:small --workdir=runs/images
"""

from collections.abc import Iterator, Mapping

from configs.sweeps.figure_2b import EVERY_STEP
from experiments.config import check_variant

CONFIGS = {"": "configs/imagenet_resnet50.py", "small": "configs/cifar10_small.py"}

# Top-1 % and training FLOPs of dense.
REPORTED = {
    "98/95": (66.46, ".061"),
    "98/90": (67.06, ".077"),
    "98/95,2x": (68.87, ".122"),
    "98/90,2x": (68.99, ".155"),
    "98/90,5x": (70.67, ".387"),
    "99/98": (61.61, ".045"),
    "99/95": (61.73, ".055"),
    "99/98,2x": (63.95, ".090"),
}
RIGL = {
    "rigl-98": (61.2, ".078"),
    "rigl-98,5x": (68.8, ".39"),
    "rigl-99,5x": (61.86, ".29"),
    "rigl-99,10x": (63.9, ".58"),
}


def get_sweep(variant: str = "") -> Iterator[tuple[None, str, Mapping[str, object], str]]:
    check_variant(variant, CONFIGS)
    config = CONFIGS[variant]
    every = {} if variant else EVERY_STEP
    for row, (accuracy, flops) in REPORTED.items():
        yield None, f"{config}:{row}", every, f"{accuracy} % at {flops} FLOPs (figure 2c)"
    sparse = "" if variant else ",last-sparse"
    for row, (accuracy, flops) in RIGL.items():
        told = f"{accuracy} % at {flops} FLOPs (figure 2c)"
        yield None, f"{config}:{row}{sparse}", {"method.distribution": "erk"}, told
    for row in ("dense", "rigl-98", "rigl-99", "static-98", "static-99"):
        yield None, f"{config}:{row}", {}, ""
