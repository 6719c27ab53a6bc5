"""Figure 2a: accuracy against training FLOPs at 80 % sparsity, trained up to five times as long.

The numbers are top-1 % on ImageNet, read off the vector figure [F] or in the RigL paper's table
[V]. The backward densities of the points at 2x follow from their FLOPs [C]. RigL's table has the
last layer sparse, and with ERK all layers. `:small` is CIFAR-10 with the small ResNet, where each
method has the first and the last layer dense.

Hardware: a TPU slice or a machine of 8 GPUs for each run, not tried on any: an estimated 13
chip-hours of TPU v5e for 32,000 steps (docs/reproducing.md). `:small` one CPU core, 4 to 13 minutes
for 5,000 steps, more with other work on the machine.

Command:
    python -m experiments.sweep --config=configs/sweeps/figure_2a.py:small --workdir=runs/images
"""

from collections.abc import Iterator, Mapping

from configs.sweeps.figure_2b import EVERY_STEP
from experiments.config import check_variant

CONFIGS = {"": "configs/imagenet_resnet50.py", "small": "configs/cifar10_small.py"}

# Top-1 % and training FLOPs of dense.
TOP_KAST = {
    "80/80": (72.50, ""),
    "80/75": (73.98, ".242"),
    "80/70": (74.09, ".258"),
    "80/60": (74.59, ".290"),
    "80/50": (75.03, ".323"),
    "80/0": (75.59, ".484"),
    "80/78,2x": (74.18, ".464"),
    "80/79,2x": (74.21, ".458"),
    "80/75,2x": (74.61, ".484"),
    "80/60,2x": (75.29, ".581"),
    "80/50,2x": (75.43, ".645"),
    "80/0,2x": (76.11, ".968"),
    "80/80,5x": (74.58, "1.129"),
    "80/50,5x": (75.28, "1.613"),
    "80/0,5x": (75.75, "2.419"),
}
# Top-1 %; FLOPs of training and of inference.
OTHERS = {
    "dense": ("76.8 ± .09", "1, 1 (3.2e18 in training, 8.2e9 an image)"),
    "static-80": ("70.6 ± .06", ".23, .23"),
    "snip-80": ("72.0 ± .10", ".23, .23"),
    "small-dense-80": ("72.1 ± .12", ".20, .20"),
    "set-80": ("72.9 ± .39", ".23, .23"),
    "rigl-80": ("74.6 ± .06", ".23, .23"),
    "rigl-80,5x": ("76.6 ± .06", "1.14, .23"),
    "pruning-80": ("75.6", ".56, .23"),
    "dnw-80": ("76", ""),
}
ERK = {
    "static-80": ("72.1 ± .04", ".42, .42"),
    "rigl-80": ("75.1 ± .05", ".42, .42"),
    "snfs-80": ("75.2 ± .11", ".61, .42"),
}


def get_sweep(variant: str = "") -> Iterator[tuple[None, str, Mapping[str, object], str]]:
    check_variant(variant, CONFIGS)
    config = CONFIGS[variant]
    every = {} if variant else EVERY_STEP
    for row, (number, flops) in TOP_KAST.items():
        yield None, f"{config}:{row}", every, _reported(f"{number:.2f}", flops, "figure 2a")
    for row, (accuracy, flops) in OTHERS.items():
        sparse = "" if variant or row == "dense" else ",last-sparse"
        yield None, f"{config}:{row}{sparse}", {}, _reported(accuracy, flops, "RigL, table 1")
    for row, (accuracy, flops) in ERK.items():
        own = {"method.distribution": "erk"}
        sparse = "" if variant else ",all-sparse"
        yield None, f"{config}:{row}{sparse}", own, _reported(accuracy, flops, "RigL, table 1")


def _reported(accuracy: str, flops: str, source: str) -> str:
    return f"{accuracy} %{flops and f' at {flops} FLOPs'} ({source})"
