"""The compact kernel: conversions, its tile and its place in a tree of parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from products_oracle import expand, make_case, random_case

from topkast_jax import Block, SparsityError, Unstructured
from topkast_jax.always_sparse import (
    dense_tile,
    from_masks,
    is_compact,
    to_dense,
    to_masks,
    values_of,
    with_tile,
    with_values,
)


@settings(max_examples=25, deadline=None)
@given(
    pattern=st.sampled_from([Unstructured(), Block(1, 1), Block(4, 2), Block(2, 6)]),
    lead=st.lists(st.integers(1, 2), max_size=2).map(tuple),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_dense_to_compact_and_back(pattern, lead, seed, data):
    shape = (*lead, 8, 12)
    n = math.prod(pattern.grid(shape))
    b = data.draw(st.integers(1, n), "b")
    a = data.draw(st.integers(1, b), "a")
    order = np.random.default_rng(seed).permutation(n)
    units = [np.isin(np.arange(n), order[:k]).reshape(pattern.grid(shape)) for k in (a, b)]
    masks = [expand(u, pattern) for u in units]
    dense = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    kernel = from_masks(dense, *masks, pattern)
    assert (kernel.forward, kernel.backward, kernel.index.dtype) == (a, b, np.int32)
    for part in (kernel.index[:a], kernel.index[a:]):
        assert np.all(np.diff(part) > 0)
    np.testing.assert_array_equal(kernel.index[:a], np.flatnonzero(units[0]))
    np.testing.assert_array_equal(to_dense(kernel), np.where(masks[1], dense, 0))
    np.testing.assert_array_equal(to_dense(kernel, True), np.where(masks[0], dense, 0))
    for found, mask in zip(to_masks(kernel), masks, strict=True):
        np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 2)], ids=str)
@pytest.mark.parametrize("shape", [(8, 12), (2, 3, 8, 4)], ids=str)
def test_tile_on_the_device(pattern, shape):
    kernel = random_case(shape, pattern, 5, 11).kernel
    np.testing.assert_array_equal(dense_tile(kernel), to_dense(kernel, True))
    np.testing.assert_array_equal(dense_tile(kernel, forward_only=False), to_dense(kernel))


def test_stack_of_layers():
    cases = [random_case((8, 8), Block(4, 4), 1, 3, seed=s) for s in range(2)]
    dense, forward, backward = (
        np.stack([getattr(c, f) for c in cases]) for f in ("dense", "forward", "backward")
    )
    stack = from_masks(dense, forward, backward, Block(4, 4), stacked=True)
    assert stack.values.shape == (2, 3, 4, 4)
    assert stack.shape == (8, 8)
    np.testing.assert_array_equal(to_dense(stack), np.where(backward, dense, 0))
    with pytest.raises(SparsityError, match="same number"):
        from_masks(dense, forward, np.stack([forward[0], backward[1]]), Block(4, 4), stacked=True)


def test_masks_that_do_not_fit():
    dense, part = np.ones((8, 8)), np.eye(8, dtype=bool)
    with pytest.raises(SparsityError, match="part of a unit"):
        from_masks(dense, part, part, Block(4, 4))
    with pytest.raises(SparsityError, match="inside the backward set"):
        from_masks(dense, part, np.zeros_like(part), Unstructured())


def test_optimizer_sees_values_alone():
    kernel = random_case((8, 8), Block(4, 4), 1, 3).kernel
    params = {"layer": {"kernel": kernel, "bias": jnp.zeros(8)}}
    values = values_of(params)
    assert jax.tree.map(jnp.shape, values) == {"layer": {"kernel": (3, 4, 4), "bias": (8,)}}
    tx = optax.adam(0.1)
    updates, _ = tx.update(values, tx.init(values), values)
    moved = with_values(params, optax.apply_updates(values, updates))
    assert is_compact(moved["layer"]["kernel"])
    np.testing.assert_array_equal(moved["layer"]["kernel"].index, kernel.index)
    assert not np.array_equal(moved["layer"]["kernel"].values, kernel.values)


def test_convolution_on_a_tile_keeps_no_dense_residual():
    shape = (3, 3, 16, 32)
    case = random_case(shape, Unstructured(), 200, 400)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 6, 16)), jnp.float32)

    def conv(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def loss(values):
        return jnp.sum(jnp.sin(with_tile(conv, case.kernel.with_values(values), x)))

    view = jnp.where(case.forward, case.dense, 0)
    expected = jax.grad(lambda w: jnp.sum(jnp.sin(conv(w, x))))(view)
    found = to_dense(case.kernel.with_values(jax.jit(jax.grad(loss))(case.kernel.values)))
    np.testing.assert_allclose(found, np.where(case.backward, expected, 0), rtol=1e-4, atol=1e-4)
    _, vjp = jax.vjp(lambda v: with_tile(conv, case.kernel.with_values(v), x), case.kernel.values)
    assert max(leaf.size for leaf in jax.tree.leaves(vjp)) < math.prod(shape)


def test_stack_keeps_each_layers_sets_apart():
    forward = np.zeros((2, 2), bool)
    forward[0, 1] = True
    case = make_case((4, 4), Block(2, 2), forward, np.ones((2, 2), bool))
    assert case.kernel.index.tolist() == [1, 0, 2, 3]
