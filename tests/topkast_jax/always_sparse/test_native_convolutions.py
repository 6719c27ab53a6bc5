"""The CPU's compiled convolutions and sums over channels against NumPy, and what they refuse."""

import convolution_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from products_oracle import assert_close

from topkast_jax.always_sparse.products import native_convolutions as native

NONE = ((0, 0), (0, 0))

pytestmark = pytest.mark.usefixtures("native_cpu")


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def check(batch, size, channels, window, strides, padding, seed=0):
    """All three functions against the definition."""
    where = native.geometry(size, window, strides, padding)
    x, kernel, dy = normal(
        seed,
        (batch, *size, channels[0]),
        (*window, *channels),
        (batch, *where.outputs, channels[1]),
    )
    if 0 in where.outputs:
        y, dx, dkernel = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(kernel.shape)
    else:
        y = oracle.convolved(x, kernel, strides, padding)
        dx, dkernel = oracle.gradients(x, kernel, dy, strides, padding)
    assert_close(native.convolve(where, x, kernel), y, 1e-5)
    assert_close(native.gradient_by_images(where, dy, kernel), dx, 1e-5)
    assert_close(native.gradient_by_kernel(where, x, dy), dkernel, 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 5),
    size=pairs(1, 19),
    channels=pairs(1, 70),
    window=pairs(1, 7),
    strides=pairs(1, 3),
    padding=st.one_of(st.just(NONE), st.tuples(pairs(0, 9), pairs(0, 9))),
    seed=st.integers(0, 99),
)
def test_any_convolution(batch, size, channels, window, strides, padding, seed):
    """Among them kernels larger than the images, and paddings larger than the kernel."""
    check(batch, size, channels, window, strides, padding, seed)


@pytest.mark.parametrize(
    ("batch", "size", "channels", "window", "strides", "padding"),
    [
        # Several parts of an image's lines, and of a chunk of the outputs' gradients.
        (2, (90, 40), (40, 70), (3, 3), (1, 1), ((1, 1), (1, 1))),
        (1, (90, 90), (3, 64), (7, 7), (2, 2), ((3, 3), (3, 3))),
        (50, (14, 12), (20, 33), (3, 2), (1, 2), ((1, 1), (0, 1))),  # Several images in a chunk.
        (2, (5, 6), (140, 300), (3, 3), (1, 1), ((1, 1), (1, 1))),  # A kernel larger than images.
        # Kernels that are too large for sums of each part: images and lines in several chunks.
        (5, (14, 14), (80, 100), (3, 3), (2, 1), ((1, 1), (1, 1))),
        (1, (40, 60), (300, 250), (1, 1), (1, 1), NONE),
        (3, (9, 8), (70, 40), (1, 1), (2, 3), NONE),
        (2, (0, 4), (3, 5), (2, 2), (1, 1), ((1, 1), (1, 1))),
    ],
)
def test_sizes_that_take_several_parts(batch, size, channels, window, strides, padding):
    check(batch, size, channels, window, strides, padding)


def test_gradients_of_gradients_are_those_of_xla():
    strides, padding = (2, 1), ((1, 0), (1, 2))
    x, kernel = normal(0, (2, 7, 6, 5), (3, 2, 5, 4))
    where = native.geometry(x.shape[1:3], kernel.shape[:2], strides, padding)

    def by_xla(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def second(convolve):
        loss = lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel)))  # noqa: E731

        def squares(x, kernel):
            return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(x, kernel))

        return jax.jit(jax.grad(squares, (0, 1)))(x, kernel)

    found = second(lambda x, kernel: native.convolve(where, x, kernel))
    for one, expected in zip(found, second(by_xla), strict=True):
        assert_close(one, expected, 1e-5)


def test_inside_vmap():
    x, kernel = normal(0, (3, 2, 6, 5, 4), (3, 3, 3, 4, 7))
    where = native.geometry((6, 5), (3, 3), (1, 1), NONE)
    for axes in ((0, 0), (0, None)):
        kernels = kernel if axes[1] == 0 else kernel[0]
        found = jax.vmap(lambda x, w: native.convolve(where, x, w), axes)(x, kernels)
        for i in range(3):
            one = kernels[i] if axes[1] == 0 else kernels
            assert_close(found[i], oracle.convolved(x[i], one, (1, 1), NONE), 1e-5)


def test_shapes_that_do_not_fit_are_an_error_and_read_nothing():
    x, kernel, dy = normal(0, (2, 6, 5, 4), (3, 3, 4, 7), (2, 4, 3, 7))
    where = native.geometry((6, 5), (3, 3), (1, 1), NONE)
    wrong = [
        lambda: native.convolve(where, x[..., :3], kernel),
        lambda: native.convolve(where, x, kernel[:, :, :3]),
        lambda: native.convolve(where._replace(strides=(0, 1)), x, kernel),
        lambda: native.convolve(where._replace(padding=(1,)), x, kernel),
        lambda: native.convolve(where, x[0], kernel),
        lambda: native.gradient_by_images(where, dy[..., :6], kernel),
        lambda: native.gradient_by_kernel(where, x[:1], dy),
        lambda: native.gradient_by_kernel(where._replace(strides=(1, -1)), x, dy),
        lambda: native.gradient_by_kernel(where, x, dy[0]),
        lambda: native.max_pool_gradient(jnp.zeros(dy.shape, jnp.int8), dy, (9, 5)),
        lambda: native.max_pool_gradient(jnp.zeros((2, 4, 2, 7), jnp.int8), dy, (8, 5)),
        lambda: native.max_pool_gradient(jnp.zeros(dy.shape), dy, (8, 5)),
        lambda: native.channel_sums(x, dy, jnp.zeros(4)),
        lambda: native.channel_sums(x, x, jnp.zeros(3)),
        lambda: native.channel_sums(x, x, jnp.zeros(4), (jnp.zeros(4), jnp.zeros(3))),
        lambda: native.channel_sums(x, x, jnp.zeros(4), (jnp.zeros(5), jnp.zeros(4))),
    ]
    for call in wrong:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            jax.block_until_ready(call())
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit each other"):
        jax.block_until_ready(wrong[0]())


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 700),
    channels=st.integers(1, 70),
    rectified=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sums_over_channels(rows, channels, rectified, seed):
    """Eighths, so that no rounding decides what is positive."""
    shapes = [(rows, 1, channels)] * 2 + [(channels,)] * 3
    x, y, shift, factor, constant = (jnp.round(8 * a) / 8 for a in normal(seed, *shapes))
    x64, y64, shift64, factor64, constant64 = (
        np.asarray(a, np.float64) for a in (x, y, shift, factor, constant)
    )
    centred = x64 - shift64
    if rectified:
        y64 = np.where(centred * factor64 + constant64 > 0, y64, 0)
    sums = native.channel_sums(x, y, shift, (factor, constant) if rectified else None)
    assert_close(sums, [y64.sum((0, 1)), (y64 * centred).sum((0, 1))], 1e-5)
