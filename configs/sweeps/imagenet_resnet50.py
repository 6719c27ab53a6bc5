"""ResNet-50 on ImageNet: dense, Top-KAST at five densities, fixed random masks.

The paper's setting; the expected numbers are in configs/imagenet_resnet50.py.
Hardware: a TPU slice or a machine of 8 GPUs for each run.

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
