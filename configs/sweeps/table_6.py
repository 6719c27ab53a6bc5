"""Table 6: the steps between refreshes.

The numbers are top-1 % on ImageNet [V], with sets chosen in every step and every 100 of 32,000
steps. `:small` is CIFAR-10 with the small ResNet: every 1, 10, 50 and 100 of 5,000 steps.

Hardware: a TPU slice or a machine of 8 GPUs for each run, not tried on any: an estimated 13
chip-hours of TPU v5e for 32,000 steps (docs/reproducing.md). `:small` one CPU core, 4 to 13 minutes
for 5,000 steps, more with other work on the machine.

Command:
    python -m experiments.sweep --config=configs/sweeps/table_6.py:small --workdir=runs/images
"""

from collections.abc import Iterator, Mapping

from experiments.config import check_variant

CONFIGS = {"": "configs/imagenet_resnet50.py", "small": "configs/cifar10_small.py"}

REPORTED = {"80/50": (75.03, 75.14), "90/80": (73.03, 73.18), "95/90": (70.42, 70.38)}


def get_sweep(variant: str = "") -> Iterator[tuple[None, str, Mapping[str, object], str]]:
    check_variant(variant, CONFIGS)
    config = CONFIGS[variant]
    for row, (always, every_100) in REPORTED.items():
        yield None, f"{config}:{row}", {"method.refresh_every": 1}, f"{always} % (table 6)"
        if variant == "small":
            yield None, f"{config}:{row}", {"method.refresh_every": 10}, ""
            yield None, f"{config}:{row}", {}, ""
            own = {"method.refresh_every": 100}
            yield None, f"{config}:{row}", own, f"{every_100} % (table 6)"
        else:
            yield None, f"{config}:{row}", {}, f"{every_100} % (table 6)"
