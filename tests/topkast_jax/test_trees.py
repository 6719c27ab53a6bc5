"""The same three lines on every kind of parameter tree."""

from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import topkast_jax as tk
from topkast_jax.trees import flatten_with_names

X = jax.random.normal(jax.random.key(0), (32, 8))
Y = jnp.sin(X[:, :1])


def tx(rules=None):
    return tk.top_kast(optax.adam(1e-2), 0.2, 0.4, refresh_every=3, rules=rules)


def check(params, state, losses, all_sparse=False):
    forward, backward = tk.keep_masks(params, state)
    assert jax.tree.structure(forward) == jax.tree.structure(params)
    for leaf, a, b in zip(*map(jax.tree.leaves, (params, forward, backward)), strict=True):
        is_sparse = all_sparse or (leaf.ndim == 2 and min(leaf.shape) > 1)
        expected = round(0.2 * leaf.size) if is_sparse else leaf.size
        assert np.sum(a) == max(1, expected)
        assert not np.any(np.asarray(a) & ~np.asarray(b))
    assert losses[-1] < losses[0]


def fit(params, loss, rules=None):
    optimizer = tx(rules)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(tk.forward_params(params, state))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(20):
        params, state, value = step(params, state)
        losses.append(value)
    check(params, state, losses, rules is not None)


def test_nnx_state():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 1, rngs=rngs))
    graph, params = nnx.split(model)
    fit(params, lambda p: jnp.mean((nnx.merge(graph, p)(X) - Y) ** 2))


def test_nnx_optimizer():
    model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 1, rngs=nnx.Rngs(1)))
    optimizer = nnx.Optimizer(model, tx(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        alpha = tk.forward_params(params, optimizer.opt_state)
        value, grads = jax.value_and_grad(
            lambda p: jnp.mean((nnx.merge(graph, p, rest)(X) - Y) ** 2)
        )(alpha)
        optimizer.update(model, grads)
        return value

    losses = [step(model, optimizer) for _ in range(20)]
    check(nnx.state(model, nnx.Param), optimizer.opt_state, losses)


class Attention(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array


class Layer(eqx.Module):
    raw_value: jax.Array
    value: nnx.Param


def test_fields_that_are_called_value_keep_their_name():
    w = jnp.ones((4, 5))
    params = {"attn": Attention(w, w, w), "layer": Layer(w, nnx.Param(w))}
    names = ["attn/query", "attn/key", "attn/value", "layer/raw_value", "layer/value"]
    assert flatten_with_names(params)[0] == names
    rules = [("attn/value", tk.Sparse()), (".*", tk.Dense())]
    state = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, rules=rules).init(params)
    assert list(state.memory) == ["attn/value"]
    kept = tk.keep_masks(params, state)[0]["attn"]
    assert [int(mask.sum()) for mask in kept] == [20, 20, 4]


def test_the_level_of_a_flax_variable_is_left_out():
    state = nnx.state(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nnx.Param)
    assert flatten_with_names(state)[0] == ["bias", "kernel"]
    assert flatten_with_names(nnx.to_pure_dict(state))[0] == ["bias", "kernel"]
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    boxed = nn.Dense(5, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    assert flatten_with_names(boxed)[0] == ["bias", "kernel"]


def test_linen():
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(1)])
    params = model.init(jax.random.key(1), X)
    fit(params, lambda p: jnp.mean((model.apply(p, X) - Y) ** 2))


def test_equinox():
    model = eqx.nn.MLP(8, 1, 16, 1, key=jax.random.key(2))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    fit(params, lambda p: jnp.mean((jax.vmap(eqx.combine(p, static))(X) - Y) ** 2))


def test_a_single_array_and_tuples():
    rules = [(".*", tk.Sparse())]
    fit(jnp.ones((8, 1)) * 0.1, lambda w: jnp.mean((X @ w - Y) ** 2), rules)
    pair = (jnp.ones((8, 1)) * 0.1, [jnp.zeros(1)])
    fit(pair, lambda p: jnp.mean((X @ p[0] + p[1][0][None] - Y) ** 2), rules)
