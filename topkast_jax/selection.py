"""Exact top-K thresholds of one leaf, by counting on the bit patterns of magnitudes.

Top-KAST keeps, in each layer, the D * n entries of largest magnitude: A for the forward pass and
a larger B for the backward pass (Jayakumar et al. 2020, section 2). As integers, the bit patterns
of magnitudes are in the order of the magnitudes, so "how many entries are at least t" is one
compare and one sum. Each pass counts for several *probes* at once; the counts shrink a *bracket*
around every threshold until it is exact. Nothing is sorted, gathered or moved between devices: on
a sharded leaf a pass all-reduces one small vector of counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtri

from topkast_jax.errors import SparsityError, shown
from topkast_jax.ranking import TieOrder, key_dtype, keys_of, largest_key, row_major
from topkast_jax.reductions import Of, few_probes, reduce_entries
from topkast_jax.values import is_integer, is_whole
from topkast_jax.varying import varying_like

Count = int | jax.Array

DTYPES = ("float32", "bfloat16", "float16", "float64")
MOST_ENTRIES = 2**31 - 1  # of one layer of a leaf: positions and counts are int32
_MILLION = 1_000_000
SMALL = 2**14  # entries up to which plain bisection is used: few lines to compile, many passes
_LARGE = 2**20  # entries from which float32 magnitudes often tie
# Distances of the first probes from the start, log2 in units of float32's last place: a warm start
# is about 2**9 to 2**13 off, that of a cold start on normal entries too.
_FIRST = (9.5, 12.0, 16.0)
_FIRST_FEW = (13.0,)
_NEAREST = 0.35  # distance of the probes next to a guess, in standard errors of the guess


class Thresholds(NamedTuple):
    """What separates kept entries from dropped ones, one element a count.

    Attributes:
        key: Bit pattern of a magnitude, as an integer: that of the smallest kept entry, or a lower
            one that separates as well. One more than infinity's where only NaNs are kept.
        index: Of the entries with exactly that key, those that come earlier in the order of ties
            than this are kept.
    """

    key: jax.Array
    index: jax.Array  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class _Bracket(NamedTuple):
    """At least `wanted` ranks reach low (`at_low` of them), fewer reach high (`at_high`)."""

    low: jax.Array
    high: jax.Array
    at_low: jax.Array
    at_high: jax.Array


@overload
def keep_count(entries: int, density: float) -> int: ...
@overload
def keep_count(entries: int, density: float | jax.Array) -> Count: ...
def keep_count(entries: int, density: float | jax.Array) -> Count:
    """The number of entries that a density keeps, max(1, ⌊density · entries + ½⌋).

    Args:
        entries: Number of entries (or units) of the leaf, at least 1.
        density: Fraction to keep, in (0, 1]; D in the paper. It is not checked. A plain number is
            rounded on the host in double precision; an array (a hyperparameter of
            `optax.inject_hyperparams`) is read to six decimals and counted in exact integers.

    Returns:
        An int for a plain number, an int32 scalar for an array; at least 1.
    """
    if not isinstance(density, jax.Array):
        return max(1, math.floor(float(density) * entries + 0.5))
    parts = jnp.round(density.astype(jnp.float32) * np.float32(_MILLION)).astype(jnp.int32)
    whole, rest = divmod(entries, _MILLION)
    high, low = divmod(rest, 1000)
    thousands, left = jnp.divmod(parts * high, 1000)
    count = parts * whole + thousands + (left * 1000 + parts * low + _MILLION // 2) // _MILLION
    return jnp.maximum(1, count)


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


def _around(bracket: _Bracket, guess: jax.Array, below: jax.Array, above: jax.Array) -> jax.Array:
    """Probes at low + guess, at distances below and above it, and halfway, all in the bracket.

    The one halfway makes every pass at least halve the bracket, whatever the data.
    """
    low, high = bracket.low[:, None], bracket.high[:, None]
    near = jnp.concatenate([guess - below, guess, guess + above], axis=1).astype(low.dtype)
    probes = jnp.concatenate([low + near, low + ((high - low) >> 1)], axis=1)
    return jnp.clip(probes, low + 1, high - 1)


def _interpolate(bracket: _Bracket, wanted: jax.Array, half: int) -> jax.Array:
    """Probes around where evenly spread ranks would put the threshold.

    They go out from the guess in geometric steps, from a part of its standard error to the ends of
    the bracket, so a good guess leaves few ranks and a bad one still a fraction of the bracket.
    """
    width = (bracket.high - bracket.low).astype(jnp.float32)[:, None]
    inside = (bracket.at_low - bracket.at_high).astype(jnp.float32)[:, None]
    share = (bracket.at_low - wanted).astype(jnp.float32)[:, None] / inside
    nearest = _NEAREST * width * jnp.sqrt(share * (1 - share) / inside)
    step = jnp.arange(half, dtype=jnp.float32)[None] / half
    least = jnp.arange(1, half + 1, dtype=jnp.float32)[None]

    def distances(end: jax.Array) -> jax.Array:
        first = jnp.minimum(nearest, end)
        return jnp.maximum(first ** (1 - step) * end**step, least)

    guess = width * share
    return _around(bracket, guess, distances(guess), distances(width - guess))


def _search(
    x: jax.Array,
    of: Of,
    wanted: jax.Array,
    bracket: _Bracket,
    probes: jax.Array,
    *parameters: jax.Array,
) -> _Bracket:
    """Shrinks brackets until each holds one rank, or exactly `wanted` ranks are at its low end."""
    half = (probes.shape[1] - 2) // 2

    def is_open(state: tuple[_Bracket, jax.Array]) -> jax.Array:
        bracket, _ = state
        return jnp.any((bracket.high - bracket.low > 1) & (bracket.at_low > wanted))

    def one_pass(state: tuple[_Bracket, jax.Array]) -> tuple[_Bracket, jax.Array]:
        bracket, probes = state
        found = reduce_entries(x, probes, *parameters, of=of, combine=lax.add)
        bracket = _shrink(bracket, probes, found, wanted)
        return bracket, _interpolate(bracket, wanted, half)

    return lax.while_loop(is_open, one_pass, (bracket, probes))[0]


def _normal_guess(x: jax.Array, wanted: jax.Array) -> jax.Array:
    """Keys of the thresholds of normally distributed entries with the leaf's mean magnitude."""
    total = reduce_entries(x, of=lambda e, _: jnp.abs(e.astype(jnp.float32)), combine=lax.add)
    deviation = total * np.float32(math.sqrt(math.pi / 2) / x.size)
    quantile = -ndtri(wanted.astype(jnp.float32) / np.float32(2 * x.size))
    return keys_of((deviation * quantile).astype(x.dtype))


def _search_keys(x: jax.Array, wanted: jax.Array, guess: jax.Array) -> _Bracket:
    """The bracket of every threshold's key."""

    def reached(e: jax.Array, _: jax.Array, probe: jax.Array) -> jax.Array:
        return (keys_of(e) >= probe).astype(jnp.int32)

    low, none = jnp.full_like(guess, -1), jnp.zeros_like(wanted)
    bracket = _Bracket(low, low + (largest_key(x.dtype) + np.int32(2)), none + x.size, none)
    bits = jnp.finfo(x.dtype).nmant if jnp.issubdtype(x.dtype, jnp.floating) else 23
    exponents = np.array(_FIRST_FEW if few_probes() else _FIRST) - 23 + bits
    away = jnp.asarray(np.maximum(2.0**exponents, 1 + np.arange(len(exponents))), guess.dtype)[None]
    probes = _around(bracket, (guess - low)[:, None], away, away)
    return _search(x, reached, wanted, bracket, probes)


def _smallest_kept(x: jax.Array, bracket: _Bracket) -> jax.Array:
    """The smallest key at or above the low end of each bracket."""
    unsigned = np.dtype(f"u{bracket.low.dtype.itemsize}")

    def over(e: jax.Array, _: jax.Array, low: jax.Array) -> jax.Array:
        return (keys_of(e) - low).astype(unsigned)  # keys below low wrap around to the largest

    def find() -> jax.Array:
        above = reduce_entries(x, bracket.low, of=over, combine=lax.min)
        return bracket.low + above.astype(bracket.low.dtype)

    return lax.cond(jnp.any(bracket.high - bracket.low > 1), find, lambda: bracket.low)


def _look_at_one_tie(
    x: jax.Array, wanted: jax.Array, tied: jax.Array, bracket: _Bracket
) -> _Bracket:
    """The bracket of the index once the first tied entry is known, or the last if that is nearer.

    Two or three ties are the rule in a large float32 leaf, and then this closes the bracket.
    """
    last = np.int32(x.size - 1)
    first = wanted <= bracket.at_low - wanted

    def distance(e: jax.Array, i: jax.Array, tied: jax.Array, first: jax.Array) -> jax.Array:
        return jnp.where(keys_of(e) == tied, jnp.where(first, i, last - i), last)

    nearest = reduce_entries(x, tied, first, of=distance, combine=lax.min)
    probe = jnp.where(first, last - nearest, nearest + 1)
    found = jnp.where(first, 1, bracket.at_low - 1)
    return _shrink(bracket, probe[:, None], found[:, None], wanted)


def _search_index(x: jax.Array, wanted: jax.Array, ties: _Bracket, order: TieOrder) -> jax.Array:
    """Position before which entries with the key at the low ends are kept."""
    last = np.int32(order.end - 1)

    def reached(e: jax.Array, i: jax.Array, probe: jax.Array, tied: jax.Array) -> jax.Array:
        rank = jnp.where(keys_of(e) == tied, last - order.position(i), -1)
        return (rank >= probe).astype(jnp.int32)

    zero, wanted = jnp.zeros_like(wanted), wanted - ties.at_high
    bracket = _Bracket(zero, zero + order.end, ties.at_low - ties.at_high, zero)
    if x.size >= _LARGE and order.salt is None:
        bracket = lax.cond(
            jnp.any(bracket.at_low > wanted),
            lambda: _look_at_one_tie(x, wanted, ties.low, bracket),
            lambda: bracket,
        )
    probes = _interpolate(bracket, wanted, 1)  # ties lie evenly: more probes save few passes
    return order.end - _search(x, reached, wanted, bracket, probes, ties.low[:, None]).low


def _bisected(x: jax.Array, wanted: jax.Array, order: TieOrder) -> Thresholds:
    """The thresholds of a small leaf, one bit a pass: first of the key, then of the rank in ties.

    Of the pairs (key, rank) that `wanted` entries reach, the largest is that of the last one kept.
    """
    axes, last = tuple(range(x.ndim)), np.int32(order.end - 1)
    keys = lax.expand_dims(keys_of(x) + 1, [x.ndim])  # At least 0, so that bits only add to them.
    ranks = lax.expand_dims(last - order.position(row_major(x.shape)), [x.ndim])
    key_bits, rank_bits = 8 * keys.dtype.itemsize - 1, int(last).bit_length()
    bits = (
        np.array([1 << i for i in reversed(range(key_bits))] + [0] * rank_bits, keys.dtype),
        np.array([0] * key_bits + [1 << i for i in reversed(range(rank_bits))], ranks.dtype),
    )

    def one_pass(found: Any, bits: Any) -> tuple[Any, None]:
        key, rank = (end | bit for end, bit in zip(found, bits, strict=True))
        probe = lax.expand_dims(key, axes), lax.expand_dims(rank, axes)
        reached = (keys > probe[0]) | ((keys == probe[0]) & (ranks >= probe[1]))
        enough = jnp.sum(reached, axis=axes, dtype=jnp.int32) >= wanted
        return (jnp.where(enough, key, found[0]), jnp.where(enough, rank, found[1])), None

    none = jnp.zeros_like(wanted)
    (key, rank), _ = lax.scan(one_pass, (none.astype(keys.dtype), none), bits)
    return Thresholds(key - 1, order.end - rank)


def _check(x: jax.Array, counts: Sequence[Count]) -> None:
    _check_dtype(x)
    if not 0 < x.size <= MOST_ENTRIES:
        raise SparsityError(f"selection: a leaf of {x.size} entries; allowed: 1 to {MOST_ENTRIES}")
    if not len(counts):
        raise SparsityError("selection: no counts; must be at least one")
    for count in counts:
        _check_count(count, x.size)


def _check_dtype(x: jax.Array) -> None:
    if x.dtype.name not in DTYPES:
        raise SparsityError(f"selection: dtype {x.dtype}; allowed: {', '.join(DTYPES)}")


def _check_count(count: Any, size: int) -> None:
    """Raises SparsityError unless a count is one of those allowed; an array may be 0."""
    traced, least = isinstance(count, jax.core.Tracer), int(not isinstance(count, jax.Array))
    if not (is_integer(count) if traced else is_whole(count, least, size)):
        raise SparsityError(f"selection: count {shown(count)}; allowed: integers, 1 to {size}")


def _eligible(x: jax.Array, among: jax.Array | None) -> jax.Array:
    """The entries, or where only some may be kept, keys in which the others rank below all."""
    return x if among is None else jnp.where(among, keys_of(x), -1)


def thresholds(
    x: jax.Array,
    counts: Sequence[Count],
    start: Thresholds | None = None,
    *,
    among: jax.Array | None = None,
    salt: jax.Array | None = None,
) -> Thresholds:
    """Exact thresholds of several top-K sets of one leaf.

    Entries rank by magnitude, and a NaN ranks above every number; 0 and -0 are equal. Of equal
    entries the lower row-major index comes first, or with a salt an order that looks random.

    Args:
        x: The leaf, of any shape and sharding.
        counts: How many entries each set keeps, 1 to x.size; a traced one may be 0.
        start: Thresholds of an earlier selection with as many counts, to save passes. The result
            does not depend on it.
        among: Booleans of the leaf's shape: entries that are False rank below all others.
        salt: uint32 scalar that numbers the order in which ties are kept.

    Returns:
        The thresholds, in the order of `counts`; their keys are those of the smallest kept entries.

    Raises:
        SparsityError: If the dtype, the size or a count is not one of those allowed.
    """
    return _thresholds(x, counts, start, among, salt, smallest=True)


def _thresholds(
    x: jax.Array,
    counts: Sequence[Count],
    start: Thresholds | None,
    among: jax.Array | None,
    salt: jax.Array | None,
    *,
    smallest: bool,
) -> Thresholds:
    """See `thresholds`. Keys that only separate take a pass less."""
    _check(x, counts)
    x = lax.stop_gradient(x)
    wanted = jnp.stack([jnp.asarray(count, jnp.int32) for count in counts])
    wanted, none = varying_like((wanted, jnp.zeros_like(wanted)), x)
    if x.size <= SMALL:
        return _bisected(_eligible(x, among), wanted, TieOrder(x.size, salt))
    guess = _normal_guess(x, wanted) if start is None else start.key + none.astype(start.key.dtype)
    x = _eligible(x, among)
    bracket = _search_keys(x, wanted, guess)
    edge = _search_index(x, wanted, bracket, TieOrder(x.size, salt))
    nothing = largest_key(x.dtype) + np.int32(1)
    key = _smallest_kept(x, bracket) if smallest else bracket.low
    return Thresholds(jnp.where(wanted > 0, key, nothing), edge)


def keep(
    x: jax.Array,
    thresholds: Thresholds,
    *,
    among: jax.Array | None = None,
    salt: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """The keep-mask of each count.

    Args:
        x: The leaf that the thresholds were selected from.
        thresholds: What `thresholds` returned for it.
        among: As given to `thresholds`.
        salt: As given to `thresholds`.

    Returns:
        Booleans of the leaf's shape, each True for exactly that many entries.
    """
    keys = keys_of(_eligible(x, among))
    position = TieOrder(x.size, salt).position(row_major(x.shape))
    ends = zip(*thresholds, strict=True)
    return tuple((keys > key) | ((keys == key) & (position < edge)) for key, edge in ends)


def top_k_masks(
    x: jax.Array,
    counts: Sequence[Count],
    start: Thresholds | None = None,
    *,
    among: jax.Array | None = None,
    salt: jax.Array | None = None,
) -> tuple[tuple[jax.Array, ...], Thresholds]:
    """Keep-masks of the entries of largest magnitude, for several counts at once.

    Args:
        x: The leaf, of any shape and sharding.
        counts: How many entries each mask keeps, 1 to x.size; a traced one may be 0.
        start: Thresholds of an earlier selection with as many counts, to save passes.
        among: Booleans of the leaf's shape: entries that are False are kept last.
        salt: uint32 scalar that numbers the order in which ties are kept; None: row-major.

    Returns:
        The masks, each with exactly its count of True, and thresholds that separate them.

    Raises:
        SparsityError: If the dtype, the size or a count is not one of those allowed.
    """
    if not isinstance(counts, Sequence):
        raise SparsityError(
            f"selection: counts={shown(counts)}; must be a sequence, such as (10, 20)"
        )
    x = jnp.asarray(x)
    found = _thresholds(x, counts, start, among, salt, smallest=False)
    return keep(x, found, among=among, salt=salt), found


def counts_of_global_top_k(leaves: Mapping[str, jax.Array], count: Count) -> dict[str, jax.Array]:
    """How many of the `count` entries of largest magnitude over all leaves each leaf has.

    Passes count over all leaves and add the counts up, so nothing is gathered. Of entries that tie
    with the global threshold each leaf has a part in proportion to how many of them it holds.

    Args:
        leaves: Arrays of any shapes, of one dtype, together at most 2**31 - 1 entries.
        count: How many to keep in all, 1 to their number; may be traced.

    Returns:
        int32 scalars, by leaf; their sum is `count`.

    Raises:
        SparsityError: If the dtypes differ, or a dtype, the number of entries or the count is not
            one of those allowed.
    """
    xs = [lax.stop_gradient(x) for x in leaves.values()]
    for x in xs:
        _check_dtype(x)
    if len({x.dtype for x in xs}) != 1:
        found = sorted({x.dtype.name for x in xs})
        raise SparsityError(f"global selection: leaves of {', '.join(found)}; allowed: one dtype")
    total = sum(x.size for x in xs)
    if total > MOST_ENTRIES:
        raise SparsityError(
            f"global selection: {total} entries in all; allowed: at most {MOST_ENTRIES}"
        )
    _check_count(count, total)
    wanted = jnp.asarray(count, jnp.int32)[None]

    def reached(e: jax.Array, _: jax.Array, probe: jax.Array) -> jax.Array:
        return (keys_of(e) >= probe).astype(jnp.int32)

    def counted(probes: jax.Array) -> list[jax.Array]:
        return [reduce_entries(x, probes, of=reached, combine=lax.add) for x in xs]

    low, none = jnp.full([1], -1, key_dtype(xs[0].dtype)), jnp.zeros_like(wanted)
    for x in xs:
        low, none, wanted = varying_like((low, none, wanted), x)
    high = low + (largest_key(xs[0].dtype) + np.int32(2))
    bracket = _Bracket(low, high, none + total, none)

    def is_open(state: tuple[_Bracket, jax.Array]) -> jax.Array:
        return jnp.any(state[0].high - state[0].low > 1)

    def one_pass(state: tuple[_Bracket, jax.Array]) -> tuple[_Bracket, jax.Array]:
        bracket, probes = state
        bracket = _shrink(bracket, probes, sum(counted(probes)), wanted)  # type: ignore[arg-type]
        return bracket, _interpolate(bracket, wanted, 1)

    middle = bracket.low[:, None] + (bracket.high - bracket.low)[:, None] // 2
    probes = jnp.broadcast_to(middle, (1, 4))
    bracket, _ = lax.while_loop(is_open, one_pass, (bracket, probes))
    above = jnp.stack([c[0] for c in counted(bracket.high)])
    tied = jnp.stack([c[0] for c in counted(bracket.low)]) - above
    left = wanted[0] - jnp.sum(above, dtype=jnp.int32)
    return dict(zip(leaves, above + _in_proportion(left, tied), strict=True))


def _in_proportion(wanted: jax.Array, parts: jax.Array) -> jax.Array:
    """Shares a whole number out over parts in proportion to their sizes, none above its size.

    Args:
        wanted: int32 scalar, at most the sum of the parts.
        parts: int32 [n], their sizes.

    Returns:
        int32 [n] whose sum is `wanted`.
    """
    total = jnp.sum(parts, dtype=jnp.int32)
    each = wanted.astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)

    def take(so_far: tuple[jax.Array, jax.Array], part: jax.Array) -> tuple[Any, jax.Array]:
        given, passed = so_far
        passed = passed + part
        goal = jnp.minimum(jnp.round(each * passed.astype(jnp.float32)), np.float32(2**31 - 128))
        # What float32 rounds may not leave more for the parts that follow than they can take.
        least, most = wanted - given - (total - passed), jnp.minimum(part, wanted - given)
        share = jnp.clip(goal.astype(jnp.int32) - given, jnp.maximum(least, 0), most)
        return (given + share, passed), share

    none = jnp.zeros_like(wanted)
    shares: jax.Array = lax.scan(take, varying_like((none, none), parts), parts)[1]
    return shares
