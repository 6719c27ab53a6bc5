"""Figure 3: how much the forward set changes, and how much of the reservoir ever enters it.

The paper's run is 80/50 with sets chosen in every step. Its numbers are read off the vector figure
[F]: the share of units that differ between step t and t + 5,000, in percent, at t = 0, 5,000, …,
30,000, over layers (mean; least; most), and the share of the reservoir that came into the forward
set (mean). Here the last pair ends with the run, at step 32,000. `:small` is CIFAR-10 with the
small ResNet, with the same number of pairs. The report has them in its table and its figure `sets`,
with the share of the first reservoir that was active up to then.

Hardware: a TPU slice or a machine of 8 GPUs, not tried on any: an estimated 13 chip-hours of TPU
v5e (docs/reproducing.md). `:small` one CPU core, 4 to 13 minutes, more with other work on the
machine.

Command:
    python -m experiments.sweep --config=configs/sweeps/figure_3.py:small --workdir=runs/images
"""

from collections.abc import Iterator, Mapping

from experiments.config import check_variant

CONFIGS = {"": "configs/imagenet_resnet50.py", "small": "configs/cifar10_small.py"}
EVERY = {"": 5_000, "small": 781}
REPORTED = (
    "differ 30.6, 21.2, 15.9, 13.6, 10.1, 3.0, .3 % (least 28.4, 4.1, .5, .5, .3, .1, 0; "
    "most 31.3, 23.7, 18.9, 16.6, 12.5, 3.8, .4); woken 4.7, 3.5, 2.5, 2.1, 1.6, .2, 0 %; "
    "about 5 % of the first reservoir ever wake (figure 3)"
)


def get_sweep(variant: str = "") -> Iterator[tuple[None, str, Mapping[str, object], str]]:
    check_variant(variant, CONFIGS)
    own = {"method.refresh_every": 1, "write_sets_every": EVERY[variant]}
    yield None, f"{CONFIGS[variant]}:80/50", own, REPORTED
    yield None, f"{CONFIGS[variant]}:80/50", {"write_sets_every": EVERY[variant]}, ""
