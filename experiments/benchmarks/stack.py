"""A feed-forward stack K → H → K with a ReLU: the time of its products and of its training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import device_clock
from experiments.benchmarks.memory import memory
from experiments.benchmarks.random_blocks import random_array, random_kernel
from topkast_jax.always_sparse import CompactKernel, matmul, options

LEARNING_RATE = 0.1
PARTS = ("y", "dx", "dw", "step")


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
    sizes: Sizes, block: int, densities: tuple[float, float]
) -> tuple[CompactKernel, ...]:
    """Both layers' kernels."""
    return tuple(
        random_kernel(seed, shape, (block, block), densities, sizes.dtype)
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
    values = [k.values if isinstance(k, CompactKernel) else k for k in kernels]
    row: dict[str, Any] = {}
    clocks = set()
    for part in PARTS:
        function, arguments, donated = (
            (_step, (values, inputs[0], kernels), (0,))
            if part == "step"
            else (_PRODUCTS[part], (inputs, kernels), ())
        )
        with options(backend, interpret=interpret and backend != "xla"):
            # A function of its own: what is traced already keeps its options.
            traced = jax.jit(lambda *args, f=function: f(*args), donate_argnums=donated)
            lowered = traced.lower(*arguments)
        compiled = lowered.compile()
        run = _training(compiled, *arguments) if part == "step" else _calling(compiled, *arguments)
        timing = device_clock.measure(run, repeats)
        row[part] = timing.seconds
        clocks.add(timing.clock)
        if part == "step":
            row["memory"] = memory(compiled)
    return row | {"clock": "/".join(sorted(clocks))}


def _calling(compiled: Any, *arguments: Any) -> Callable[[], Any]:
    return lambda: compiled(*arguments)


def _training(compiled: Any, values: Any, x: jax.Array, kernels: Any) -> Callable[[], Any]:
    """Steps on a copy of the values, one after another."""
    held = [jax.tree.map(jnp.copy, values)]

    def run() -> Any:
        held[0], dx = compiled(held[0], x, kernels)
        return held[0], dx

    return run


def _forward(inputs: list[jax.Array], kernels: Any) -> Any:
    return [matmul(x, kernel) for x, kernel in zip(inputs[:2], kernels, strict=True)]


def _input_gradients(inputs: list[jax.Array], kernels: Any) -> Any:
    return [
        jax.vjp(lambda x, kernel=kernel: matmul(x, kernel), x)[1](dy)
        for x, dy, kernel in zip(inputs[:2], inputs[1:], kernels, strict=True)
    ]


def _kernel_gradients(inputs: list[jax.Array], kernels: Any) -> Any:
    return [
        jax.vjp(lambda values, x=x, kernel=kernel: matmul(x, _with(kernel, values)), _of(kernel))[
            1
        ](dy)
        for x, dy, kernel in zip(inputs[:2], inputs[1:], kernels, strict=True)
    ]


_PRODUCTS: dict[str, Callable[..., Any]] = {
    "y": _forward,
    "dx": _input_gradients,
    "dw": _kernel_gradients,
}


def _of(kernel: Any) -> jax.Array:
    values: jax.Array = kernel.values if isinstance(kernel, CompactKernel) else kernel
    return values


def _with(kernel: Any, values: jax.Array) -> Any:
    return kernel.with_values(values) if isinstance(kernel, CompactKernel) else values


def _loss(values: Any, x: jax.Array, kernels: Any) -> jax.Array:
    first, second = map(_with, kernels, values)
    y = matmul(jax.nn.relu(matmul(x, first)), second)
    return 0.5 * jnp.mean(jnp.square(y), dtype=jnp.float32)


# The kernels are an argument, so that their indices are not compiled in as constants.
def _step(values: Any, x: jax.Array, kernels: Any) -> Any:
    grads, dx = jax.grad(_loss, (0, 1))(values, x, kernels)
    return jax.tree.map(lambda v, g: v - LEARNING_RATE * g, values, grads), dx
