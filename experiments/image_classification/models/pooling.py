"""A maximum over windows of images whose gradient is fast on a CPU too."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

_PADDING = ((0, 0), (1, 1), (1, 1), (0, 0))
_OFFSETS = tuple(itertools.product(range(3), repeat=2))


def max_pool_3x3(x: jax.Array) -> jax.Array:
    """The maximum over windows of 3×3, with stride 2 and one row of padding on each side.

    It has no forward-mode derivative. Of equal entries of a window, the first one gets the
    gradient, as in XLA's own derivative; on a CPU, a window with a NaN gives none. On a CPU,
    XLA's own derivative goes over windows of indices; this one is a sum of slices.

    Args:
      x: images [batch, height, width, channels].

    Returns:
      images [batch, ⌈height / 2⌉, ⌈width / 2⌉, channels].
    """
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return _pool(x)  # What the slices are put together to has no sharding of its own.
    return _pool_with_gradient(x)


def _pool(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), _PADDING)


@jax.custom_vjp
def _pool_with_gradient(x: jax.Array) -> jax.Array:
    return _pool(x)


def _forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _pool(x)
    return y, (x, y)


def _backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
    x, y = residuals

    def elsewhere(x: jax.Array, y: jax.Array, gradient: jax.Array) -> jax.Array:
        del y
        return jax.vjp(_pool, x)[1](gradient)[0]

    return (jax.lax.platform_dependent(x, y, gradient, cpu=_by_slices, default=elsewhere),)


def _by_slices(x: jax.Array, y: jax.Array, gradient: jax.Array) -> jax.Array:
    batch, rows, columns, channels = y.shape
    padded = jnp.pad(x, _PADDING, constant_values=-jnp.inf)
    chosen = jnp.full(y.shape, -1, jnp.int8)
    for k, (i, j) in reversed(list(enumerate(_OFFSETS))):
        window = padded[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
        chosen = jnp.where(window == y, jnp.int8(k), chosen)

    # The padded row 2r is the first of window r and the last of window r - 1; row 2r + 1 is in the
    # middle of window r. So it is with the columns.
    def of_parity(odd_row: int, odd_column: int) -> jax.Array:
        shares = []
        for k, (i, j) in enumerate(_OFFSETS):
            if (i % 2, j % 2) == (odd_row, odd_column):
                share = jnp.where(chosen == k, gradient, 0)
                after = ((i // 2, 1 - i // 2), (j // 2, 1 - j // 2))
                shares.append(jnp.pad(share, ((0, 0), *after, (0, 0))))
        return sum(shares[1:], shares[0])

    pairs = [jnp.stack([of_parity(i, j) for j in (0, 1)], axis=3) for i in (0, 1)]
    whole = jnp.stack(pairs, axis=2).reshape(batch, 2 * rows + 2, 2 * columns + 2, channels)
    return whole[:, 1 : 1 + x.shape[1], 1 : 1 + x.shape[2]]


_pool_with_gradient.defvjp(_forward, _backward)
