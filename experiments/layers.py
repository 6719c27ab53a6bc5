"""The products from which every model is built.

Each of them accepts a dense array or the compact kernel of an always-sparse run, so that a model
does not depend on the representation of its parameters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from experiments.convolutions import Padding, convolution
from topkast_jax import always_sparse
from topkast_jax.always_sparse import CompactKernel, FanInKernel, with_tile
from topkast_jax.patterns import Block

Kernel = jax.Array | CompactKernel


def matmul(x: jax.Array, kernel: Kernel | FanInKernel) -> jax.Array:
    """Multiplies `x [..., inputs]` by `kernel [inputs, outputs]`: [..., outputs], in x's dtype."""
    return always_sparse.matmul(x, kernel.astype(x.dtype))


def conv(x: jax.Array, kernel: Kernel, strides: tuple[int, int], padding: Padding) -> jax.Array:
    """Convolves images with a kernel, in the dtype of `x`.

    A 1×1 kernel of blocks is applied as a block product. Any other compact kernel is convolved
    through its dense tile, which exists only while it is used.

    Args:
        x: images [batch, height, width, inputs].
        kernel: [height, width, inputs, outputs].
        strides: of the window, down and across.
        padding: zeros (above, below) and (left, right) of each image.

    Returns:
        Images [batch, height, width, outputs] of the size that strides and padding give.
    """
    if isinstance(kernel, CompactKernel) and _is_block_matrix(kernel):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        return matmul(x[:, :: strides[0], :: strides[1]], kernel)

    kernel = kernel.astype(x.dtype)
    convolve = convolution(strides, padding, pointwise=kernel.shape[:2] == (1, 1))
    if isinstance(kernel, CompactKernel):
        return with_tile(lambda tile, x: convolve(x, tile), kernel, x)
    return convolve(x, kernel)


def matmul_transposed(x: jax.Array, table: Kernel) -> jax.Array:
    """Computes `x [..., width] @ table [rows, width]ᵀ`: [..., rows], always in float32."""

    def product(tile: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.einsum("...d,vd->...v", x, tile, preferred_element_type=jnp.float32)

    table = table.astype(x.dtype)
    return with_tile(product, table, x) if isinstance(table, CompactKernel) else product(table, x)


def lookup(table: Kernel, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows `rows [...]` of `table [rows, width]`: [..., width]. Rows that do not exist are NaN.

    On a mesh, each device looks up the rows of its own part of a batch in the whole width of the
    table. Otherwise the compiler may split the result by width, and then move all of it.
    """
    if not isinstance(table, CompactKernel) and not jax.sharding.get_abstract_mesh().empty:
        table = jax.lax.with_sharding_constraint(table, P(P.UNCONSTRAINED, None))
    return always_sparse.lookup(table, rows).astype(dtype)


def vector(leaf: Kernel) -> jax.Array:
    """A vector [D], such as a bias, as a dense array [D]."""
    return with_tile(lambda tile: tile, leaf) if isinstance(leaf, CompactKernel) else leaf


def rows(table: Kernel, low: int, high: int) -> jax.Array:
    """Rows `low` to `high - 1` of `table [rows, width]` as a dense array [high - low, width]."""

    def cut(tile: jax.Array) -> jax.Array:
        return tile[low:high]

    return with_tile(cut, table) if isinstance(table, CompactKernel) else cut(table)


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """`vector [D]` as [1, …, D], with the dtype and the number of axes of `like [..., D]`."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)


def _is_block_matrix(kernel: CompactKernel) -> bool:
    return isinstance(kernel.pattern, Block) and kernel.shape[:2] == (1, 1)
