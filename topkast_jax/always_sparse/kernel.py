r"""The compact kernel: what the device holds of a sparse leaf, its backward set B and nothing else.

`values` are the units of B (single entries, or blocks), those of the forward set A first; `index`
holds their indices in the dense leaf. A compact kernel takes the place of a dense one in a tree of
parameters: it is a pytree, so it passes through `jit`, `scan` (stacked over layers) and `astype`
like an array.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from topkast_jax.errors import SparsityError
from topkast_jax.patterns import Pattern, units_in
from topkast_jax.serialization import serializable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompactKernel:
    r"""The backward set of one leaf, or of a stack of leaves of the same shape.

    Attributes:
      values: `[..., b]` for single entries, `[..., b, rows, cols]` for blocks; the first `forward`
        of the b units are those of A, which the layer computes with.
      index: int32 `[..., b]`, row-major number of each unit in the leaf's grid of units; ascending
        within A and within B\A.
      shape: the dense shape of one leaf (without the axis it is stacked over).
      pattern: what is kept together: single entries or a `Block(rows, cols)`.
      forward: how many units A has.
    """

    values: jax.Array
    index: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    pattern: Pattern = dataclasses.field(metadata={"static": True})
    forward: int = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def backward(self) -> int:
        """How many units B has."""
        return self.index.shape[-1]

    def astype(self, dtype: DTypeLike) -> CompactKernel:
        """The same kernel, values in another dtype (gradients flow through the cast)."""
        return self.with_values(self.values.astype(dtype))

    def with_values(self, values: jax.Array) -> CompactKernel:
        """The same units with other values."""
        return dataclasses.replace(self, values=values)


serializable(
    CompactKernel,
    ("values", "index"),
    lambda kernel, arrays: dataclasses.replace(kernel, **arrays),
)


def is_compact(x: object) -> bool:
    """Whether `x` is a compact kernel; serves as `is_leaf` of `jax.tree.map`."""
    return isinstance(x, CompactKernel)


def values_of(params: Any) -> Any:
    """What the optimizer sees: the tree with each compact kernel replaced by its values."""
    return jax.tree.map(lambda p: p.values if is_compact(p) else p, params, is_leaf=is_compact)


def with_values(params: Any, values: Any) -> Any:
    """The inverse of `values_of`: `params` with new values and the same indices."""
    return jax.tree.map(
        lambda p, v: p.with_values(v) if is_compact(p) else v, params, values, is_leaf=is_compact
    )


def _with_arrays(kernel: CompactKernel, values: Any, index: Any) -> CompactKernel:
    return dataclasses.replace(kernel, values=values, index=index)


def matrix_shape(kernel: CompactKernel) -> tuple[int, int]:
    """`(K, N)` of a kernel that is one matrix, axes of length 1 in front allowed."""
    if len(kernel.shape) < 2 or math.prod(kernel.shape[:-2]) != 1:
        raise SparsityError(f"a matrix product needs a kernel [K, N], found shape {kernel.shape}")
    return kernel.shape[-2], kernel.shape[-1]


def check_single(kernel: CompactKernel) -> None:
    """Raises SparsityError if the kernel is a stack of layers, or no kernel at all."""
    if kernel.index.ndim != 1:
        raise SparsityError(
            f"a stack of {kernel.index.shape[:-1]} kernels of shape {kernel.shape}: must be one of "
            "them, as inside lax.scan or vmap"
        )
    units, (b,) = kernel.values.shape, kernel.index.shape
    if units[:1] != (b,) or not 0 <= kernel.forward <= b:
        raise SparsityError(
            f"a compact kernel of values {units}, an index of {b} and a forward set of "
            f"{kernel.forward}: must have a value for each index, and A inside B"
        )


def units_of(dense: Any, pattern: Pattern) -> Any:
    """A dense leaf by units, `[*grid]` or `[*grid, rows, cols]`; of a NumPy array, a view of it."""
    if not pattern.unit_shape:
        return dense
    (*lead, across), (rows, cols) = pattern.grid(dense.shape), pattern.unit_shape
    return dense.reshape(*lead, rows, across, cols).swapaxes(-3, -2)


def split_units(dense: Any, pattern: Pattern) -> Any:
    """The units of a dense leaf in row-major order, `[n]` or `[n, rows, cols]`; NumPy or traced."""
    return units_of(dense, pattern).reshape(-1, *pattern.unit_shape)


def join_units(flat: Any, shape: tuple[int, ...], pattern: Pattern) -> Any:
    """The inverse of `split_units`: all units of a leaf, as a dense leaf of that shape."""
    if not pattern.unit_shape:
        return flat.reshape(shape)
    split = flat.reshape(*pattern.grid(shape), *pattern.unit_shape)
    return split.swapaxes(-3, -2).reshape(shape)


def from_masks(
    dense: np.ndarray,
    forward: np.ndarray,
    backward: np.ndarray,
    pattern: Pattern,
    stacked: bool = False,
) -> CompactKernel:
    """The compact kernel of a dense leaf, on the host.

    Args:
      dense: the leaf, or with `stacked` an array of leaves `[L, *shape]`.
      forward: bool array of its shape, True on A.
      backward: bool array of its shape, True on B, a superset of A.
      pattern: what is kept together; a block belongs to a set whole or not at all.
      stacked: every layer then keeps the same number of units.

    Returns:
      The kernel, A first; NumPy arrays inside.

    Raises:
      SparsityError: stacked layers keep different numbers, A is not inside B, or a mask keeps a
        part of a block.
    """
    dense, forward, backward = (np.asarray(x) for x in (dense, forward, backward))
    if stacked:
        layers = [from_masks(*leaf, pattern) for leaf in zip(dense, forward, backward, strict=True)]
        if len({(k.forward, k.backward) for k in layers}) != 1:
            raise SparsityError("stacked layers must keep the same number of units each")
        values, index = (np.stack([getattr(k, f) for k in layers]) for f in ("values", "index"))
        return _with_arrays(layers[0], values, index)
    in_a, in_b = (_unit_mask(mask, pattern) for mask in (forward, backward))
    if np.any(in_a & ~in_b):
        raise SparsityError("the forward set must lie inside the backward set")
    index = np.concatenate([np.flatnonzero(in_a), np.flatnonzero(in_b & ~in_a)]).astype(np.int32)
    values = split_units(dense, pattern)[index]
    return CompactKernel(values, index, dense.shape, pattern, int(in_a.sum()))  # type: ignore[arg-type]


def _unit_mask(mask: np.ndarray, pattern: Pattern) -> np.ndarray:
    kept = split_units(mask, pattern).reshape(units_in(pattern, mask.shape), -1)
    if np.any(kept.any(axis=1) != kept.all(axis=1)):
        raise SparsityError(f"the mask keeps a part of a unit of {pattern}")
    return kept.all(axis=1)


def to_masks(kernel: CompactKernel) -> tuple[np.ndarray, np.ndarray]:
    """The forward and the backward set, on the host.

    Args:
      kernel: of one leaf or of a stack.

    Returns:
      (forward, backward), NumPy bool arrays `[*kernel.shape]`, or `[L, *kernel.shape]` of a stack.
    """
    ones = np.ones(kernel.values.shape, bool)
    marked = kernel.with_values(ones)  # type: ignore[arg-type]
    return to_dense(marked, forward_only=True), to_dense(marked)


def to_dense(kernel: CompactKernel, forward_only: bool = False) -> np.ndarray:
    """The dense leaf on the host.

    Args:
      kernel: of one leaf or of a stack.
      forward_only: whether the array is zero outside A; otherwise it is zero outside B.

    Returns:
      A NumPy array `[*kernel.shape]`, or `[L, *kernel.shape]` of a stack, in the dtype of the
      values.
    """
    values, index = np.asarray(kernel.values), np.asarray(kernel.index)
    if index.ndim > 1:
        layers = zip(values, index, strict=True)
        return np.stack([to_dense(_with_arrays(kernel, v, i), forward_only) for v, i in layers])
    kept = kernel.forward if forward_only else kernel.backward
    flat_shape = (units_in(kernel.pattern, kernel.shape), *kernel.pattern.unit_shape)
    flat = np.zeros(flat_shape, values.dtype)
    flat[index[:kept]] = values[:kept]
    return np.asarray(join_units(flat, kernel.shape, kernel.pattern))


def dense_tile(kernel: CompactKernel, forward_only: bool = True) -> jax.Array:
    r"""The dense leaf on the device, zero outside A (or outside B), traced.

    The gradient of the values is gathered from the tile's on all of B: straight through for the
    units of B\A, which the tile does not hold.

    Args:
      kernel: one leaf's kernel, not a stack.
      forward_only: leave the units of B\A zero.

    Returns:
      An array `[*kernel.shape]`.

    Raises:
      SparsityError: it is a stack.
    """
    check_single(kernel)
    layout = _with_arrays(kernel, None, None)  # hashable: the static fields alone
    return _tile(layout, forward_only, kernel.values, kernel.index)


def with_tile(fn: Callable[..., jax.Array], kernel: CompactKernel, *args: Any) -> jax.Array:
    """`fn(tile, *args)` with the dense tile of a kernel, which is not kept for the backward pass.

    The backward pass makes the tile again. If `fn` is linear in the tile (a product, a
    convolution), the compiler drops what the backward pass does not use.

    Args:
      fn: function of the tile `[*kernel.shape]`, zero outside A, and of `args`.
      kernel: one leaf's kernel, not a stack.
      *args: further arguments of `fn`.

    Returns:
      What `fn` returns. The gradient of the values reaches all of B.

    Raises:
      SparsityError: the kernel is a stack.
    """
    return jax.checkpoint(lambda k, *rest: fn(dense_tile(k), *rest))(kernel, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tile(layout: CompactKernel, forward_only: bool, values: jax.Array, index: jax.Array) -> Any:
    kept = layout.forward if forward_only else index.shape[-1]
    flat_shape = (units_in(layout.pattern, layout.shape), *layout.pattern.unit_shape)
    flat = jnp.zeros(flat_shape, values.dtype)
    flat = flat.at[index[:kept]].set(
        values[:kept], indices_are_sorted=forward_only, unique_indices=True
    )
    return join_units(flat, layout.shape, layout.pattern)


def _tile_fwd(
    layout: CompactKernel, forward_only: bool, values: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _tile(layout, forward_only, values, index), index


def _tile_bwd(
    layout: CompactKernel, forward_only: bool, index: jax.Array, dtile: jax.Array
) -> tuple[jax.Array, None]:
    del forward_only
    return split_units(dtile, layout.pattern)[index], None


_tile.defvjp(_tile_fwd, _tile_bwd)
