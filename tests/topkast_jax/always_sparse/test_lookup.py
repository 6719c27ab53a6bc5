"""Rows of a compact table, against the same rows of the dense one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from products_oracle import random_case

from topkast_jax import Block, SparsityError, Unstructured
from topkast_jax.always_sparse import lookup, matmul, to_dense

SHAPE = (16, 12)
PATTERNS = [Unstructured(), Block(1, 1), Block(4, 2), Block(2, 12), Block(16, 1)]


@jax.jit
def rows_and_gradient(table, rows, weights):
    def loss(values):
        return jnp.sum(jnp.sin(lookup(table.with_values(values), rows)) * weights)

    return lookup(table, rows), jax.grad(loss)(table.values)


@settings(max_examples=20, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS),
    sizes=st.sampled_from([(0, 0), (0.3, 0.3), (0.3, 0.6), (0.6, 1)]),
    rows=st.lists(st.integers(-16, 15), min_size=9, max_size=9),
    seed=st.integers(0, 1000),
)
def test_rows_and_gradients_are_those_of_the_dense_table(pattern, sizes, rows, seed):
    n = np.prod(pattern.grid(SHAPE))
    a, b = (max(1, round(size * n)) for size in sizes)
    table = random_case(SHAPE, pattern, a, b, seed).kernel
    rows = np.array(rows, np.int32)
    weights = np.random.default_rng(seed).standard_normal((rows.size, 12)).astype(np.float32)
    found, gradient = rows_and_gradient(table, rows, weights)
    dense = to_dense(table, forward_only=True)
    np.testing.assert_array_equal(found, dense[rows])
    # The gradient of the dense table, at the places of B, whether they are in A or not.
    of_dense = np.zeros(SHAPE, np.float32)
    np.add.at(of_dense, rows, np.cos(dense[rows]) * weights)
    marked = table.with_values(jnp.asarray(gradient))
    in_b = to_dense(table.with_values(np.ones(table.values.shape, bool)))
    np.testing.assert_allclose(to_dense(marked), np.where(in_b, of_dense, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("b", [0, 3])
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 2)], ids=str)
def test_an_empty_forward_set(pattern, b):
    table = random_case(SHAPE, pattern, 0, b).kernel
    rows, weights = np.arange(9, dtype=np.int32), np.ones((9, 12), np.float32)
    found, gradient = rows_and_gradient(table, rows, weights)
    np.testing.assert_array_equal(found, np.zeros((9, 12)))
    marked = to_dense(table.with_values(jnp.ones_like(table.values)))
    np.testing.assert_array_equal(
        to_dense(table.with_values(gradient)), marked * (np.arange(16) < 9)[:, None]
    )


def test_what_is_not_finite_outside_the_forward_set_does_not_show():
    table = random_case(SHAPE, Unstructured(), 40, 192).kernel
    table = table.with_values(table.values.at[40:].set(np.inf))
    dense = to_dense(table, forward_only=True)
    rows, weights = np.arange(9, dtype=np.int32), np.ones((9, 12), np.float32)
    found, gradient = rows_and_gradient(table, rows, weights)
    np.testing.assert_array_equal(found, dense[:9])
    expected = np.where(np.arange(16)[:, None] < 9, np.cos(dense), 0)
    np.testing.assert_allclose(to_dense(table.with_values(gradient)), expected, rtol=1e-6)
    product, pull = jax.vjp(lambda v: matmul(jnp.eye(16), table.with_values(v)), table.values)
    np.testing.assert_array_equal(product, dense)
    assert jnp.all(jnp.isfinite(pull(jnp.ones(SHAPE))[0]))


@pytest.mark.parametrize("many", [False, True])
def test_rows_that_do_not_exist_are_nan_and_any_shape_is_taken(many):
    table = random_case(SHAPE, Unstructured(), 40, 80).kernel
    rows = np.array([[[0, 15], [16, -17]]] * (5 if many else 1), np.int32)
    found = lookup(table, rows)
    expected = jnp.take(jnp.asarray(to_dense(table, True)), rows, axis=0, mode="fill")
    assert np.isnan(expected[..., 1, :, :]).all()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(lookup(jnp.asarray(to_dense(table, True)), rows), expected)


NUMBERS = {  # rows by dtype; of 300 rows, 127 + 300 and 3 · 400 entries do not fit some of them
    "int8": [3, -1, 127], "int16": [3, -300, 299], "uint8": [3, 0, 255], "uint16": [3, 299, 65535],
    "int32": [3, -301, 2**31 - 1], "uint32": [3, 299, 2**32 - 1], "int64": [3, -(2**32) + 3, 2**32],
}  # fmt: skip


@pytest.mark.parametrize("dtype", NUMBERS)
def test_rows_of_any_integer_dtype(dtype):
    with jax.enable_x64(dtype == "int64"):
        table = random_case((300, 400), Unstructured(), 12_000, 24_000).kernel
        dense = to_dense(table, forward_only=True)
        found = lookup(table, jnp.asarray(NUMBERS[dtype], dtype))
        for row, number in zip(found, NUMBERS[dtype], strict=True):
            exists = -300 <= number < 300
            np.testing.assert_array_equal(row, dense[number] if exists else np.full(400, np.nan))


def test_rows_may_be_a_list_and_must_be_integers():
    compact = random_case(SHAPE, Unstructured(), 40, 80).kernel
    dense = jnp.asarray(to_dense(compact, True))
    for table in (compact, dense):
        np.testing.assert_array_equal(lookup(table, [[3, 0]]), dense[jnp.asarray([[3, 0]])])
        refused = {"float32": [0.5], "bool": np.ones(2, bool), "a list": [[0], [1, 2]]}
        for found, rows in refused.items():
            with pytest.raises(SparsityError, match=f"rows must be integers, found {found}"):
                lookup(table, rows)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(8, 8)], ids=str)
def test_no_array_of_the_tables_size_exists(pattern):
    shape, units = (4096, 64), {"Unstructured()": 26_214}.get(str(pattern), 409)
    table = random_case(shape, pattern, units, 2 * units).kernel

    def compiled(tokens):
        step = jax.jit(jax.value_and_grad(lambda v, r: lookup(table.with_values(v), r).sum()))
        rows = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        text = step.lower(table.values, rows).compile().as_text()
        return [int(np.prod([int(n) for n in dims.split(",") if n]))
                for dims in re.findall(r"[fsu]\d+\[([\d,]*)\]", text)]  # fmt: skip

    assert max(compiled(64)) < 4096 * 64 / 2
    assert max(compiled(4096)) >= 4096 * 64


def test_other_shapes_are_refused():
    table = random_case((2, 8, 12), Unstructured(), 5, 11).kernel
    with pytest.raises(SparsityError, match=r"needs a table \[V, E\], found shape \(2, 8, 12\)"):
        lookup(table, np.zeros(1, np.int32))
