"""Exact top-K thresholds of one leaf, by counting on the bit patterns of magnitudes.

Top-KAST (section 2 of the paper) keeps, in each layer, the D * n entries of largest magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from topkast_jax.errors import SparsityError

Count = int | jax.Array


class Thresholds(NamedTuple):
    """What separates kept from dropped entries, one element a count."""

    key: jax.Array
    index: jax.Array


def keep_count(entries: int, density: float) -> int:
    """Number of entries kept at a density: max(1, floor(density * entries + 1/2))."""
    return max(1, math.floor(density * entries + 0.5))


def _keys(x: jax.Array) -> jax.Array:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise SparsityError(f"selection: dtype {x.dtype}; allowed: float32, bfloat16, float16")
    width = jnp.int32 if x.dtype.itemsize == 4 else jnp.int16
    bits = lax.bitcast_convert_type(x, width) & np.array(jnp.iinfo(width).max, width)
    return jnp.where(jnp.isnan(x), -1, bits.astype(jnp.int32))


def _row_major(shape: tuple[int, ...]) -> jax.Array:
    index = jnp.zeros(shape, jnp.int32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        index += lax.broadcasted_iota(jnp.int32, shape, axis) * np.int32(stride)
    return index


def thresholds(
    x: jax.Array, counts: Sequence[Count], start: Thresholds | None = None
) -> Thresholds:
    """Thresholds of several top-K sets of one leaf."""
    del start
    wanted = jnp.stack([jnp.asarray(c, jnp.int32) for c in counts])
    key = _keys(x)
    axes = tuple(range(x.ndim))

    def count_at_least(probe: jax.Array) -> jax.Array:
        return jnp.sum(key[..., None] >= probe, axis=axes, dtype=jnp.int32)

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        probe = low + (high - low) // 2
        enough = count_at_least(probe) >= wanted
        return jnp.where(enough, probe, low), jnp.where(enough, high, probe)

    low = jnp.full(len(counts), -1, jnp.int32)
    high = jnp.full(len(counts), 0x7F800001, jnp.int32)
    low, high = lax.fori_loop(0, 32, halve, (low, high))
    need = wanted - count_at_least(low + 1)
    index = _row_major(x.shape)

    def halve_index(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        below, above = bracket
        probe = below + (above - below) // 2
        tied = (key[..., None] == low) & (index[..., None] < probe)
        enough = jnp.sum(tied, axis=axes, dtype=jnp.int32) >= need
        return jnp.where(enough, below, probe), jnp.where(enough, probe, above)

    below = jnp.zeros(len(counts), jnp.int32)
    above = jnp.full(len(counts), x.size, jnp.int32)
    below, above = lax.fori_loop(0, 32, halve_index, (below, above))
    return Thresholds(low, above)


def keep(x: jax.Array, thresholds: Thresholds, i: int) -> jax.Array:
    """The i-th keep-mask."""
    key = _keys(x)
    edge = thresholds.key[i]
    return (key > edge) | ((key == edge) & (_row_major(x.shape) < thresholds.index[i]))


def top_k_masks(
    x: jax.Array, counts: Sequence[Count], start: Thresholds | None = None
) -> tuple[tuple[jax.Array, ...], Thresholds]:
    """Keep-masks with exactly counts[i] entries each, and their thresholds."""
    found = thresholds(x, counts, start)
    return tuple(keep(x, found, i) for i in range(len(counts))), found
