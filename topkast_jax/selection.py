"""Exact top-K thresholds of one leaf, by counting on the bit patterns of magnitudes.

Top-KAST keeps, in each layer, the D * n entries of largest magnitude: A for the forward pass and
a larger B for the backward pass (Jayakumar et al. 2020, section 2). As integers, the bit patterns
of magnitudes are in the order of the magnitudes, so "how many entries are at least t" is one
compare and one sum. Each pass counts for several *probes* at once; the counts shrink a *bracket*
around every threshold until it is exact. Nothing is sorted, gathered or moved between devices: on
a sharded leaf a pass all-reduces one small vector of counts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtri

from topkast_jax.errors import SparsityError

Count = int | jax.Array
_PerEntry = Callable[[jax.Array, jax.Array], jax.Array]  # (entries, their row-major indices)
_Combine = Callable[[jax.Array, jax.Array], jax.Array]
_Counter = Callable[[jax.Array], jax.Array]  # probes[c, p] -> how many are at least that, [c, p]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_WHOLE = {lax.add: lax.reduce_sum, lax.min: lax.reduce_min}
_FOLD = 64  # entries added up per output element by _reduce_flat
# Distances of the first probes from the start: log2, in units of float32's last place.
_WIDE = (5.0, 8.0, 10.5, 13.0, 15.5, 18.5, 22.0)
_NARROW = (13.0,)


class Thresholds(NamedTuple):
    """What separates kept entries from dropped ones, one element a count.

    Attributes:
        key: Bit pattern of the smallest kept magnitude, as an integer; -1 where a NaN is kept.
        index: Of the entries with exactly that key, those of a lower row-major index are kept.
    """

    key: jax.Array
    index: jax.Array


class _Bracket(NamedTuple):
    """At least `wanted` ranks reach low (`at_low` of them), fewer reach high (`at_high`)."""

    low: jax.Array
    high: jax.Array
    at_low: jax.Array
    at_high: jax.Array


def keep_count(entries: int, density: float) -> int:
    """Number of entries that a density keeps.

    Args:
        entries: Number of entries of the leaf.
        density: Fraction to keep, D in the paper.

    Returns:
        max(1, floor(density * entries + 1/2)), computed on the host in double precision.
    """
    return max(1, math.floor(float(density) * entries + 0.5))


def _keys(x: jax.Array) -> jax.Array:
    """Integers in the order of |x|; NaN is -1, below zero."""
    integer = np.dtype(f"i{x.dtype.itemsize}")
    bits = lax.bitcast_convert_type(x, integer) & np.array(np.iinfo(integer).max, integer)
    bits = bits.astype(max(integer, np.dtype("i4")))
    return jnp.where(bits > _infinity(x.dtype), -1, bits)


def _infinity(dtype: np.dtype) -> int:
    """The largest key."""
    return int(np.array(np.inf, dtype).view(f"i{dtype.itemsize}"))


def _row_major(shape: tuple[int, ...]) -> jax.Array:
    """Row-major index of every entry, without a reshape."""
    index = jnp.zeros(shape, jnp.int32)
    for axis in range(len(shape)):
        stride = np.int32(math.prod(shape[axis + 1 :]))
        index += stride * lax.broadcasted_iota(jnp.int32, shape, axis)
    return index


def _reduce_in_shape(x: jax.Array, of: _PerEntry, combine: _Combine) -> jax.Array:
    """Combines of(x, index) over all entries, in the leaf's own shape: right for any sharding."""
    return _WHOLE[combine](of(x, _row_major(x.shape)), axes=tuple(range(x.ndim)))


def _reduce_flat(x: jax.Array, of: _PerEntry, combine: _Combine) -> jax.Array:
    """The same by elementwise steps, because XLA's CPU backend vectorises no reduction."""
    total, v, start = [], x.reshape(-1), of
    while (rows := v.shape[0] // _FOLD) > 0:
        blocks = v[: rows * _FOLD].reshape(rows, _FOLD, *v.shape[1:])
        index = lax.iota(jnp.int32, rows) * _FOLD
        rest = v[rows * _FOLD :]
        total.append(of(rest, rows * _FOLD + lax.iota(jnp.int32, rest.shape[0])))
        v = functools.reduce(combine, (of(blocks[:, i], index + i) for i in range(_FOLD)))
        of = _itself
    total.append(of(v, lax.iota(jnp.int32, v.shape[0])))
    return _WHOLE[combine](jnp.concatenate(total), axes=(0,))


def _itself(entries: jax.Array, _: jax.Array) -> jax.Array:
    return entries


def _reduce(x: jax.Array, of: _PerEntry, combine: _Combine) -> jax.Array:
    """Combines of(entries, indices) over all entries of a leaf."""
    in_shape = functools.partial(_reduce_in_shape, of=of, combine=combine)
    if x.size < _FOLD**2 or jax.device_count("cpu") > 1:
        return in_shape(x)
    flat = functools.partial(_reduce_flat, of=of, combine=combine)
    return lax.platform_dependent(x, cpu=flat, default=in_shape)


def _shrink(bracket: _Bracket, probes: jax.Array, found: jax.Array, wanted: jax.Array) -> _Bracket:
    """The smaller bracket after `found` ranks were counted at or above each probe."""
    enough = found >= wanted[:, None]
    low, high, at_low, at_high = (end[:, None] for end in bracket)
    return _Bracket(
        low=jnp.where(enough, jnp.maximum(probes, low), low).max(1),
        high=jnp.where(enough, high, jnp.minimum(probes, high)).min(1),
        at_low=jnp.where(enough, jnp.minimum(found, at_low), at_low).min(1),
        at_high=jnp.where(enough, at_high, jnp.maximum(found, at_high)).max(1),
    )


def _spread(bracket: _Bracket, guess: jax.Array, below: jax.Array, above: jax.Array) -> jax.Array:
    """Probes at low + guess, at distances below and above it, and halfway, all in the bracket.

    The one halfway makes every pass at least halve the bracket, whatever the data.
    """
    low, high = bracket.low[:, None], bracket.high[:, None]
    near = jnp.concatenate([guess - below, guess, guess + above], axis=1).astype(low.dtype)
    probes = jnp.concatenate([low + near, low + (high - low) // 2], axis=1)
    return jnp.clip(probes, low + 1, high - 1)


def _interpolate(bracket: _Bracket, wanted: jax.Array, half: int) -> jax.Array:
    """Probes around where evenly spread ranks would put the threshold.

    They go out from the guess in geometric steps, from a part of the sampling error to the ends,
    so a good guess leaves a few ranks and a bad one still a fraction of the bracket.
    """
    width = (bracket.high - bracket.low).astype(jnp.float32)[:, None]
    inside = (bracket.at_low - bracket.at_high).astype(jnp.float32)[:, None]
    share = (bracket.at_low - wanted).astype(jnp.float32)[:, None] / inside
    error = width * jnp.sqrt(share * (1 - share) / inside)
    step = jnp.arange(half, dtype=jnp.float32) / half

    def distances(end: jax.Array) -> jax.Array:
        first = jnp.minimum(_FINEST * error, end)
        return jnp.maximum(first ** (1 - step) * end**step, jnp.arange(1.0, half + 1))

    guess = width * share
    return _spread(bracket, guess, distances(guess), distances(width - guess))


_FINEST = 0.3


def _search(
    x: jax.Array, count: _Counter, wanted: jax.Array, bracket: _Bracket, probes: jax.Array
) -> _Bracket:
    """Shrinks the brackets until each holds one rank, or has exactly `wanted` ranks from low on."""
    half = (probes.shape[1] - 2) // 2

    def is_open(state: tuple[_Bracket, jax.Array]) -> jax.Array:
        bracket, _ = state
        return jnp.any((bracket.high - bracket.low > 1) & (bracket.at_low > wanted))

    def one_pass(state: tuple[_Bracket, jax.Array]) -> tuple[_Bracket, jax.Array]:
        bracket, probes = state
        bracket = _shrink(bracket, probes, count(*lax.optimization_barrier((x, probes))), wanted)
        return bracket, _interpolate(bracket, wanted, half)

    return lax.while_loop(is_open, one_pass, (bracket, probes))[0]


def _normal_guess(x: jax.Array, wanted: jax.Array) -> jax.Array:
    """Keys of the thresholds of normally distributed entries with the leaf's mean magnitude."""
    total = _reduce(x, lambda e, _: jnp.abs(e.astype(jnp.float32)), lax.add)
    deviation = total / x.size * np.float32(math.sqrt(math.pi / 2))
    quantile = -ndtri(wanted.astype(jnp.float32) / (2 * x.size))
    return _keys((deviation * quantile).astype(x.dtype))


def _search_keys(x: jax.Array, wanted: jax.Array, guess: jax.Array) -> _Bracket:
    """The bracket of every threshold's key."""

    def count(x: jax.Array, probes: jax.Array) -> jax.Array:
        return _reduce(x, lambda e, _: _count_up(_keys(e)[..., None, None] >= probes), lax.add)

    zero = jnp.zeros_like(guess)
    bracket = _Bracket(
        low=zero - 1,
        high=zero + (_infinity(x.dtype) + 1),
        at_low=jnp.full_like(wanted, x.size),
        at_high=jnp.zeros_like(wanted),
    )
    # XLA's CPU backend writes out every compare of an in-shape reduction: fewer probes there.
    few = jax.default_backend() == "cpu" and jax.device_count("cpu") > 1
    exponents = np.array(_NARROW if few else _WIDE) - 23 + jnp.finfo(x.dtype).nmant
    away = np.maximum(2.0**exponents, np.arange(1, len(exponents) + 1)).astype(guess.dtype)[None]
    return _search(x, count, wanted, bracket, _spread(bracket, guess[:, None] + 1, away, away))


def _count_up(reached: jax.Array) -> jax.Array:
    return reached.astype(jnp.int32)


def _smallest_kept(x: jax.Array, bracket: _Bracket) -> jax.Array:
    """The smallest key from the low end of each bracket on."""

    def kept(e: jax.Array, _: jax.Array) -> jax.Array:
        key = _keys(e)[..., None]
        return jnp.where(key >= bracket.low, key, _infinity(x.dtype))

    return lax.cond(
        jnp.any(bracket.high - bracket.low > 1),
        lambda: _reduce(x, kept, lax.min),
        lambda: bracket.low,
    )


def _search_index(x: jax.Array, wanted: jax.Array, ties: _Bracket) -> jax.Array:
    """Row-major index below which entries with the key at the brackets' low end are kept."""
    last = np.int32(x.size - 1)

    def count(x: jax.Array, probes: jax.Array) -> jax.Array:
        def reached(e: jax.Array, i: jax.Array) -> jax.Array:
            rank = jnp.where(_keys(e)[..., None] == ties.low, last - i[..., None], -1)
            return _count_up(rank[..., None] >= probes)

        return _reduce(x, reached, lax.add)

    zero = jnp.zeros_like(wanted)
    bracket = _Bracket(zero, zero + x.size, ties.at_low - ties.at_high, zero)
    wanted = wanted - ties.at_high
    probes = _interpolate(bracket, wanted, 7)
    return x.size - _search(x, count, wanted, bracket, probes).low


def _check(x: jax.Array, counts: Sequence[Count]) -> None:
    if x.dtype.name not in _DTYPES:
        raise SparsityError(f"selection: dtype {x.dtype}; allowed: {', '.join(_DTYPES)}")
    if not 0 < x.size < 2**31:
        raise SparsityError(f"selection: a leaf of {x.size} entries; allowed: 1 to 2**31 - 1")
    for count in counts:
        if isinstance(count, int) and not 1 <= count <= x.size:
            raise SparsityError(f"selection: count {count}; allowed: 1 to {x.size}")


def thresholds(
    x: jax.Array, counts: Sequence[Count], start: Thresholds | None = None
) -> Thresholds:
    """Exact thresholds of several top-K sets of one leaf.

    Entries rank by magnitude; of equal ones the lower row-major index comes first. A NaN ranks
    below every number, 0 and -0 are equal.

    Args:
        x: The leaf, of any shape and sharding.
        counts: How many entries each set keeps, 1 to x.size; may be traced.
        start: Thresholds of an earlier selection with as many counts, to save passes. The result
            does not depend on it.

    Returns:
        The thresholds, in the order of `counts`.

    Raises:
        SparsityError: If the dtype, the size or a count is not one of those allowed.
    """
    _check(x, counts)
    x = lax.stop_gradient(x)
    wanted = jnp.stack([jnp.asarray(count, jnp.int32) for count in counts])
    guess = _normal_guess(x, wanted) if start is None else start.key
    bracket = _search_keys(x, wanted, guess)
    return Thresholds(_smallest_kept(x, bracket), _search_index(x, wanted, bracket))


def keep(x: jax.Array, thresholds: Thresholds, i: int) -> jax.Array:
    """The keep-mask of one count.

    Args:
        x: The leaf that the thresholds were selected from.
        thresholds: What `thresholds` returned for it.
        i: Which of the counts.

    Returns:
        Booleans of the leaf's shape, True for exactly that many entries.
    """
    key, edge = _keys(x), thresholds.key[i]
    return (key > edge) | ((key == edge) & (_row_major(x.shape) < thresholds.index[i]))


def top_k_masks(
    x: jax.Array, counts: Sequence[Count], start: Thresholds | None = None
) -> tuple[tuple[jax.Array, ...], Thresholds]:
    """Keep-masks of the entries of largest magnitude, for several counts at once.

    Args:
        x: The leaf, of any shape and sharding.
        counts: How many entries each mask keeps, 1 to x.size; may be traced.
        start: Thresholds of an earlier selection with as many counts, to save passes.

    Returns:
        The masks, each with exactly its count of True, and their thresholds.

    Raises:
        SparsityError: If the dtype, the size or a count is not one of those allowed.
    """
    found = thresholds(x, counts, start)
    return tuple(keep(x, found, i) for i in range(len(counts))), found
