"""A feed-forward stack K → H → K with a ReLU: the time of its products and of its training step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import device_clock
from experiments.benchmarks.memory import memory
from experiments.benchmarks.random_blocks import random_array, random_kernel
from topkast_jax import Block, Unstructured
from topkast_jax.always_sparse import CompactKernel, matmul, options

LEARNING_RATE = 0.1
PARTS = ("y", "dx", "dw", "step")
Kernel = jax.Array | CompactKernel


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a stack."""

    features: int
    hidden: int
    tokens: int
    dtype: str

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Those of the two kernels."""
        return (self.features, self.hidden), (self.hidden, self.features)

    def flops(self, part: str) -> int:
        """Of a part where it is dense, two for a multiply-add; the step has three products."""
        product = 2 * 2 * self.tokens * self.features * self.hidden
        return 3 * product if part == "step" else product


def limit(part: str, forward: float, backward: float) -> float:
    """The share of the dense multiplications that is left at these densities."""
    shares = {"dw": backward, "step": (2 * forward + backward) / 3}
    return shares.get(part, forward)


def dense_kernels(sizes: Sizes) -> tuple[jax.Array, ...]:
    """Both layers' kernels."""
    return tuple(
        random_array(seed, shape, sizes.dtype, shape[0] ** -0.5)
        for seed, shape in enumerate(sizes.shapes)
    )


def sparse_kernels(
    sizes: Sizes, pattern: Block | Unstructured, densities: tuple[float, float]
) -> tuple[CompactKernel, ...]:
    """Both layers' kernels."""
    return tuple(
        random_kernel(seed, shape, pattern, densities, sizes.dtype)
        for seed, shape in enumerate(sizes.shapes)
    )


def times(
    sizes: Sizes, kernels: tuple[Any, ...], backend: str, interpret: bool, repeats: int
) -> dict[str, Any]:
    """The time of each of `PARTS`, and the memory of a step.

    The products y = x·W, dx = dy·Wᵀ and dW are those of both layers, each by itself. A step is a
    forward pass, a backward pass to parameters and input, and SGD.

    Args:
        sizes: of the stack.
        kernels: both layers', dense or compact.
        backend: of compact kernels.
        interpret: Pallas kernels are interpreted.
        repeats: runs of each.
    """
    inputs = [
        random_array(seed, (sizes.tokens, features), sizes.dtype)
        for seed, features in enumerate((sizes.features, sizes.hidden, sizes.features))
    ]
    values = [values_of(kernel) for kernel in kernels]
    row: dict[str, Any] = {}
    clocks = set()
    for part in PARTS:
        function, arguments, donated = (
            (step, (values, inputs[0], kernels), (0,))
            if part == "step"
            else (functools.partial(_of_both, PRODUCTS[part]), (inputs, kernels), ())
        )
        with options(backend, interpret=interpret and backend != "xla"):
            # A function of its own: what is traced already keeps its options.
            traced = jax.jit(lambda *args, f=function: f(*args), donate_argnums=donated)
            lowered = traced.lower(*arguments)
        compiled = lowered.compile()
        run = training(compiled, *arguments) if part == "step" else _calling(compiled, *arguments)
        timing = device_clock.measure(run, repeats)
        row[part] = timing.seconds
        clocks.add(timing.clock)
        if part == "step":
            row["memory"] = memory(compiled)
    return row | {"clock": "/".join(sorted(clocks))}


def _calling(compiled: Any, *arguments: Any) -> Callable[[], Any]:
    return lambda: compiled(*arguments)


def training(step: Any, values: Any, x: jax.Array, kernels: Any) -> Callable[[], Any]:
    """Steps on a copy of the values, one after another.

    Args:
        step: what `step` is compiled to, its values donated.
        values: those of the kernels.
        x: the input.
        kernels: both layers'.
    """
    held = [jax.tree.map(jnp.copy, values)]

    def run() -> Any:
        held[0], dx = step(held[0], x, kernels)
        return held[0], dx

    return run


def y(x: jax.Array, dy: jax.Array, kernel: Kernel) -> jax.Array:
    """x·W; dy is not read."""
    return matmul(x, kernel)


def dx(x: jax.Array, dy: jax.Array, kernel: Kernel) -> jax.Array:
    """dy·Wᵀ."""
    return jax.vjp(lambda x: matmul(x, kernel), x)[1](dy)[0]


def dw(x: jax.Array, dy: jax.Array, kernel: Kernel) -> jax.Array:
    """xᵀ·dy, on the backward set if the kernel is compact."""
    product = lambda values: matmul(x, _with(kernel, values))  # noqa: E731
    return jax.vjp(product, values_of(kernel))[1](dy)[0]


PRODUCTS: Mapping[str, Callable[[jax.Array, jax.Array, Kernel], jax.Array]] = {
    "y": y,
    "dx": dx,
    "dw": dw,
}


def _of_both(product: Callable[..., jax.Array], inputs: list[jax.Array], kernels: Any) -> Any:
    return [product(*each) for each in zip(inputs[:2], inputs[1:], kernels, strict=True)]


def values_of(kernel: Kernel) -> jax.Array:
    """What is trained of a kernel."""
    values: jax.Array = kernel.values if isinstance(kernel, CompactKernel) else kernel
    return values


def _with(kernel: Kernel, values: jax.Array) -> Kernel:
    return kernel.with_values(values) if isinstance(kernel, CompactKernel) else values


def _loss(values: Any, x: jax.Array, kernels: Any) -> jax.Array:
    first, second = map(_with, kernels, values)
    y = matmul(jax.nn.relu(matmul(x, first)), second)
    return 0.5 * jnp.mean(jnp.square(y), dtype=jnp.float32)


def step(values: Any, x: jax.Array, kernels: Any) -> Any:
    """Forward, backward to parameters and input, and SGD: the new values, and the gradient of x.

    The kernels are an argument, so that their indices are not compiled in as constants.
    """
    grads, dx = jax.grad(_loss, (0, 1))(values, x, kernels)
    return jax.tree.map(lambda v, g: v - LEARNING_RATE * g, values, grads), dx
