"""Every method of the paper's comparison on CIFAR-10, at 90 % and 95 % sparsity.

It reproduces no row of the paper, which has no results on CIFAR-10; docs/methods.md has its
results.

Hardware: a CPU core; the dense run took 261 s on an idle one (2026-11-29).

Command:
    python -m experiments.sweep --config=configs/sweeps/cifar10_methods.py --workdir=runs/methods
"""

from collections.abc import Iterator

METHODS = ("static_random", "set", "rigl", "snfs", "snip", "dnw", "pruning", "srigl")
BACKWARD = {"90": "80", "95": "90"}  # In percent, of Top-KAST.


def get_sweep() -> Iterator[tuple[str, str, dict[str, object]]]:
    yield "dense", "configs/cifar10_small.py:dense", {}
    for sparsity, backward in BACKWARD.items():
        top_kast = f"configs/cifar10_small.py:{sparsity}/{backward},last-sparse"
        yield f"top_kast_{sparsity}", top_kast, {}
        yield f"top_kast_random_{sparsity}", top_kast, {"method.exploration_set": "random"}
        for method in METHODS:
            yield (
                f"{method}_{sparsity}",
                f"configs/cifar10_small.py:{method}-{sparsity},last-sparse",
                {},
            )
        pruning = f"configs/cifar10_small.py:pruning-{sparsity},last-sparse"
        yield f"pruning_global_{sparsity}", pruning, {"method.ranking": "global"}
        yield (
            f"small_dense_{sparsity}",
            f"configs/cifar10_small.py:small-dense-{sparsity},last-sparse",
            {},
        )
