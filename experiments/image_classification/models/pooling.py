"""A maximum over windows of images whose gradient is fast on a CPU too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from experiments.convolutions import by_platform, is_compiled_for
from topkast_jax.always_sparse.products import native_convolutions as ours


def max_pool_3x3(x: jax.Array) -> jax.Array:
    """The maximum over windows of 3×3, with stride 2 and one row of padding on each side.

    Of equal entries of a window, the first one gets the gradient. On one CPU, where `build_native`
    has compiled them, our own functions are used in float32, which have no forward-mode derivative.

    Args:
      x: images [batch, height, width, channels].

    Returns:
      images [batch, ⌈height / 2⌉, ⌈width / 2⌉, channels].
    """
    # What has an explicit sharding is not divided between devices by hand.
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return _pool(x) if explicit or not is_compiled_for(x) else _compiled_pool(x)


def _pool(x: jax.Array) -> jax.Array:
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


@jax.custom_vjp
def _compiled_pool(x: jax.Array) -> jax.Array:
    return _forward(x)[0]


def _forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def elsewhere(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = _pool(x)
        return y, jnp.zeros(y.shape, jnp.int8)

    y, chosen = by_platform(ours.max_pool, elsewhere)(x)
    return y, (x, chosen)


def _backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
    def on_cpu(x: jax.Array, chosen: jax.Array, gradient: jax.Array) -> jax.Array:
        return ours.max_pool_gradient(chosen, gradient, (x.shape[1], x.shape[2]))

    def elsewhere(x: jax.Array, _: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.vjp(_pool, x)[1](gradient)[0]

    return (by_platform(on_cpu, elsewhere)(*residuals, gradient),)


_compiled_pool.defvjp(_forward, _backward)
