"""A trained model's forward set in the forms that other code takes."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.always_sparse.kernel import (
    CompactKernel,
    from_masks,
    is_compact,
    split_units,
    to_dense,
)
from topkast_jax.errors import SparsityError
from topkast_jax.flags import unpack
from topkast_jax.patterns import Unstructured
from topkast_jax.sets import forward_params, map_flags

if TYPE_CHECKING:  # Importing it, and SciPy with it, takes a third of a second.
    from jax.experimental.sparse import BCOO, BCSR

Form = Literal["dense", "compact", "bcoo", "bsr"]
FORMS: tuple[str, ...] = get_args(Form)


def export(params: Any, state: Any, form: Form = "compact") -> Any:
    """What the network runs on (the paper's α).

    Args:
      params: the tree that was trained: of values, or, of a masked run, of dense arrays.
      state: its optimizer state. Masks say nothing of blocks or stacked layers: the sparse leaves
        of a masked run are exported as single entries of one leaf each.
      form: of sparse leaves; dense leaves are NumPy arrays in each.
        "dense": NumPy arrays, zero outside A.
        "compact": `CompactKernel`s that hold A alone.
        "bcoo": `jax.experimental.sparse.BCOO` of the leaf's shape, stacked axes as batch.
        "bsr": `jax.experimental.sparse.BCSR` of blocks, shape `[R, C, rows, cols]` with two dense
          axes (`[R, C]` for single entries), stacked axes as batch; all axes of a kernel but its
          last are rows of one matrix.

    Returns:
      A tree of the structure of `params`: NumPy arrays on the host, and in "bcoo" and "bsr", which
      hold JAX's, arrays on its default device.

    Raises:
      SparsityError: no such form, or `state` holds no sets.
    """
    if form not in FORMS:
        raise SparsityError(f"form={form!r}: must be one of {', '.join(FORMS)}")
    make = {"dense": to_dense, "compact": lambda k: k, "bcoo": to_bcoo, "bsr": to_bsr}[form]
    return jax.tree.map(
        lambda leaf: make(leaf) if is_compact(leaf) else np.asarray(leaf),
        forward_set(params, state),
        is_leaf=is_compact,
    )


def forward_set(params: Any, state: Any) -> Any:
    """The tree with a compact kernel that holds A alone in place of each sparse leaf."""
    view = forward_params(params, state)
    if any(map(is_compact, jax.tree.leaves(view, is_leaf=is_compact))):
        return jax.tree.map(lambda x: _trim(x) if is_compact(x) else x, view, is_leaf=is_compact)

    def kernel(flags: Any, theta: jax.Array) -> Any:
        if flags is None:
            return theta
        kept = np.asarray(unpack(flags).forward)
        return from_masks(np.asarray(theta), kept, kept, Unstructured())

    return map_flags(kernel, params, state)


def _trim(kernel: CompactKernel) -> CompactKernel:
    axis, a = kernel.index.ndim, kernel.forward
    values: Any = np.asarray(kernel.values)[(slice(None),) * (axis - 1) + (slice(a),)]
    index: Any = np.asarray(kernel.index)[..., :a]
    return dataclasses.replace(kernel, values=values, index=index)


def to_bcoo(kernel: CompactKernel) -> BCOO:
    """The units of a kernel as single entries of its dense shape.

    Args:
      kernel: of one leaf, or of a stack `[S, …]`. All units that it holds are taken: those of B, or
        of A alone if it comes from `export`.

    Returns:
      A BCOO of shape `[*S, *kernel.shape]`, the stacked axes as batch axes. Its data
      `[*S, entries]` and int32 indices `[*S, entries, len(kernel.shape)]` are in the order of the
      units.
    """
    from jax.experimental.sparse import BCOO

    values, index = np.asarray(kernel.values), np.asarray(kernel.index)
    stack = index.shape[:-1]
    entries = _entries(kernel, index)
    places = np.stack(np.unravel_index(entries, kernel.shape), axis=-1).astype(np.int32)
    data = values.reshape(*stack, -1)
    return BCOO((jax.numpy.asarray(data), jax.numpy.asarray(places)), shape=(*stack, *kernel.shape))


def _entries(kernel: CompactKernel, index: np.ndarray) -> np.ndarray:
    """Row-major numbers `[..., entries]` of the entries of units `[..., units]`."""
    if not kernel.pattern.unit_shape:
        return index
    numbers = np.arange(math.prod(kernel.shape)).reshape(kernel.shape)
    entries: np.ndarray = split_units(numbers, kernel.pattern)[index]
    return entries.reshape(*index.shape[:-1], -1)


def to_bsr(kernel: CompactKernel) -> BCSR:
    """The units of a kernel as a matrix of blocks in compressed rows.

    Args:
      kernel: of one leaf, or of a stack `[S, …]`. All units that it holds are taken: those of B, or
        of A alone if it comes from `export`.

    Returns:
      A BCSR of shape `[*S, R, C, rows, cols]` with the stacked axes as batch axes and the axes of a
      block as dense axes; `[*S, R, C]` for single entries. C is the last axis of the grid of units,
      and R is the product of the others. The columns of a row are ascending.
    """
    from jax.experimental.sparse import BCSR

    index = np.asarray(kernel.index)
    order = np.argsort(index, axis=-1, kind="stable")
    index = np.take_along_axis(index, order, axis=-1)
    values = np.asarray(kernel.values)
    order = order.reshape(*order.shape, *(1,) * (values.ndim - order.ndim))
    values = np.take_along_axis(values, order, axis=index.ndim - 1)
    *lead, across = kernel.pattern.grid(kernel.shape)
    down = math.prod(lead)
    row, column = np.divmod(index, across)
    counts = np.apply_along_axis(np.bincount, -1, row, minlength=down)
    starts = np.concatenate([np.zeros_like(counts[..., :1]), np.cumsum(counts, -1)], -1)
    shape = (*index.shape[:-1], down, across, *values.shape[index.ndim :])
    columns, indptr = column.astype(np.int32), starts.astype(np.int32)
    arrays = (jnp.asarray(values), jnp.asarray(columns), jnp.asarray(indptr))
    return BCSR(arrays, shape=shape)
