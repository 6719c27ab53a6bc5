"""Convolutions of images that are fast on a CPU too."""

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
    and returns images [batch, height, width, outputs]. It has no forward-mode derivative.

    On a CPU, a 1×1 kernel is applied by a matrix product, and the gradient by any kernel is one
    product for each row of the kernel. XLA writes that gradient as a convolution with the batch as
    channels, which on a CPU takes longer than the products.

    Args:
        strides: of the window, down and across.
        padding: zeros (above, below) and (left, right) of each image.
        pointwise: whether the kernel is 1×1.
    """

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]

    def by_rows(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
        """The gradient by the kernel."""
        _, width, inputs, outputs = kernel.shape
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        # In two dimensions, XLA passes both operands to a product without a transposed copy.
        gradients = gradient.reshape(-1, outputs)

        def of_row(i: int) -> jax.Array:
            seen = [_window(x, (i, j), gradient.shape[1:3], strides) for j in range(width)]
            patches = jnp.concatenate(seen, axis=-1).reshape(-1, width * inputs)
            # A product of many terms takes less time with more columns than rows.
            if outputs < width * inputs:
                return (gradients.T @ patches).reshape(outputs, width, inputs).transpose(1, 2, 0)
            return (patches.T @ gradients).reshape(width, inputs, outputs)

        return jnp.stack([of_row(i) for i in range(kernel.shape[0])])

    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return convolve  # A product over a sharded batch has no sharding of its own.
    forward = _by_platform(multiply, convolve) if pointwise else convolve

    def backward(
        operands: tuple[jax.Array, jax.Array], gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def of_x(form: Convolution) -> Callable[..., jax.Array]:
            return lambda x, kernel, g: jax.linear_transpose(lambda x: form(x, kernel), x)(g)[0]

        def of_kernel(x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
            return jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(g)[0]

        by_x = _by_platform(of_x(multiply), of_x(convolve)) if pointwise else of_x(convolve)
        return by_x(*operands, gradient), _by_platform(by_rows, of_kernel)(*operands, gradient)

    fast = jax.custom_vjp(forward)
    fast.defvjp(lambda x, kernel: (forward(x, kernel), (x, kernel)), backward)
    return fast


def _by_platform(
    on_cpu: Callable[..., jax.Array], elsewhere: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    return lambda *args: jax.lax.platform_dependent(*args, cpu=on_cpu, default=elsewhere)


def _window(
    x: jax.Array, start: tuple[int, int], shape: tuple[int, ...], strides: tuple[int, int]
) -> jax.Array:
    """The entries of padded images that one entry of the kernel sees, `[batch, *shape, inputs]`."""
    rows, columns = (
        slice(first, first + max(0, step * (count - 1) + 1), step)
        for first, count, step in zip(start, shape, strides, strict=True)
    )
    return x[:, rows, columns]
