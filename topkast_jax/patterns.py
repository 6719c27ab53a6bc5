"""What is kept together: single entries, or blocks of a matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from topkast_jax.errors import SparsityError
from topkast_jax.selection import Thresholds, count_of, top_k_masks

Count = int | jax.Array


@runtime_checkable
class Pattern(Protocol):
    """Divides a leaf into units that are kept or dropped as a whole, and ranks them."""

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


class _Ranked:
    """Ranking of units that do not depend on each other: exact top-K over the whole grid."""

    def count(self: Pattern, shape: tuple[int, ...], density: float | jax.Array) -> Count:
        """max(1, ⌊density · units + ½⌋)."""
        return count_of(math.prod(self.grid(shape)), density)

    def top(
        self,
        scores: jax.Array,
        counts: Sequence[Count],
        *,
        among: jax.Array | None = None,
        start: Any = None,
        ties: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, ...], Any]:
        """The units of largest absolute score; the memory holds the thresholds' bit patterns."""
        warm = None
        if start is not None:
            warm = Thresholds(jnp.stack(start), jnp.zeros(len(counts), jnp.int32))
        salt = None if ties is None else jax.random.bits(ties, (), jnp.uint32)
        masks, found = top_k_masks(scores, counts, warm, among=among, salt=salt)
        return masks, tuple(found.key[i] for i in range(len(counts)))


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
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise SparsityError(f"Block {name}={size!r}: must be an integer of at least 1")

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


def units_in(pattern: Pattern, shape: tuple[int, ...]) -> int:
    """How many units a leaf of this shape has."""
    return math.prod(pattern.grid(shape))
