r"""x·W for a compact kernel of single entries, entry by entry on a CPU.

    y = x·W and dx = dy·Wᵀ over the forward set A, dW over the backward set B

An entry takes the time of several of a dense product's. From some density on, a set is therefore
multiplied as its dense tile (y, dx), or gathered from the dense gradient (dW).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from topkast_jax.always_sparse.kernel import CompactKernel, dense_tile
from topkast_jax.always_sparse.products import native_cpu
from topkast_jax.always_sparse.products.platforms import only_on
from topkast_jax.varying import varying_like

Alone = str | Sequence[str] | None

DENSEST_PRODUCT, DENSEST_GRADIENT = 0.25, 0.4
"""The densities of A (y, dx) and of B (dW) up to which one by one is faster (2 cores, AVX2)."""


def matmul(
    x: jax.Array,
    kernel: CompactKernel,
    shape: tuple[int, int],
    alone: Alone = None,
) -> jax.Array:
    """x·W; the gradient reaches all of B.

    Args:
      x: `[..., K]`, on one device.
      kernel: of single entries.
      shape: its `(K, N)`.
      alone: the backends that were asked for, if another platform than the CPU is to be refused.

    Returns:
      `[..., N]` in the dtype that x and the kernel promote to.

    Raises:
      SparsityError: with `alone`, where a step is lowered for another platform.
    """
    dtype = jnp.result_type(x, kernel.values)
    values, index = varying_like((kernel.values.astype(dtype), kernel.index), x)
    layout = dataclasses.replace(kernel, values=None, index=None, shape=shape)  # type: ignore[arg-type]
    y_TxN = _matmul(layout, alone, x.astype(dtype).reshape(-1, shape[0]), values, index)
    return y_TxN.reshape(*x.shape[:-1], shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(
    layout: CompactKernel, alone: Alone, x_TxK: jax.Array, values: jax.Array, index: jax.Array
) -> jax.Array:
    return _spmm(layout, alone, x_TxK, values, index, transposed=False)


def _matmul_fwd(
    layout: CompactKernel, alone: Alone, x_TxK: jax.Array, values: jax.Array, index: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _matmul(layout, alone, x_TxK, values, index), (x_TxK, values, index)


def _matmul_bwd(
    layout: CompactKernel, alone: Alone, saved: tuple[jax.Array, ...], dy_TxN: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_TxK, values, index = saved
    dx_TxK = _spmm(layout, alone, dy_TxN, values, index, transposed=True)
    return dx_TxK, _sddmm(layout, alone, x_TxK, dy_TxN, index).astype(values.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _spmm(
    layout: CompactKernel,
    alone: Alone,
    x_TxI: jax.Array,
    values: jax.Array,
    index: jax.Array,
    transposed: bool,
) -> jax.Array:
    a, width = layout.forward, layout.shape[0 if transposed else 1]

    def from_entries(x_TxI: jax.Array, values: jax.Array, index: jax.Array) -> jax.Array:
        return native_cpu.entry_spmm(x_TxI, values[:a], index[:a], width, transposed)

    def from_tile(x_TxI: jax.Array, values: jax.Array, index: jax.Array) -> jax.Array:
        if transposed:  # Made again, not kept from the forward pass.
            values, index = lax.optimization_barrier((values, index))
        tile = dense_tile(dataclasses.replace(layout, values=values, index=index))
        return jnp.matmul(x_TxI, tile.T if transposed else tile)

    sparse = a <= _most(layout, DENSEST_PRODUCT)
    return _run(sparse and a > 0, alone, from_entries, from_tile, x_TxI, values, index)


def _sddmm(
    layout: CompactKernel, alone: Alone, x_TxK: jax.Array, dy_TxN: jax.Array, index: jax.Array
) -> jax.Array:
    def from_entries(x_TxK: jax.Array, dy_TxN: jax.Array, index: jax.Array) -> jax.Array:
        entries = native_cpu.entry_sddmm(x_TxK, dy_TxN, index, layout.forward)
        return entries.astype(x_TxK.dtype)

    def from_dense(x_TxK: jax.Array, dy_TxN: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.matmul(x_TxK.T, dy_TxN).reshape(-1)[index]

    sparse = index.shape[0] <= _most(layout, DENSEST_GRADIENT)
    return _run(sparse, alone, from_entries, from_dense, x_TxK, dy_TxN, index)


def _most(layout: CompactKernel, density: float) -> int:
    """The number of entries at a density; methods round theirs as well."""
    return math.ceil(density * math.prod(layout.shape))


def _run(sparse: bool, alone: Alone, one_by_one: Any, dense: Any, *arrays: jax.Array) -> jax.Array:
    """One of two ways; what is lowered for another platform is dense, and so is what is empty."""
    *others, index = arrays
    if alone is not None:
        index = only_on(index, alone, ("cpu",))
    if not sparse or 0 in (arrays[0].shape[0], index.shape[0]):
        result: jax.Array = dense(*others, index)
        return result
    return lax.platform_dependent(*others, index, cpu=one_by_one, default=dense)
