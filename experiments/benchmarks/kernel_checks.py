"""Whether Pallas kernels on a device give what the XLA path gives, forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.random_blocks import random_array, random_kernel
from topkast_jax import Block
from topkast_jax.always_sparse import CompactKernel, matmul, options

TOLERANCES = {"bfloat16": 1e-2, "float32": 2e-3}
"""Largest error over the largest entry. In float32 it is TF32's: both round the factors to it."""
_DENSITIES = (0.1, 0.2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A product and its gradient, with blocks that leave a row and a column of the grid empty.

    Attributes:
        shape: K and N.
        tokens: rows of x; odd numbers leave a part of the last tile empty.
        block: rows and columns of a block.
        dtype: of x and of the values, "bfloat16" or "float32".
    """

    shape: tuple[int, int]
    tokens: int
    block: int
    dtype: str

    def __str__(self) -> str:
        k, n = self.shape
        return f"check {k}x{n} block {self.block} {self.dtype} tokens {self.tokens}"


def cases(shape: tuple[int, int], tokens: tuple[int, ...], blocks: tuple[int, ...]) -> list[Case]:
    """All of them, at both dtypes."""
    return [Case(shape, t, b, dtype) for t in tokens for b in blocks for dtype in TOLERANCES]


def check(case: Case, backend: str, interpret: bool) -> dict[str, Any]:
    """Compares the kernels of a backend with XLA's products in full precision.

    Args:
        case: what is computed.
        backend: of the kernels.
        interpret: they are interpreted.

    Returns:
        The case; the errors "y", "dx" and "dw", each the largest one over the largest entry; the
        tolerance; and whether no error is larger ("ok").
    """
    kernel = random_kernel(
        0, case.shape, Block(case.block, case.block), _DENSITIES, case.dtype, True
    )
    x, dy = (
        random_array(seed, (case.tokens, features), case.dtype)
        for seed, features in enumerate(case.shape)
    )
    # Each has a function of its own: what is compiled already keeps its options.
    with options(backend, interpret=interpret):
        found = jax.jit(lambda *args: _products(*args))(x, kernel, dy)
    with options("xla"), jax.default_matmul_precision("highest"):
        expected = jax.jit(lambda *args: _products(*args))(x, kernel, dy)
    names = ("y", "dx", "dw")
    errors = dict(zip(names, map(float, _errors(found, expected)), strict=True))
    tolerance = TOLERANCES[case.dtype]
    return {
        **dataclasses.asdict(case),
        **{name: float(f"{error:.2e}") for name, error in errors.items()},
        "tolerance": tolerance,
        "ok": all(error <= tolerance for error in errors.values()),  # False for NaN.
    }


def _products(x: jax.Array, kernel: CompactKernel, dy: jax.Array) -> Any:
    y, vjp = jax.vjp(lambda x, values: matmul(x, kernel.with_values(values)), x, kernel.values)
    return y, *vjp(dy)


@jax.jit
def _errors(found: Any, expected: Any) -> list[jax.Array]:
    def pairs() -> Iterator[tuple[jax.Array, jax.Array]]:
        for one, other in zip(found, expected, strict=True):
            yield one.astype(jnp.float32), other.astype(jnp.float32)

    return [jnp.abs(one - other).max() / jnp.abs(other).max() for one, other in pairs()]
