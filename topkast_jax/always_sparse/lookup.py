r"""Rows of a compact table, as an embedding reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from topkast_jax.always_sparse.kernel import CompactKernel, check_single, with_tile
from topkast_jax.errors import SparsityError


def lookup(table: jax.Array | CompactKernel, rows: ArrayLike | Sequence[Any]) -> jax.Array:
    r"""Rows of a table, as `jnp.take(table, rows, axis=0, mode="fill")`.

    Of a compact table, the rows are those of its forward set. Where fewer rows are asked for than
    the table has, they are gathered from the kernel's values, and no array of the table's dense
    size exists, neither then nor in the backward pass. Where more are asked for, the dense tile is
    the smaller array, and they are taken from it. The gradient reaches all of B.

    Args:
      table: `[V, E]`, dense or compact.
      rows: integers `[...]`, of any shape and dtype, or a list of them.

    Returns:
      `[..., E]`, in the dtype of the table; NaN in rows that do not exist.

    Raises:
      SparsityError: the table is a stack, or has another number of axes than two; the rows are no
        integers.
    """
    rows = _row_numbers(rows)
    if not isinstance(table, CompactKernel):
        return jnp.take(table, rows, axis=0, mode="fill")
    check_single(table)
    if len(table.shape) != 2:
        raise SparsityError(f"lookup needs a table [V, E], found shape {table.shape}")
    if math.prod(rows.shape) >= table.shape[0]:
        return with_tile(lambda tile, r: jnp.take(tile, r, axis=0, mode="fill"), table, rows)
    gathered = _gathered(table, rows.reshape(-1)).reshape(*rows.shape, table.shape[1])
    size = table.shape[0]
    exists = (rows >= -size) & (rows < size)  # jnp.take counts negative rows from the end
    return jnp.where(exists[..., None], gathered, jnp.nan)


def _row_numbers(rows: ArrayLike | Sequence[Any]) -> jax.Array:
    """The rows as int32, in which no sum of the search overflows.

    A number that int32 cannot hold becomes one that names no row either.
    """
    try:
        numbers = jnp.asarray(rows)
    except (TypeError, ValueError):
        raise SparsityError(
            f"lookup: rows must be integers, found a {type(rows).__name__}"
        ) from None
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise SparsityError(f"lookup: rows must be integers, found {numbers.dtype}")
    held, most = jnp.iinfo(numbers.dtype), jnp.iinfo(jnp.int32)
    return jnp.clip(numbers, max(held.min, most.min), min(held.max, most.max)).astype(jnp.int32)


def _gathered(table: CompactKernel, rows: jax.Array) -> jax.Array:
    r"""Rows `[n]` → `[n, E]`: those of A, and zeros through which B\A gets its gradient."""
    a = table.forward
    found = _part(table, table.values[:a], table.index[:a], rows)
    if table.backward == a:
        return found
    return found + _part(table, _unseen(table.values[a:]), table.index[a:], rows)


@jax.custom_jvp
def _unseen(values: jax.Array) -> jax.Array:
    """Zeros with the derivative of the values themselves, which need not be finite."""
    return jnp.zeros_like(values)


@_unseen.defjvp
def _unseen_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _unseen(*primals), tangents[0]


def _part(table: CompactKernel, values: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """The rows as units with an ascending index hold them, `[n, E]`."""
    if index.shape[0] == 0:
        return jnp.zeros((rows.shape[0], table.shape[1]), values.dtype)
    height, width = table.pattern.unit_shape or (1, 1)
    across = table.shape[1] // width
    row = jnp.where(rows < 0, rows + table.shape[0], rows)
    below = jnp.clip(row // height, 0, table.shape[0] // height - 1)
    # The units of one row of the grid are neighbours: at most `across` of them.
    first = jnp.searchsorted(index, below * across)
    last = jnp.searchsorted(index, (below + 1) * across)
    place = first[:, None] + jnp.arange(across)[None]
    inside = place < last[:, None]
    place = jnp.minimum(place, index.shape[0] - 1)
    column = jnp.where(inside, index[place] % across, across)
    units = values.reshape(-1, height, width)[place, (row % height)[:, None]]
    out = jnp.zeros((rows.shape[0], across, width), values.dtype)
    lanes = jnp.arange(rows.shape[0])[:, None]
    return out.at[lanes, column].set(units, mode="drop").reshape(-1, table.shape[1])
