"""Convolutions of images that are fast on a CPU too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from experiments.processor import instruction_set
from topkast_jax.always_sparse.products import native_convolutions as ours
from topkast_jax.always_sparse.products import native_library

Padding = tuple[tuple[int, int], tuple[int, int]]
Convolution = Callable[[jax.Array, jax.Array], jax.Array]
Sums = tuple[jax.Array, jax.Array]


def convolution(strides: tuple[int, int], padding: Padding, *, pointwise: bool) -> Convolution:
    """A function that convolves images with a dense kernel of the same dtype.

    It takes images [batch, height, width, inputs] and a kernel [height, width, inputs, outputs],
    and returns images [batch, height, width, outputs]. It has no forward-mode derivative.

    On one CPU, where `build_native` has compiled them, our own convolutions are used in float32.
    Otherwise, and without AVX-512, where XLA's products take less time, a 1×1 kernel is applied by
    a matrix product on a CPU. Without ours, the gradient by any kernel is one product for each row
    of the kernel. XLA writes that gradient as a convolution with the batch as channels, which on a
    CPU takes longer than the products.

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

    multiplies = pointwise and instruction_set() != "AVX-512"

    def native(x: jax.Array, kernel: jax.Array) -> ours.Geometry | None:
        """The geometry for the compiled functions, where they are used."""
        if not is_compiled_for(x):
            return None
        return ours.geometry(x.shape[1:3], kernel.shape[:2], strides, padding)

    def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
        where = native(x, kernel)
        if where and not multiplies:
            return by_platform(functools.partial(ours.convolve, where), convolve)(x, kernel)
        return by_platform(multiply, convolve)(x, kernel) if pointwise else convolve(x, kernel)

    def backward(
        operands: tuple[jax.Array, jax.Array], gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def of_x(form: Convolution) -> Callable[..., jax.Array]:
            return lambda x, kernel, g: jax.linear_transpose(lambda x: form(x, kernel), x)(g)[0]

        def of_kernel(x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
            return jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(g)[0]

        args = *operands, gradient
        by_x = of_x(multiply if pointwise else convolve)
        by_kernel: Callable[..., jax.Array] = by_rows
        if where := native(*operands):
            by_kernel = lambda x, kernel, g: ours.gradient_by_kernel(where, x, g)  # noqa: E731
            if not multiplies:
                by_x = lambda x, kernel, g: ours.gradient_by_images(where, g, kernel)  # noqa: E731
        return by_platform(by_x, of_x(convolve))(*args), by_platform(by_kernel, of_kernel)(*args)

    fast = jax.custom_vjp(forward)
    fast.defvjp(lambda x, kernel: (forward(x, kernel), (x, kernel)), backward)
    return fast


def channel_sums(
    x: jax.Array,
    y: jax.Array,
    shift: jax.Array,
    positive: tuple[jax.Array, jax.Array] | None = None,
) -> Sums:
    """Sums of y and of y·(x − shift) over all axes but the last; without a derivative.

    XLA goes over the arrays once for each sum on a CPU, and our compiled function once for both.

    Args:
        x: [..., channels].
        y: of the same shape; may be x itself.
        shift: [channels].
        positive: a factor and a constant, [channels] each; the sums are over the entries where
            (x − shift)·factor + constant is positive. None: over all entries.

    Returns:
        Both sums, [channels].
    """

    def by_xla(x: jax.Array, y: jax.Array, shift: jax.Array, *above: jax.Array) -> Sums:
        axes = tuple(range(x.ndim - 1))
        shift, *above_x = (a.reshape((1,) * len(axes) + a.shape) for a in (shift, *above))
        centred = x - shift
        if above_x:
            factor, constant = above_x
            y = jnp.where(centred * factor + constant > 0, y, 0)
        return jnp.sum(y, axes), jnp.sum(y * centred, axes)

    def compiled(x: jax.Array, y: jax.Array, shift: jax.Array, *above: jax.Array) -> Sums:
        sums = ours.channel_sums(x, y, shift, (above[0], above[1]) if above else None)
        return sums[0], sums[1]

    form = by_platform(compiled, by_xla) if is_compiled_for(x) else by_xla
    both: Sums = form(x, y, shift, *(positive or ()))
    return both


def is_compiled_for(x: jax.Array) -> bool:
    """Whether a CPU has compiled functions for `x`; XLA cannot divide them between devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return x.dtype == jnp.float32 and mesh.size <= 1 and native_library.unavailable() is None


def by_platform(on_cpu: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    """The function that is the one or the other where it is compiled for a platform."""
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
