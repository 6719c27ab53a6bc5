"""What other tools do with the states and functions of this library: JAX, Flax, big_vision."""

import dataclasses
import subprocess
import sys

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk

PARAMS = {"kernel": jnp.arange(1.0, 33.0).reshape(8, 4), "bias": jnp.zeros(4)}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)


def top_kast(**options):
    return tk.top_kast(optax.adam(0.1), 0.25, 0.5, refresh_every=2, **options)


def loss(params, batch, scaled):
    product = batch @ params["kernel"] + params["bias"][None]
    return jnp.mean(product) * (2.0 if scaled else 1.0)


@pytest.mark.parametrize("static", [{"static_argnums": 3}, {"static_argnames": "scaled"}])
def test_static_arguments_of_a_loss(static):
    state = top_kast().init(PARAMS)
    both = jax.jit(tk.value_and_grad(loss), **static)
    batch = jnp.ones((2, 8))
    value, grads = both(PARAMS, state, batch, True)
    assert value == 2 * both(PARAMS, state, batch, False)[0]
    np.testing.assert_array_equal(grads["bias"], jnp.full(4, 0.5))


def test_a_loss_may_name_its_arguments_as_it_likes():
    def with_state(params, *, state, params_of_another):
        return jnp.sum(params["kernel"]) * state + params_of_another

    value, _ = tk.value_and_grad(with_state)(
        PARAMS, top_kast().init(PARAMS), state=2.0, params_of_another=1.0
    )
    assert value == 2.0 * sum(range(25, 33)) + 1.0


def walked(tree):
    """Leaves found by types alone, as big_vision walks a tree to write its checkpoints."""
    if tree is None:
        return []
    if dataclasses.is_dataclass(tree):
        tree = flax.serialization.to_state_dict(tree)
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in walked(tree[key])]
    if isinstance(tree, tuple | list):
        return [leaf for child in tree for leaf in walked(child)]
    return [tree]


def test_a_walk_by_types_finds_every_leaf_of_a_state():
    state = top_kast().init(PARAMS)
    found, wanted = walked(state), jax.tree.leaves(state)
    assert sorted(map(jnp.shape, found)) == sorted(map(jnp.shape, wanted))
    assert all(isinstance(leaf, jax.Array) for leaf in found)


def test_flax_that_is_imported_after_init_knows_the_state():
    program = """
import jax, jax.numpy as jnp, optax, sys
import topkast_jax as tk
assert "flax" not in sys.modules
params = {"w": jnp.arange(1.0, 33.0).reshape(8, 4)}
state = tk.top_kast(optax.adam(0.1), 0.25, 0.5).init(params)
from flax import serialization
read = serialization.from_bytes(state, serialization.to_bytes(state))
assert jax.tree.structure(read) == jax.tree.structure(state)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_gradients_in_another_container_are_named():
    tx = top_kast()
    state = tx.init({"layer": PARAMS})
    frozen = {"layer": flax.core.freeze(GRADS)}
    with pytest.raises(tk.SparsityError, match="found a FrozenDict, must be a dict$"):
        tx.update(frozen, state, {"layer": PARAMS})


def test_a_state_of_another_method_is_refused():
    state = top_kast().init(PARAMS)
    rigl = tk.methods.rigl(optax.adam(0.1), 0.25)
    with pytest.raises(tk.SparsityError, match="the state is of TopKast, .* is RigL"):
        rigl.update(GRADS, state, PARAMS)


@pytest.mark.parametrize("x", [[3.0, -4.0, 1.0], np.float32([3.0, -4.0, 1.0])])
def test_selection_takes_what_becomes_an_array(x):
    (mask,), _ = tk.top_k_masks(x, [1])
    assert mask.tolist() == [False, True, False]
    with pytest.raises(tk.SparsityError, match="counts=1; must be a sequence"):
        tk.top_k_masks(x, 1)
