"""Every exported form is the same matrix, the trained θ on A and zero elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse as jsparse

import topkast_jax as tk
from topkast_jax.always_sparse import FORMS, AlwaysSparse, CompactKernel, export

SHAPES = {"matrix": (8, 12), "stack": (3, 8, 4), "window": (3, 3, 4, 8)}
RULES = [("stack/kernel", tk.Sparse(stacked=0)), (".*kernel", tk.Sparse()), (".*", tk.Dense())]


@functools.lru_cache
def trained(pattern):
    rng = np.random.default_rng(0)
    params = {n: {"kernel": rng.normal(size=s).astype(np.float32)} for n, s in SHAPES.items()}
    params["matrix"]["bias"] = rng.normal(size=12).astype(np.float32)
    tx = tk.top_kast(optax.sgd(0.1), 0.25, 0.5, rules=RULES, pattern=pattern)
    sparse = AlwaysSparse(tx, params)
    return params, tx.init(params), sparse.start(params)


def dense(leaf, name):
    if isinstance(leaf, jsparse.BCSR):
        found = np.asarray(leaf.todense())
        if leaf.n_dense:
            found = np.moveaxis(found, -3, -2)
        return found.reshape(SHAPES[name])
    if isinstance(leaf, jsparse.BCOO):
        return np.asarray(leaf.todense())
    if isinstance(leaf, CompactKernel):
        assert leaf.forward == leaf.backward == leaf.values.shape[leaf.index.ndim - 1]
        return tk.always_sparse.to_dense(leaf)
    return leaf


@pytest.mark.parametrize("pattern", [tk.Unstructured(), tk.Block(4, 2)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_matrix(pattern, form):
    params, state, (values, held, _) = trained(pattern)
    expected = tk.forward_params(params, state)
    found = export(values, held, form)
    for name in SHAPES:
        leaf = found[name]["kernel"]
        np.testing.assert_array_equal(dense(leaf, name), expected[name]["kernel"])
        if form in ("bcoo", "bsr"):
            units = 1 if form == "bcoo" or not isinstance(pattern, tk.Block) else 8
            assert leaf.nse * units == round(0.25 * np.prod(SHAPES[name])) / (
                3 if name == "stack" else 1
            )
    np.testing.assert_array_equal(found["matrix"]["bias"], params["matrix"]["bias"])


@pytest.mark.parametrize("form", FORMS)
def test_a_masked_run_is_exported_too(form):
    params, state, _ = trained(tk.Unstructured())
    found = export(params, state, form)
    expected = tk.forward_params(params, state)
    np.testing.assert_array_equal(
        dense(found["matrix"]["kernel"], "matrix"), expected["matrix"]["kernel"]
    )


def test_bcoo_multiplies():
    _, _, (values, held, _) = trained(tk.Block(4, 2))
    x = jnp.ones((5, 8))
    product = x @ export(values, held, "bcoo")["matrix"]["kernel"]
    np.testing.assert_allclose(
        product, x @ export(values, held, "dense")["matrix"]["kernel"], rtol=1e-6
    )


def test_mistakes():
    with pytest.raises(tk.SparsityError, match="form='csr': must be one of dense, compact"):
        export({}, (), "csr")
    with pytest.raises(tk.SparsityError, match="holds no sparsity state"):
        export({"w": jnp.ones((2, 2))}, optax.sgd(0.1).init({"w": jnp.ones((2, 2))}))


def test_exported_trees_hold_no_device_arrays_of_dense_size():
    _, _, (values, held, _) = trained(tk.Unstructured())
    leaves = jax.tree.leaves(export(values, held, "compact")["matrix"]["kernel"])
    assert max(leaf.size for leaf in leaves) == 24
