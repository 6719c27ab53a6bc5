"""Products of few tokens with constant fan-in, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topkast_jax import Block, FanIn, SparsityError, Unstructured
from topkast_jax.always_sparse import by_output, from_masks, is_compact, matmul
from topkast_jax.always_sparse.fan_in import FEW


def masked(rng, k, n, a, b):
    """A dense leaf, and sets in which each output has a inputs in A and b in B."""
    rank = rng.permuted(np.tile(np.arange(k)[:, None], n), axis=0)
    return rng.standard_normal((k, n), np.float32), rank < a, rank < b


def compact(rng, k, n, a, b):
    dense, forward, backward = masked(rng, k, n, a, b)
    return np.where(forward, dense, 0), from_masks(dense, forward, backward, FanIn())


@jax.jit
def product_and_gradients(by, x, dy):
    y, back = jax.vjp(lambda x, values: matmul(x, kernel_of(by, values)), x, by.values)
    return y, *back(dy)


@settings(deadline=None, max_examples=12)
@given(st.data(), st.integers(1, 24), st.integers(1, 8), st.integers(1, 9), st.integers(0, 2**31))
def test_products_and_gradients_are_those_of_the_dense_leaf(data, k, n, tokens, seed):
    a = data.draw(st.integers(1, k))
    rng = np.random.default_rng(seed)
    alpha, kernel = compact(rng, k, n, a, data.draw(st.integers(a, k)))
    x, dy = rng.standard_normal((tokens, k), np.float32), rng.standard_normal((tokens, n))
    by = by_output(kernel)
    assert by.index.shape == by.values.shape == (n, a)
    assert (np.diff(by.index) > 0).all()
    y, dx, dvalues = product_and_gradients(by, x, np.float32(dy))
    np.testing.assert_allclose(y, x @ alpha, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, dy @ alpha.T, rtol=1e-4, atol=1e-4)
    dense = np.take_along_axis((x.T @ dy).T, by.index, axis=1)
    np.testing.assert_allclose(dvalues, dense, rtol=1e-4, atol=1e-4)


def kernel_of(by, values):
    return by.__class__(values, by.index, by.inputs)


def test_few_tokens_make_no_tile_and_many_do():
    k, n, a = 96, 40, 6
    _, kernel = compact(np.random.default_rng(0), k, n, a, a)
    by = jax.tree.map(jnp.asarray, by_output(kernel))
    few = int(FEW * k / a)
    for tokens, tile in ((1, False), (few, False), (few + 1, True)):
        text = jax.jit(matmul).lower(jnp.ones((tokens, k)), by).as_text()
        assert ("tensor<96x40x" in text) == tile


def test_a_stack_in_a_loop_and_other_dtypes():
    rng = np.random.default_rng(1)
    leaves = [masked(rng, 12, 5, 3, 4) for _ in range(3)]
    kernel = from_masks(*(np.stack(x) for x in zip(*leaves, strict=True)), FanIn(), stacked=True)
    by = by_output(kernel)
    assert by.index.shape == (3, 5, 3)
    x = rng.standard_normal((2, 1, 12), np.float32)
    _, ys = jax.lax.scan(lambda _, w: (None, matmul(jnp.asarray(x), w)), None, by)
    for y, (dense, forward, _) in zip(ys, leaves, strict=True):
        np.testing.assert_allclose(y, x @ np.where(forward, dense, 0), rtol=1e-5, atol=1e-5)
    first = jax.tree.map(lambda w: w[0], by)
    assert matmul(jnp.bfloat16(x), first).dtype == jnp.float32
    assert matmul(jnp.bfloat16(x), first.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(SparsityError, match=r"a stack of \(3,\) kernels"):
        matmul(x, by)


def test_mistakes():
    rng = np.random.default_rng(2)
    _, kernel = compact(rng, 12, 5, 3, 4)
    with pytest.raises(SparsityError, match=r"x of shape \(2, 11\) .* \(12, 5\)"):
        matmul(jnp.ones((2, 11)), by_output(kernel))
    for inputs in ((3, 1), (3, 0)):
        kept = np.arange(4)[:, None] < inputs
        uneven = from_masks(np.ones((4, 2)), kept, kept, FanIn())
        found = f"{inputs[1]} to {inputs[0]}"
        with pytest.raises(SparsityError, match=f"every output must have as many .*found {found}"):
            by_output(uneven)
    for pattern in (Unstructured(), Block(2, 5)):
        dense = np.ones((4, 5), np.float32)
        other = from_masks(dense, dense > 0, dense > 0, pattern)
        assert is_compact(other)
        with pytest.raises(SparsityError, match=r"FanIn\(\), not"):
            by_output(other)
