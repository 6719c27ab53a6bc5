"""The RigL repository's numbers for a Wide ResNet-22-2 on CIFAR-10, at 50 to 95 % sparsity.

The numbers are accuracies that RigL's first author gives in issue 8 of its repository [V], all with
Erdős–Rényi–Kernel densities. From its `cifar_resnet` are: 97,656 steps (250 epochs) of 128 images,
learning rate 0.1 divided by 5 every 30,000 steps, Nesterov momentum 0.9, L2 5e-4, the first layer
dense, the last one not, sets until step 75,000, pruning every 1,000 steps from 20,000 to 75,000.
Three things differ: it has a dropout of 0.3 inside the blocks, normalises each image by its own
mean and deviation, and pads images with mirrored pixels where crops here are padded with zeros.

Hardware: one GPU, not tried on any. On two CPU cores a step of RigL at 90 % took 1.3 s in 120 steps
(2026-11-30), which makes 35 hours a run.

Command:
    python -m experiments.sweep --config=configs/sweeps/rigl_cifar10.py --workdir=runs/wide
"""

from collections.abc import Iterator, Mapping

CONFIG = "configs/cifar10_resnet20.py"
RECIPE: Mapping[str, object] = {
    "model.name": "wrn_22_2",
    "steps": 97_656,
    "optimizer.nesterov": True,
    "optimizer.l2": 5e-4,
    "optimizer.schedule.warmup_steps": 0,
    "optimizer.schedule.boundaries": (30_000, 60_000, 90_000),
    "optimizer.schedule.factor": 0.2,
    "optimizer.schedule.reference_steps": 97_656,
}
OWN: Mapping[str, Mapping[str, object]] = {
    "rigl": {"method.last_choice_at": 75_000},
    "static": {},
    "pruning": {
        "method.begin_at": 20_000, "method.end_at": 75_000, "method.refresh_every": 1_000
    },
}  # fmt: skip
# By sparsity in percent.
REPORTED = {
    "rigl": {50: 0.942, 80: 0.936, 90: 0.929, 95: 0.918},
    "static": {50: 0.941, 80: 0.929, 90: 0.915, 95: 0.890},
    "pruning": {50: 0.940, 80: 0.936, 90: 0.933, 95: 0.923},
}


def get_sweep() -> Iterator[tuple[str, str, Mapping[str, object], str]]:
    for method, reported in REPORTED.items():
        own = {"method.distribution": "erk", **OWN[method]}
        for sparsity, accuracy in reported.items():
            row = f"{method}-{sparsity}"
            told = f"{accuracy:.3f} accuracy (RigL repository, issue 8)"
            yield f"wrn-{row}", f"{CONFIG}:{row}", {**RECIPE, **own}, told
