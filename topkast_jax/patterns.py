"""What is kept together: single entries, or blocks of a matrix."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from topkast_jax.errors import SparsityError


@runtime_checkable
class Pattern(Protocol):
    """Divides a leaf into units that are kept or dropped as a whole."""

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


@dataclasses.dataclass(frozen=True)
class Unstructured:
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
class Block:
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
        """`(rows, cols)`."""
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
