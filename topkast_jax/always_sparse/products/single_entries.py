r"""x·W for a compact kernel of single entries, entry by entry on a CPU.

    y = x·W and dx = dy·Wᵀ over the forward set A, dW over the backward set B

An entry takes the time of several of a dense product's. From some density on, a set is therefore
multiplied as its dense tile (y, dx), or gathered from the dense gradient (dW).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from topkast_jax.always_sparse.kernel import CompactKernel, dense_tile
from topkast_jax.always_sparse.products import native_cpu
from topkast_jax.varying import varying_like

DENSEST_PRODUCT, DENSEST_GRADIENT = 0.25, 0.4
"""The densities of A (y, dx) and of B (dW) up to which one by one is faster (2 cores, AVX2)."""


def matmul(x: jax.Array, kernel: CompactKernel, shape: tuple[int, int]) -> jax.Array:
    """x·W; the gradient reaches all of B.

    Args:
      x: `[..., K]`, on one device.
      kernel: of single entries.
      shape: its `(K, N)`.

    Returns:
      `[..., N]` in the dtype that x and the kernel promote to.
    """
    dtype = jnp.result_type(x, kernel.values)
    values, index = varying_like((kernel.values.astype(dtype), kernel.index), x)
    layout = dataclasses.replace(kernel, values=None, index=None, shape=shape)  # type: ignore[arg-type]
    y_TxN = _matmul(layout, x.astype(dtype).reshape(-1, shape[0]), values, index)
    return y_TxN.reshape(*x.shape[:-1], shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(
    layout: CompactKernel, x_TxK: jax.Array, values: jax.Array, index: jax.Array
) -> jax.Array:
    return _spmm(layout, x_TxK, values, index, transposed=False)


def _matmul_fwd(
    layout: CompactKernel, x_TxK: jax.Array, values: jax.Array, index: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _matmul(layout, x_TxK, values, index), (x_TxK, values, index)


def _matmul_bwd(
    layout: CompactKernel, saved: tuple[jax.Array, ...], dy_TxN: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_TxK, values, index = saved
    dx_TxK = _spmm(layout, dy_TxN, values, index, transposed=True)
    return dx_TxK, _sddmm(layout, x_TxK, dy_TxN, index).astype(values.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _spmm(
    layout: CompactKernel,
    x_TxI: jax.Array,
    values: jax.Array,
    index: jax.Array,
    transposed: bool,
) -> jax.Array:
    a, width = layout.forward, layout.shape[0 if transposed else 1]

    def from_entries(x_TxI: jax.Array, values: jax.Array, index: jax.Array) -> jax.Array:
        return native_cpu.entry_spmm(x_TxI, values[:a], index[:a], width, transposed)

    def from_tile(x_TxI: jax.Array, values: jax.Array, index: jax.Array) -> jax.Array:
        tile = dense_tile(dataclasses.replace(layout, values=values, index=index))
        return jnp.matmul(x_TxI, tile.T if transposed else tile)

    sparse = a <= _most(layout, DENSEST_PRODUCT)
    return _run(sparse and a > 0, from_entries, from_tile, x_TxI, values, index)


def _sddmm(
    layout: CompactKernel, x_TxK: jax.Array, dy_TxN: jax.Array, index: jax.Array
) -> jax.Array:
    def from_entries(x_TxK: jax.Array, dy_TxN: jax.Array, index: jax.Array) -> jax.Array:
        entries = native_cpu.entry_sddmm(x_TxK, dy_TxN, index, layout.forward)
        return entries.astype(x_TxK.dtype)

    def from_dense(x_TxK: jax.Array, dy_TxN: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.matmul(x_TxK.T, dy_TxN).reshape(-1)[index]

    sparse = index.shape[0] <= _most(layout, DENSEST_GRADIENT)
    return _run(sparse, from_entries, from_dense, x_TxK, dy_TxN, index)


def _most(layout: CompactKernel, density: float) -> int:
    """The number of entries at a density; methods round theirs as well."""
    return math.ceil(density * math.prod(layout.shape))


def _run(sparse: bool, one_by_one: Any, dense: Any, *arrays: jax.Array) -> jax.Array:
    """One of two ways; what is lowered for another platform is dense, and so is what is empty."""
    if not sparse or 0 in (arrays[0].shape[0], arrays[-1].shape[0]):
        result: jax.Array = dense(*arrays)
        return result
    return lax.platform_dependent(*arrays, cpu=one_by_one, default=dense)
