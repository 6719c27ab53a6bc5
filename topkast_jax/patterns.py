"""Patterns: which entries of a leaf are kept or dropped together, and how these are ranked."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.errors import SparsityError, shown
from topkast_jax.ranking import keys_of
from topkast_jax.selection import SMALL, Count, Thresholds, keep_count, top_k_masks
from topkast_jax.values import is_whole


class Pattern(Protocol):
    """Divides a leaf into units that are kept or dropped as a whole, and ranks them.

    In a pattern of your own, `groups` and the argument `ties` of `top` are optional. Without
    `groups`, the units form one group; without `ties`, `top` decides the order of equal scores.
    Patterns of a class without `__eq__` are equal if their attributes are.
    """

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of the values of one unit: `()` where a unit is a single entry."""
        ...

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the array of units of a leaf; SparsityError if it cannot be divided."""
        ...

    def magnitudes(self, x: jax.Array) -> jax.Array:
        """One number a unit, of shape `grid(x.shape)`; units are ranked by its absolute value."""
        ...

    def expand(self, units: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A value for each unit, shape `grid(shape)`, given to each of its entries."""
        ...

    def groups(self, shape: tuple[int, ...]) -> int:
        """The number of groups of units that keep equal numbers each; 1 if nothing divides them."""
        ...

    def count(self, shape: tuple[int, ...], density: float | jax.Array) -> Count:
        """How many units of a leaf of this shape a density keeps."""
        ...

    def top(
        self,
        scores: jax.Array,
        counts: Sequence[Count],
        *,
        among: jax.Array | None = None,
        start: Any = None,
        ties: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, ...], Any]:
        """Masks of the units of largest absolute score, one for each count.

        Args:
          scores: one number a unit, of the grid's shape.
          counts: how many units each mask keeps; may be traced.
          among: bool of the grid's shape: units that are False rank below all others.
          start: the memory that an earlier ranking of this leaf returned, to save passes.
          ties: random key by which equal scores are ranked; None: the lower index first.

        Returns:
          Bool masks of the grid's shape, and a memory: a tree of scalars.
        """
        ...


NEEDED = ("unit_shape", "grid", "magnitudes", "expand", "count", "top")


@dataclasses.dataclass(frozen=True, eq=False)
class _Completed:
    """A pattern with what it may lack: `groups`, `ties` of `top`, a comparison by value.

    A pattern is a part of a state's structure, so patterns that do the same must be equal.
    """

    pattern: Any
    takes_ties: bool

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Completed) or type(self.pattern) is not type(other.pattern):
            return False
        if _compares(self.pattern):
            return bool(self.pattern == other.pattern)
        return vars(self.pattern) == vars(other.pattern)

    def __hash__(self) -> int:
        return hash(type(self.pattern))

    def __getattr__(self, name: str) -> Any:
        if name not in NEEDED:
            raise AttributeError(name)
        return getattr(self.pattern, name)

    def __repr__(self) -> str:
        return repr(self.pattern)

    def groups(self, shape: tuple[int, ...]) -> int:
        return int(self.pattern.groups(shape)) if hasattr(self.pattern, "groups") else 1

    def top(
        self, scores: jax.Array, counts: Sequence[Count], *, ties: Any = None, **options: Any
    ) -> tuple[tuple[jax.Array, ...], Any]:
        more = {"ties": ties} if self.takes_ties else {}
        found: tuple[tuple[jax.Array, ...], Any]
        found = self.pattern.top(scores, counts, **options, **more)
        return found


def completed(pattern: Any) -> Pattern:
    """The pattern itself, or with what it lacks of `Pattern`; it must have all of `NEEDED`."""
    taken = inspect.signature(pattern.top).parameters.values()
    ties = any(p.name == "ties" or p.kind is p.VAR_KEYWORD for p in taken)
    whole = ties and hasattr(pattern, "groups") and _compares(pattern)
    result: Pattern = pattern if whole else _Completed(pattern, ties)
    return result


def _compares(pattern: Any) -> bool:
    """Whether a pattern decides itself to what it is equal."""
    return type(pattern).__eq__ is not object.__eq__ or not hasattr(pattern, "__dict__")


class _Ranked:
    """Ranking of units that do not depend on each other: exact top-K over the whole grid."""

    def groups(self, shape: tuple[int, ...]) -> int:
        """1."""
        del shape
        return 1

    def count(self: Pattern, shape: tuple[int, ...], density: float | jax.Array) -> Count:
        """max(1, ⌊density · units + ½⌋)."""
        return keep_count(math.prod(self.grid(shape)), density)

    def top(
        self,
        scores: jax.Array,
        counts: Sequence[Count],
        *,
        among: jax.Array | None = None,
        start: Any = None,
        ties: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, ...], Any]:
        """The units of largest absolute score.

        The memory holds the bit patterns of the thresholds; a small leaf needs none.
        """
        warm = None
        if start:
            warm = Thresholds(jnp.stack(start), jnp.zeros(len(counts), jnp.int32))
        salt = None if ties is None else jax.random.bits(ties, (), jnp.uint32)
        masks, found = top_k_masks(scores, counts, warm, among=among, salt=salt)
        remembered = () if scores.size <= SMALL else tuple(found.key)
        return masks, remembered


@dataclasses.dataclass(frozen=True)
class Unstructured(_Ranked):
    """Every entry is a unit, its magnitude its absolute value (Top-KAST, section 2)."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """`()`: a unit is a single entry."""
        return ()

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The leaf's own shape."""
        return shape

    def magnitudes(self, x: jax.Array) -> jax.Array:
        """The entries themselves: selection ranks by absolute value."""
        return x

    def expand(self, units: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The units themselves."""
        del shape
        return units


@dataclasses.dataclass(frozen=True)
class Block(_Ranked):
    """Blocks of `rows` × `cols` entries over the last two axes, ranked by their L1 norm.

    Leading axes (a convolution's window) are a grid of matrices, each cut into blocks.

    Attributes:
      rows: entries of a block along the last axis but one (input features).
      cols: entries of a block along the last axis (output features).
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        for name, size in (("rows", self.rows), ("cols", self.cols)):
            if not is_whole(size, 1):
                raise SparsityError(f"Block {name}={shown(size)}: must be an integer of at least 1")
            object.__setattr__(self, name, int(size))

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """(rows, cols)."""
        return (self.rows, self.cols)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape `(..., shape[-2] / rows, shape[-1] / cols)`."""
        if len(shape) < 2:
            raise SparsityError(f"Block({self.rows}, {self.cols}) needs two axes, found {shape}")
        if shape[-2] % self.rows or shape[-1] % self.cols:
            raise SparsityError(
                f"Block({self.rows}, {self.cols}) does not divide the last two axes of {shape}"
            )
        return (*shape[:-2], shape[-2] // self.rows, shape[-1] // self.cols)

    def magnitudes(self, x: jax.Array) -> jax.Array:
        """The L1 norm of each block, summed in float32."""
        *lead, rows, cols = self.grid(x.shape)
        # One axis at a time: a reshape of two is refused on an explicitly sharded leaf.
        bands = jnp.abs(x).reshape(*lead, rows, self.rows, x.shape[-1])
        bands = jnp.sum(bands, axis=-2, dtype=jnp.float32)
        return jnp.sum(bands.reshape(*lead, rows, cols, self.cols), axis=-1)

    def expand(self, units: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Each block's value, repeated over its entries."""
        *lead, rows, cols = units.shape
        bands = jnp.broadcast_to(units[..., :, None, :], (*lead, rows, self.rows, cols))
        bands = bands.reshape(*lead, shape[-2], cols)
        entries = jnp.broadcast_to(bands[..., None], (*lead, shape[-2], cols, self.cols))
        return entries.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Channel(_Ranked):
    """Whole output features: a unit is all entries with one index of the last axis (L1 norm)."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """`(-1, 1)`: all inputs of one output feature."""
        return (-1, 1)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """One unit an output feature: `shape[-1:]`."""
        if len(shape) < 2:
            raise SparsityError(f"Channel() needs two axes, found {shape}")
        return shape[-1:]

    def magnitudes(self, x: jax.Array) -> jax.Array:
        """The L1 norm of each output feature, summed in float32."""
        return jnp.sum(jnp.abs(x), axis=tuple(range(x.ndim - 1)), dtype=jnp.float32)

    def expand(self, units: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Each output feature's value, given to all of its entries."""
        return jnp.broadcast_to(units.reshape(*(1,) * (len(shape) - 1), -1), shape)


class _Grouped:
    """Single entries of which each group keeps the same number."""

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """`()`: a unit is a single entry."""
        return ()

    def magnitudes(self, x: jax.Array) -> jax.Array:
        """The entries themselves: selection ranks by absolute value."""
        return x

    def expand(self, units: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The units themselves."""
        del shape
        return units


@dataclasses.dataclass(frozen=True)
class NOfM(_Grouped):
    """N of M: of every `m` entries in a row along the input axis, the last but one, `n` are kept.

    The forward density must be n / m, and the backward density a multiple of 1 / m. Traced
    densities are not checked: the sets then keep as many entries of each group as the density
    gives.

    Attributes:
      n: entries of a group in the forward set, 1 to `m`.
      m: entries of a group.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not is_whole(self.m, 1) or not is_whole(self.n, 1, int(self.m)):
            found = f"NOfM({shown(self.n)}, {shown(self.m)})"
            raise SparsityError(f"{found}: must be integers with 1 ≤ n ≤ m")
        object.__setattr__(self, "n", int(self.n))
        object.__setattr__(self, "m", int(self.m))

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The leaf's own shape."""
        if len(shape) < 2 or shape[-2] % self.m:
            raise SparsityError(
                f"NOfM({self.n}, {self.m}) does not divide the last axis but one of {shape}"
            )
        return shape

    def groups(self, shape: tuple[int, ...]) -> int:
        """One group to `m` entries."""
        return math.prod(shape) // self.m

    def check_densities(self, forward: float | jax.Array, backward: float | jax.Array) -> None:
        """Raises SparsityError unless n of m is the forward density, and the backward one fits.

        Traced densities pass unseen.
        """
        if not isinstance(forward, jax.core.Tracer) and not self._fits(forward, self.n):
            raise SparsityError(
                f"forward_density={float(forward):g} with NOfM({self.n}, {self.m}): must be "
                f"{self.n / self.m:g}"
            )
        if not isinstance(backward, jax.core.Tracer) and not self._fits(backward):
            raise SparsityError(
                f"backward_density={float(backward):g} with NOfM({self.n}, {self.m}): must be a "
                f"multiple of {1 / self.m:g}"
            )

    def _fits(self, density: float | jax.Array, entries: int | None = None) -> bool:
        """Whether a density is that of a group's `entries`, or of any whole number of them."""
        precision = jnp.finfo(density.dtype).eps if isinstance(density, jax.Array) else 0.0
        found = float(density) * self.m
        wanted = round(found) if entries is None else entries
        return abs(found - wanted) <= max(1e-6, float(precision) * self.m)

    def count(self, shape: tuple[int, ...], density: float | jax.Array) -> Count:
        """As many of each group, at least one, times the number of groups."""
        return self.groups(shape) * keep_count(self.m, density)

    def top(
        self,
        scores: jax.Array,
        counts: Sequence[Count],
        *,
        among: jax.Array | None = None,
        start: Any = None,
        ties: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, ...], Any]:
        """The largest entries of each group, by comparing each with each; no memory."""
        del start
        *lead, rows, cols = scores.shape
        keys = keys_of(scores)
        if among is not None:
            keys = jnp.where(among, keys, -1)
        keys = keys.reshape(*lead, rows // self.m, self.m, cols)
        place = jax.lax.broadcasted_iota(jnp.uint32, keys.shape, keys.ndim - 2)
        if ties is not None:  # The index stays in the number, or equal numbers would tie again.
            chance = jax.random.bits(ties, keys.shape, jnp.uint32) >> np.uint32(1)
            place = place + chance // np.uint32(self.m) * np.uint32(self.m)
        one, other = keys[..., None, :, :], keys[..., :, None, :]
        before = place[..., :, None, :] < place[..., None, :, :]
        ahead = (other > one) | ((other == one) & before)
        rank = jnp.sum(ahead, axis=-3, dtype=jnp.int32)
        groups = self.groups(scores.shape)
        masks = (rank < jnp.asarray(c, jnp.int32) // groups for c in counts)
        return tuple(mask.reshape(scores.shape) for mask in masks), ()


@dataclasses.dataclass(frozen=True)
class FanIn(_Grouped):
    """Constant fan-in: every output feature, an index of the last axis, keeps as many inputs.

    The pattern of SRigL (Lasby et al., 2023).
    """

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The leaf's own shape."""
        if len(shape) < 2:
            raise SparsityError(f"FanIn() needs two axes, found {shape}")
        return shape

    def groups(self, shape: tuple[int, ...]) -> int:
        """One group an output feature."""
        return shape[-1]

    def count(self, shape: tuple[int, ...], density: float | jax.Array) -> Count:
        """As many of each output feature's inputs, at least one, times the output features."""
        return shape[-1] * keep_count(math.prod(shape[:-1]), density)

    def top(
        self,
        scores: jax.Array,
        counts: Sequence[Count],
        *,
        among: jax.Array | None = None,
        start: Any = None,
        ties: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, ...], Any]:
        """The largest inputs of each output feature; no memory."""
        del start
        features = scores.shape[-1]
        each = [jnp.asarray(c, jnp.int32) // features for c in counts]
        salts = None if ties is None else jax.random.bits(ties, (features,), jnp.uint32)

        def of_one(x: jax.Array, among: Any, salt: Any) -> tuple[jax.Array, ...]:
            return top_k_masks(x, each, among=among, salt=salt)[0]

        axes = (-1, None if among is None else -1, None if salts is None else 0)
        return jax.vmap(of_one, in_axes=axes, out_axes=-1)(scores, among, salts), ()


def units_in(pattern: Pattern, shape: tuple[int, ...]) -> int:
    """How many units a leaf of this shape has."""
    return math.prod(pattern.grid(shape))
