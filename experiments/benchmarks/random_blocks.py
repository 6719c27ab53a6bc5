"""Random compact kernels on a device, and the densities that benches name."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax import Block, Unstructured
from topkast_jax.always_sparse import CompactKernel
from topkast_jax.selection import keep_count

DENSITIES = {"80/60": (0.2, 0.4), "90/80": (0.1, 0.2), "95/90": (0.05, 0.1)}
"""Forward and backward density by forward/backward sparsity in percent."""


def random_array(seed: int, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> jax.Array:
    """Normal numbers of this standard deviation, made where they are used."""
    make = jax.jit(lambda key: (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype))
    found: jax.Array = make(jax.random.key(seed))
    return found


def random_kernel(
    seed: int,
    shape: tuple[int, int],
    pattern: Block | Unstructured,
    densities: tuple[float, float],
    dtype: str,
    empty: bool = False,
) -> CompactKernel:
    """A compact kernel whose units lie anywhere, those of A and of B∖A each in ascending order.

    Args:
        seed: of the indices and the values.
        shape: K and N.
        pattern: of the units.
        densities: of A and of B, which holds A.
        dtype: of the values.
        empty: no unit lies in the first row and in the last column of the grid of units. Both
            need two at least.
    """
    grid = pattern.grid(shape)
    allowed = np.ones(grid, bool)
    if empty:
        allowed[0], allowed[:, -1] = False, False
    places = np.flatnonzero(allowed)
    a, b = (min(places.size, keep_count(math.prod(grid), density)) for density in densities)
    chosen = np.random.default_rng(seed).permutation(places)[:b]
    index = np.concatenate([np.sort(chosen[:a]), np.sort(chosen[a:])]).astype(np.int32)
    values = random_array(seed, (b, *pattern.unit_shape), dtype, shape[0] ** -0.5)
    return CompactKernel(values, jnp.asarray(index), shape, pattern, a)
