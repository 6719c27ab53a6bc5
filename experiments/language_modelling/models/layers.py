"""The layers of which attention, feed-forward blocks and embeddings consist."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.layers import along_last, matmul

INIT_STD = 0.02
PROJECTION_STD = 0.01


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float = INIT_STD) -> jax.Array:
    """Float32 numbers from N(0, std²)."""
    return std * jax.random.normal(rngs.params(), shape, jnp.float32)


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability `rate` and scales the others; no dropout without `rng`."""
    if rng is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def split(rng: jax.Array | None, n: int) -> list[jax.Array | None]:
    """Splits a key into `n` keys; None gives `n` times None."""
    return [None] * n if rng is None else list(jax.random.split(rng, n))


def sinusoids(length: int, width: int, clamp: int, dtype: jnp.dtype) -> jax.Array:
    """Position embeddings of the distances length-1, …, 0, at most `clamp` if that is positive.

    Returns:
      [length, width]: sines, then cosines.
    """
    distance_K = jnp.arange(length - 1, -1, -1, dtype=jnp.float32)
    if clamp > 0:
        distance_K = jnp.minimum(distance_K, float(clamp))
    frequency = 1.0 / (10000.0 ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width))
    angle = distance_K[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).astype(dtype)


class Linear(nnx.Module):
    """x·W, or x·W + b with `bias`; kernel [d_in, d_out]."""

    def __init__(self, d_in: int, d_out: int, rngs: nnx.Rngs, *, bias: bool = False):
        self.kernel = nnx.Param(normal(rngs, (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros((d_out,))) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d_in] → [..., d_out]."""
        y = matmul(x, self.kernel.get_value())
        return y if self.bias is None else y + along_last(self.bias.get_value(), y)


class LayerNorm(nnx.Module):
    """Normalises the last axis, then scales and shifts it; computes in float32."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.scale = nnx.Param(1.0 + normal(rngs, (width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] → the same shape and type."""
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
        y = y * along_last(self.scale.get_value(), y) + along_last(self.bias.get_value(), y)
        return y.astype(x.dtype)
