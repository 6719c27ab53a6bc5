"""The two products every model is built from.

A model hands its kernel to `matmul` or `conv` and never asks what the kernel is.
"""

from typing import Any

import jax
import jax.numpy as jnp

Kernel = Any  # an array; a compact kernel has its own product
Padding = tuple[tuple[int, int], tuple[int, int]]


def matmul(x: jax.Array, kernel: Kernel) -> jax.Array:
    """Multiplies the last axis of `x` with `kernel` (inputs × outputs), in the dtype of `x`."""
    return jnp.matmul(x, kernel.astype(x.dtype))


def conv(x: jax.Array, kernel: Kernel, strides: tuple[int, int], padding: Padding) -> jax.Array:
    """Convolves `x` (batch, height, width, channels) with an HWIO `kernel`, in the dtype of `x`."""
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
