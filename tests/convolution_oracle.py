"""Convolutions of images by their definition, in float64: what the tests compare with."""

import numpy as np


def windows(x, size, strides):
    """The entries of padded images that each entry of a kernel sees: slices, in row-major order."""
    spans = [
        [slice(first, first + steps * step + 1, step) for first in range(length)]
        for length, step, steps in zip(
            size,
            strides,
            ((n - k) // s for n, k, s in zip(x.shape[1:3], size, strides, strict=True)),
            strict=True,
        )
    ]
    return [(slice(None), rows, columns) for rows in spans[0] for columns in spans[1]]


def padded(x, padding):
    return np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))


def convolved(x, kernel, strides, padding):
    """Images [batch, height, width, outputs]."""
    x, kernel = padded(x, padding), np.asarray(kernel, np.float64)
    taps = kernel.reshape(-1, *kernel.shape[2:])
    seen = windows(x, kernel.shape[:2], strides)
    return sum(x[window] @ tap for window, tap in zip(seen, taps, strict=True))


def gradients(x, kernel, dy, strides, padding):
    """The gradients of the sum of y·dy by the images and by the kernel."""
    x, kernel, dy = padded(x, padding), np.asarray(kernel, np.float64), np.asarray(dy, np.float64)
    taps = kernel.reshape(-1, *kernel.shape[2:])
    dx, dtaps = np.zeros_like(x), np.zeros_like(taps)
    for i, window in enumerate(windows(x, kernel.shape[:2], strides)):
        dx[window] += dy @ taps[i].T
        dtaps[i] = np.einsum("nhwi,nhwo->io", x[window], dy)
    (above, below), (left, right) = padding
    inner = dx[:, above : dx.shape[1] - below, left : dx.shape[2] - right]
    return inner, dtaps.reshape(kernel.shape)
