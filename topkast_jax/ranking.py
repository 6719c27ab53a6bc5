"""The order in which the entries of one leaf are kept: by magnitude, and ties by their place."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def keys_of(x: jax.Array) -> jax.Array:
    """Integers in the order of |x|, NaN above all; an array of keys is what it is."""
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x
    integer = np.dtype(f"i{x.dtype.itemsize}")
    bits = lax.bitcast_convert_type(x, integer) & np.array(np.iinfo(integer).max, integer)
    return jnp.minimum(bits.astype(key_dtype(x.dtype)), largest_key(x.dtype))


def key_dtype(dtype: np.dtype) -> np.dtype:
    """The type of the keys of entries of a type, at least 32 bits wide."""
    return np.dtype(f"i{max(4, dtype.itemsize)}")


def largest_key(dtype: np.dtype) -> np.integer:
    """The largest key of entries of a type, or of keys: that of a NaN."""
    if jnp.issubdtype(dtype, jnp.integer):
        dtype = np.dtype(f"f{dtype.itemsize}")
    return key_dtype(dtype).type(np.array(np.inf, dtype).view(f"i{dtype.itemsize}") + 1)


class TieOrder(NamedTuple):
    """The order in which ties are kept: row-major, or with a salt a pseudo-random one."""

    size: int
    salt: jax.Array | None

    @property
    def bits(self) -> int:
        """Positions of a salted order have so many bits."""
        return min(30, max(1, (self.size - 1).bit_length()))

    @property
    def end(self) -> int:
        """One more than the last position."""
        return self.size if self.salt is None else max(self.size, 2**self.bits)

    def position(self, index: jax.Array) -> jax.Array:
        """The position of each row-major index: one-to-one, whatever the salt.

        Adding a constant, multiplying by an odd number and xoring with a right shift each permute
        the integers of `bits` bits. All bits of the salt enter each of them, because a small leaf
        would otherwise have as many orders as entries. Indices beyond 2**30 keep their positions.
        """
        return index if self.salt is None else _salted(self.bits, index, self.salt)


@functools.partial(jax.jit, static_argnums=0)  # Traced once for all that ask for positions.
def _salted(bits: int, index: jax.Array, salt: jax.Array) -> jax.Array:
    mask, shift = np.uint32(2**bits - 1), np.uint32((bits + 1) // 2)
    mixed = index.astype(jnp.uint32)
    for odd in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35):
        key = salt * np.uint32(odd)
        key = key ^ (key >> np.uint32(15))
        mixed = ((mixed + key) * (np.uint32(odd) ^ (key << np.uint32(1)))) & mask
        mixed = mixed ^ (mixed >> shift)
    return jnp.where(index < 2**bits, mixed.astype(jnp.int32), index)


def row_major(shape: tuple[int, ...], origin: jax.Array | int = 0) -> jax.Array:
    """Row-major index of every entry plus origin, without a reshape."""
    index = jnp.full(shape, origin, jnp.int32)
    for axis in range(len(shape)):
        stride = np.int32(math.prod(shape[axis + 1 :]))
        index += stride * lax.broadcasted_iota(jnp.int32, shape, axis)
    return index
