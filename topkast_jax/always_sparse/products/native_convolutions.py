"""Convolutions, sums over channels and maxima of images on a CPU, by `native_convolutions.cc`.

Each of the three functions of a convolution is linear in both of its arrays, and the gradients by
these are the other two: reverse mode works to any order. The other functions have no gradient. All
of them compute in float32 alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.always_sparse.products import native_library

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """How a convolution slides its kernel; each pair is for the axes down and across.

    Attributes:
      strides: of the window.
      padding: zeros before the first entry. Those after the last follow from `outputs`.
      images: height and width.
      kernel: height and width.
      outputs: height and width.
    """

    strides: Pair
    padding: Pair
    images: Pair
    kernel: Pair
    outputs: Pair


def geometry(
    images: Sequence[int], kernel: Sequence[int], strides: Pair, padding: tuple[Pair, Pair]
) -> Geometry:
    """The geometry of a convolution.

    Args:
      images: height and width.
      kernel: height and width.
      strides: of the window, down and across.
      padding: zeros (above, below) and (left, right) of each image.
    """
    outputs = [
        max(0, (size + sum(pads) - window) // stride + 1)
        for size, window, stride, pads in zip(images, kernel, strides, padding, strict=True)
    ]
    (above, _), (left, _) = padding
    return Geometry(strides, (above, left), _pair(images), _pair(kernel), _pair(outputs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(where: Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Images convolved with a kernel.

    Args:
      where: the geometry.
      x: float32 images [batch, height, width, inputs].
      kernel: float32 [height, width, inputs, outputs].

    Returns:
      float32 images [batch, *where.outputs, outputs].

    Raises:
      RuntimeError: the library cannot be used.
      jax.errors.JaxRuntimeError: when it runs, if the shapes do not fit each other.
    """
    return _convolution(where, x, kernel, where.outputs, transposed=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gradient_by_images(where: Geometry, dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient by the images of a convolution.

    Args:
      where: the geometry.
      dy: float32 [batch, *where.outputs, outputs], gradient of the outputs.
      kernel: float32 [height, width, inputs, outputs].

    Returns:
      float32 images [batch, *where.images, inputs].

    Raises:
      RuntimeError, jax.errors.JaxRuntimeError: as in `convolve`.
    """
    return _convolution(where, dy, kernel, where.images, transposed=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gradient_by_kernel(where: Geometry, x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient by the kernel of a convolution.

    Args:
      where: the geometry.
      x: float32 images [batch, height, width, inputs].
      dy: float32 [batch, *where.outputs, outputs], gradient of the outputs.

    Returns:
      float32 [*where.kernel, inputs, outputs].

    Raises:
      RuntimeError, jax.errors.JaxRuntimeError: as in `convolve`.
    """
    (dkernel,) = native_library.call(
        "topkast_convolution_kernel_gradient",
        [((*where.kernel, x.shape[-1], dy.shape[-1]), jnp.float32)],
        (x, dy),
        strides=np.array(where.strides, np.int64),
        padding=np.array(where.padding, np.int64),
    )
    return dkernel


convolve.defvjp(
    lambda where, x, kernel: (convolve(where, x, kernel), (x, kernel)),
    lambda where, operands, dy: (
        gradient_by_images(where, dy, operands[1]),
        gradient_by_kernel(where, operands[0], dy),
    ),
)
gradient_by_images.defvjp(
    lambda where, dy, kernel: (gradient_by_images(where, dy, kernel), (dy, kernel)),
    lambda where, operands, x: (
        convolve(where, x, operands[1]),
        gradient_by_kernel(where, x, operands[0]),
    ),
)
gradient_by_kernel.defvjp(
    lambda where, x, dy: (gradient_by_kernel(where, x, dy), (x, dy)),
    lambda where, operands, kernel: (
        gradient_by_images(where, operands[1], kernel),
        convolve(where, operands[0], kernel),
    ),
)


def channel_sums(
    x: jax.Array,
    y: jax.Array,
    shift: jax.Array,
    positive: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Sums of y and of y·(x − shift) over all axes but the last, in one pass over both arrays.

    Args:
      x: float32 [..., channels].
      y: float32, of the same shape; x itself is read once.
      shift: float32 [channels].
      positive: a factor and a constant, float32 [channels] each; the sums are over the entries
        where (x − shift)·factor + constant is positive. None: over all entries.

    Returns:
      float32 [2, channels].

    Raises:
      RuntimeError, jax.errors.JaxRuntimeError: as in `convolve`.
    """
    channels = x.shape[-1]
    matrices = x.reshape(-1, channels), y.reshape(-1, channels)
    (sums,) = native_library.call(
        "topkast_channel_sums",
        [((2, channels), jnp.float32)],
        (*matrices, shift, *(positive or (shift, shift))),
        rectified=positive is not None,
    )
    return sums


def max_pool(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maxima over windows of 3×3, with stride 2 and one row of padding on each side.

    Args:
      x: float32 images [batch, height, width, channels].

    Returns:
      float32 [batch, ⌈height / 2⌉, ⌈width / 2⌉, channels]; and as int8 of the same shape, which of
      the 9 entries of its window each maximum is, row by row: of equal ones the first, and a NaN
      where there is one.

    Raises:
      RuntimeError: the library cannot be used.
    """
    batch, height, width, channels = x.shape
    shape = (batch, -(-height // 2), -(-width // 2), channels)
    results = [(shape, jnp.float32), (shape, jnp.int8)]
    y, chosen = native_library.call("topkast_max_pool", results, (x,))
    return y, chosen


def max_pool_gradient(chosen: jax.Array, dy: jax.Array, images: Pair) -> jax.Array:
    """The gradient by the images of `max_pool`; it has no gradient itself.

    Args:
      chosen: what `max_pool` returns second.
      dy: float32 of the same shape, gradient of the maxima.
      images: height and width.

    Returns:
      float32 images [batch, *images, channels].

    Raises:
      RuntimeError, jax.errors.JaxRuntimeError: as in `convolve`.
    """
    shape = (dy.shape[0], *images, dy.shape[-1])
    results = [(shape, jnp.float32)]
    (dx,) = native_library.call("topkast_max_pool_gradient", results, (chosen, dy))
    return dx


def _convolution(
    where: Geometry, x: jax.Array, kernel: jax.Array, shape: Pair, *, transposed: bool
) -> jax.Array:
    outputs = kernel.shape[2 if transposed else 3]
    (y,) = native_library.call(
        "topkast_convolution",
        [((x.shape[0], *shape, outputs), jnp.float32)],
        (x, kernel),
        strides=np.array(where.strides, np.int64),
        padding=np.array(where.padding, np.int64),
        transposed=transposed,
    )
    return y


def _pair(sizes: Sequence[int]) -> Pair:
    height, width = sizes
    return height, width
