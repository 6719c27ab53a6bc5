"""ResNet-50 on ImageNet: dense, the paper's five Top-KAST densities, fixed random masks.

Reproduces the paper's comparison of forward and backward sparsity (section 4.1) beside the RigL
paper's dense and static rows; expected numbers are in configs/imagenet_resnet50.py.
Hardware: a TPU v3-32 or 8 GPUs of 80 GB for each run.

Command:
    python -m experiments.sweep --config=configs/sweeps/imagenet_resnet50.py --workdir=DIR --slurm
"""

from collections.abc import Iterator

VARIANTS = {
    "dense": "dense",
    "top_kast_80_50": "80/50",
    "top_kast_80_80": "80/80",
    "top_kast_90_80": "90/80",
    "top_kast_95_90": "95/90",
    "top_kast_98_90": "98/90",
    "static_80": "static-80",
    "static_90": "static-90",
}


def get_sweep() -> Iterator[tuple[str, str, dict[str, object]]]:
    for name, variant in VARIANTS.items():
        yield name, f"configs/imagenet_resnet50.py:{variant}", {}
