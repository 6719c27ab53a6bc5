"""Kernels with constant fan-in for inference: the forward set by outputs.

Where every output has as many inputs, the forward set is a matrix `[N, F]` of values and one of
indices, and a product of few tokens gathers the inputs of each output: it reads the forward set
alone. A product of many tokens makes the dense tile once instead. `by_output` orders the units by
output, once and on the host; in training they keep the order of a `CompactKernel`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from topkast_jax.always_sparse.kernel import CompactKernel, matrix_shape
from topkast_jax.errors import SparsityError
from topkast_jax.patterns import FanIn
from topkast_jax.serialization import serializable

# Up to so many tokens times the density, gathering took less time than the tile on two cores
# (scripts/bench_fan_in.py).
FEW = 0.65


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FanInKernel:
    """The forward set of a matrix `[K, N]` whose outputs have F inputs each, or of a stack of them.

    Attributes:
      values: `[..., N, F]`.
      index: int32 `[..., N, F]`, the inputs of each output, ascending.
      inputs: K.
    """

    values: jax.Array
    index: jax.Array
    inputs: int = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        """The dtype of the values."""
        return self.values.dtype

    def astype(self, dtype: DTypeLike) -> FanInKernel:
        """The same kernel, values in another dtype."""
        return dataclasses.replace(self, values=self.values.astype(dtype))


serializable(
    FanInKernel,
    ("values", "index"),
    lambda kernel, arrays: dataclasses.replace(kernel, **arrays),
)


def by_output(kernel: CompactKernel) -> FanInKernel:
    """The forward set of a kernel with constant fan-in, for products of few tokens.

    `matmul` takes it like the kernel itself and computes the same, without B∖A. It is meant for
    inference: gradients flow to the values of the forward set only.

    Args:
      kernel: of the pattern `FanIn()`, one matrix `[K, N]` or a stack of them.

    Returns:
      A kernel with NumPy arrays `[..., N, F]`, stacked axes in front; F is the number of inputs of
      each output in the forward set.

    Raises:
      SparsityError: the kernel has another pattern, is no matrix, or its outputs have different
        numbers of inputs.
    """
    if not isinstance(kernel.pattern, FanIn):
        raise SparsityError(f"by_output takes kernels of the pattern FanIn(), not {kernel.pattern}")
    k, n = matrix_shape(kernel)
    a, stack = kernel.forward, kernel.index.shape[:-1]
    index, values = np.asarray(kernel.index)[..., :a], np.asarray(kernel.values)[..., :a]
    row, output = np.divmod(index, n)
    counts = np.apply_along_axis(np.bincount, -1, output, minlength=n)
    if counts.min() != counts.max():
        raise SparsityError(
            "by_output: every output must have as many inputs in the forward set, found "
            f"{counts.min()} to {counts.max()}"
        )
    # A is ascending, so that a stable order by output keeps the inputs of each ascending.
    order = np.argsort(output, axis=-1, kind="stable")
    shape = (*stack, n, a // n)
    row, values = (np.take_along_axis(x, order, -1).reshape(shape) for x in (row, values))
    return FanInKernel(values, row.astype(np.int32), k)  # type: ignore[arg-type]


def product(x: jax.Array, kernel: FanInKernel) -> jax.Array:
    """x·W. A product of few tokens gathers inputs; one of more tokens makes the dense tile.

    Args:
      x: `[..., K]`; the other axes together number the tokens.
      kernel: of one matrix `[K, N]`, not a stack.

    Returns:
      `[..., N]`, in the dtype that x and the kernel promote to.

    Raises:
      SparsityError: the last axis of x is not K, or the kernel is a stack.
    """
    if kernel.index.ndim != 2:
        raise SparsityError(
            f"a stack of {kernel.index.shape[:-2]} kernels: must be one of them, as inside lax.scan"
        )
    n = kernel.index.shape[0]
    if x.shape[-1:] != (kernel.inputs,):
        raise SparsityError(
            f"x of shape {x.shape} does not fit a kernel of shape {(kernel.inputs, n)}"
        )
    x_TxK = x.reshape(-1, kernel.inputs)
    y_TxN = (gathered if few(len(x_TxK), kernel) else _by_tile)(x_TxK, kernel)
    return y_TxN.reshape(*x.shape[:-1], n)


def few(tokens: int, kernel: FanInKernel) -> bool:
    """Whether a product of so many tokens gathers the inputs."""
    return tokens * kernel.index.shape[-1] <= FEW * kernel.inputs


def gathered(x_TxK: jax.Array, kernel: FanInKernel) -> jax.Array:
    """The product by a gather of each output's inputs, `[T, N]`."""
    # By a flat index, since XLA's CPU takes longer for a gather by an index of two axes.
    x_KxT = x_TxK.T.at[kernel.index.reshape(-1)]
    x_NFxT = x_KxT.get(mode="promise_in_bounds", wrap_negative_indices=False)
    x_NxFxT = x_NFxT.reshape(*kernel.index.shape, -1)
    return jnp.einsum("nft,nf->tn", x_NxFxT, kernel.values)


def _by_tile(x_TxK: jax.Array, kernel: FanInKernel) -> jax.Array:
    n = kernel.index.shape[0]
    tile = jnp.zeros((kernel.inputs, n), kernel.dtype)
    outputs = jnp.broadcast_to(jnp.arange(n)[:, None], kernel.index.shape)
    tile = tile.at[kernel.index, outputs].set(kernel.values, unique_indices=True)
    return jnp.matmul(x_TxK, tile)
