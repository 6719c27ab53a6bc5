"""Convolutions of images whose gradients are fast on a CPU too."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

Padding = tuple[tuple[int, int], tuple[int, int]]
Convolution = Callable[[jax.Array, jax.Array], jax.Array]


def convolution(strides: tuple[int, int], padding: Padding, *, pointwise: bool) -> Convolution:
    """A function that convolves images with a dense kernel of the same dtype.

    It takes images [batch, height, width, inputs] and a kernel [height, width, inputs, outputs],
    and returns images [batch, height, width, outputs].

    Args:
        strides: of the window, down and across.
        padding: zeros (above, below) and (left, right) of each image.
        pointwise: whether the kernel is 1×1. Such a convolution has no forward-mode derivative.
    """

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    if not pointwise or AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return convolve  # A product over a sharded batch has no sharding of its own.
    return _with_fast_gradient(convolve, strides, padding)


def _with_fast_gradient(
    convolve: Convolution, strides: tuple[int, int], padding: Padding
) -> Convolution:
    """A 1×1 convolution whose gradient by the kernel is a matrix product on a CPU.

    XLA writes this gradient as a convolution with the batch as channels. On a CPU that form takes
    several times as long as the product, and its transposed copies recompute what precedes them.
    """

    def of_kernel(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(gradient)[0]

    def product(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))[:, :: strides[0], :: strides[1]]
        inputs, outputs = kernel.shape[2:]
        # In two dimensions, XLA passes both operands to the product without a transposed copy.
        return (x.reshape(-1, inputs).T @ gradient.reshape(-1, outputs)).reshape(kernel.shape)

    def backward(
        residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        x, kernel = residuals
        (of_x,) = jax.linear_transpose(lambda x: convolve(x, kernel), x)(gradient)
        return of_x, jax.lax.platform_dependent(x, kernel, gradient, cpu=product, default=of_kernel)

    fast = jax.custom_vjp(convolve)
    fast.defvjp(lambda x, kernel: (convolve(x, kernel), (x, kernel)), backward)
    return fast
