"""Figure 2b: accuracy by forward and backward sparsity, and of other methods at 90 %.

The numbers are top-1 % on ImageNet, read in tables [V] or off the vector figure [F], and in the
RigL paper's table [V], where the last layer is sparse, and with ERK all layers. `:small` is
CIFAR-10 with the small ResNet, where each method has the first and the last layer dense.

Hardware: a TPU slice or a machine of 8 GPUs for each run, not tried on any: an estimated 13
chip-hours of TPU v5e for 32,000 steps (docs/reproducing.md). `:small` one CPU core, 4 to 13 minutes
for 5,000 steps, more with other work on the machine.

Command:
    python -m experiments.sweep --config=configs/sweeps/figure_2b.py:small --workdir=runs/images
"""

from collections.abc import Iterator, Mapping

from experiments.config import check_variant

CONFIGS = {"": "configs/imagenet_resnet50.py", "small": "configs/cifar10_small.py"}
# The paper's main runs choose the sets in every step.
EVERY_STEP: Mapping[str, object] = {"method.refresh_every": 1}

TOP_KAST = {
    "80/0": 75.59,
    "80/50": 75.03,
    "80/60": 74.59,
    "80/70": 74.09,
    "80/75": 73.98,
    "80/80": 72.50,
    "90/0": 74.65,
    "90/50": 73.99,
    "90/80": 73.03,
    "90/85": 72.44,
    "90/90": 69.67,
    "95/0": 71.83,
    "95/50": 71.96,
    "95/80": 71.30,
    "95/90": 70.42,
}
# Top-1 %; FLOPs of training and of inference.
OTHERS = {
    "dense": ("76.8 ± .09", "1, 1 (3.2e18 in training, 8.2e9 an image)"),
    "static-90": ("65.8 ± .04", ".10, .10"),
    "snip-90": ("67.2 ± .12", ".10, .10"),
    "small-dense-90": ("68.9 ± .10", ".12, .12"),
    "set-90": ("69.6 ± .23", ".10, .10"),
    "rigl-90": ("72.0 ± .05", ".10, .10 (.13 in its README)"),
    "rigl-90,5x": ("75.7 ± .06", ".52, .10"),
    "pruning-90": ("73.9", ".51, .10"),
    "dnw-90": ("74", ""),
}
ERK = {
    "static-90": ("67.7 ± .12", ".24, .24"),
    "rigl-90": ("73.0 ± .04", ".25, .24"),
    "snfs-90": ("72.9 ± .06", ".50, .24"),
}

# 100 epochs.
SPARSEML = {"batch_size": 400, "steps": 320_292}


def get_sweep(variant: str = "") -> Iterator[tuple[str | None, str, Mapping[str, object], str]]:
    check_variant(variant, CONFIGS)
    config = CONFIGS[variant]
    every = {} if variant else EVERY_STEP
    for row, number in TOP_KAST.items():
        yield None, f"{config}:{row}", every, f"{number:.2f} % (figure 2b)"
    for row, (accuracy, flops) in OTHERS.items():
        sparse = "" if variant or row == "dense" else ",last-sparse"
        yield None, f"{config}:{row}{sparse}", {}, _reported(accuracy, flops)
    for row, (accuracy, flops) in ERK.items():
        own = {"method.distribution": "erk"}
        sparse = "" if variant else ",all-sparse"
        yield None, f"{config}:{row}{sparse}", own, _reported(accuracy, flops)
    if not variant:
        yield "sparseml-90-80", f"{config}:90/80", SPARSEML, "72.5 % (sparseml, request 1674)"


def _reported(accuracy: str, flops: str) -> str:
    return f"{accuracy} %{flops and f' at {flops} FLOPs'} (RigL, table 1)"
