"""Densities, churn and FLOPs, against counts made by hand."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk
from topkast_jax.methods.rigl import RigL
from topkast_jax.sets import SparsifyState
from topkast_jax.statistics import LeafCounts


def state_with(history):
    """The state after the forward sets in `history` (tuples of kept indices of 8 entries)."""
    from topkast_jax.flags import first_flags, next_flags

    def sets(kept):
        forward = jnp.isin(jnp.arange(8), jnp.array(kept))
        return tk.Sets(forward, forward | (jnp.arange(8) < 4))

    flags = first_flags(sets(history[0]))
    for kept in history[1:]:
        flags = next_flags(flags, sets(kept))
    return SparsifyState(jnp.zeros([], jnp.int32), {"w": flags}, {}, optax.EmptyState())


def test_churn_and_reservoir_by_hand():
    params = {"w": jnp.ones(8), "bias": jnp.ones(3)}
    state = state_with([(0, 1), (1, 5), (5, 6), (2, 6)])
    state = state._replace(sets={**state.sets, "bias": optax.MaskedNode()})
    found = {k: float(v) for k, v in jax.jit(tk.statistics.mask_statistics)(params, state).items()}
    assert found["forward_density"] == 2 / 8
    assert found["backward_density"] == 5 / 8
    assert found["churn_since_start"] == 1.0
    assert found["churn_since_last_refresh"] == 1 / 2
    assert found["reservoir_ever_active"] == 2 / 4
    counts = tk.statistics.leaf_counts(params, state)
    assert counts["w"] == (8, 2, 5, True)
    assert counts["bias"] == (3, 3, 3, False)


def test_zero_entries_do_not_count_as_sparse():
    params = {"w": jnp.zeros((10, 10)), "b": jnp.zeros(10)}
    tx = tk.top_kast(optax.sgd(0.1), 0.3, 0.5)
    counts = tk.statistics.leaf_counts(params, tx.init(params))
    assert (counts["w"].forward, counts["w"].backward, counts["b"].forward) == (30, 50, 10)


def net(params, tokens, image):
    x = params["embedding"][tokens] @ params["dense"].astype(jnp.bfloat16).astype(jnp.float32)
    x = jax.nn.relu(x + params["bias"][None])
    scores = x @ x.T

    def layer(x, kernel):
        return jnp.tanh(x @ kernel.T), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), scores @ x, params["stack"])
    logits = jax.jit(lambda x, t: x @ t.T)(x, params["embedding"][:, :6])
    y = jax.lax.conv_general_dilated(
        image, params["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return logits.sum() + y.sum()


def test_flops_by_leaf_by_hand():
    params = {
        "embedding": jnp.ones((50, 12)),
        "dense": jnp.ones((12, 6)),
        "bias": jnp.ones(6),
        "stack": jnp.ones((3, 6, 6)),
        "conv": jnp.ones((3, 3, 4, 8)),
    }
    found = tk.statistics.leaf_flops(net, params, jnp.zeros(5, int), jnp.ones((2, 8, 8, 4)))
    assert found == {
        "embedding": 2 * 5 * 6 * 50,
        "dense": 2 * 5 * 12 * 6,
        "bias": 0,
        "stack": 3 * 2 * 5 * 6 * 6,
        "conv": 2 * (2 * 4 * 4 * 8) * (3 * 3 * 4),
        "other": 2 * 5 * 6 * 5 + 2 * 5 * 5 * 6,
    }


def test_flops_of_parts_belong_to_the_leaf():
    params = {"qkv": jnp.ones((4, 12)), "stack": jnp.ones((3, 4, 4)), "both": jnp.ones((4, 4))}

    @jax.custom_batching.sequential_vmap
    def product(x, w):
        return x @ w

    def net(p, x):
        query, key, value = jnp.split(p["qkv"], 3, axis=1)
        first, second, _ = jnp.unstack(p["stack"])
        both, first = jax.lax.optimization_barrier((p["both"], first))
        return product(x @ query + x @ key + x @ value, both) @ first @ second

    found = tk.statistics.leaf_flops(net, params, jnp.ones((5, 4)))
    one = 2 * 5 * 4 * 4
    assert found == {"qkv": 3 * one, "stack": 2 * one, "both": one, "other": 0}


def test_fractions_follow_the_paper():
    params = {"a": jnp.ones((10, 10)), "b": jnp.ones((10, 10))}
    rules = [("a", tk.Dense()), ("b", tk.Sparse())]
    tx = tk.top_kast(optax.sgd(0.1), 0.1, 0.2, rules=rules)
    counts = tk.statistics.leaf_counts(params, tx.init(params))
    flops = tk.statistics.flops({"a": 100.0, "b": 300.0, "other": 100.0}, counts)
    assert flops.dense == 500
    assert flops.inference_fraction == pytest.approx((100 + 30 + 100) / 500)
    assert flops.backward_fraction == pytest.approx((100 + 60 + 100) / 500)
    assert flops.training_fraction == pytest.approx((2 * 230 + 260) / 1500)


def test_statistics_over_two_states():
    params = {"a": jnp.arange(1.0, 101).reshape(10, 10), "b": jnp.ones((20, 10))}
    tx = optax.multi_transform(
        {"x": tk.top_kast(optax.sgd(0.1), 0.1, 0.2), "y": tk.static_random(optax.sgd(0.1), 0.4, 1)},
        {"a": "x", "b": "y"},
    )
    found = tk.statistics.mask_statistics(params, tx.init(params))
    np.testing.assert_allclose(found["forward_density"], (10 + 80) / 300, rtol=1e-6)


def test_counts_over_steps_by_hand():
    """Sums that pass 2**31, saved as JSON in between; dense gradients count whole leaves."""
    many = np.int32(2**30)
    sums = tk.statistics.CountsOverSteps()
    sums.add({"w": LeafCounts(4 * 2**30, many, many, True)}, 30, dense_gradients=10)
    sums = tk.statistics.CountsOverSteps(json.loads(json.dumps(sums.saved())))
    sums.add({"w": LeafCounts(4 * 2**30, 2 * many.item(), 4 * many.item(), True)}, 10)
    assert sums.steps == 40
    mean = sums.mean()["w"]
    assert mean.forward == (30 * 1 + 10 * 2) / 40 * 2**30
    assert mean.backward == (20 * 1 + 10 * 4 + 10 * 4) / 40 * 2**30
    assert (mean.entries, mean.sparse) == (2**32, True)


METHODS = {  # the steps up to 10 that need the dense gradient, with a choice after every third
    "top_kast": ({"backward_density": 0.5, "refresh_every": 3}, []),
    "set": ({"refresh_every": 3}, []),
    "rigl": ({"refresh_every": 3}, [3, 6, 9]),
    "snfs": ({"refresh_every": 3}, list(range(1, 11))),
    "snip": ({}, [1]),
}


@pytest.mark.parametrize("name", METHODS)
def test_which_steps_need_the_dense_gradient(name):
    options, expected = METHODS[name]
    plan = tk.methods.get(name)(optax.sgd(0.1), 0.2, **options).plan
    assert [step for step in range(1, 11) if plan.needs_dense_gradient(step)] == expected
    for first, last in itertools.combinations_with_replacement(range(1, 11), 2):
        within = [step for step in expected if first <= step <= last]
        assert plan.dense_gradients(first, last) == len(within)


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4]), (3, [1, 3]), (7, [1])])
def test_which_steps_need_it_with_a_stop_and_a_first_choice_by_the_gradient(every, expected):
    class ByGradient(RigL):
        first_choice = "first_update"
        explores = True

    tx = tk.sparsify(
        optax.sgd(0.1), ByGradient(), forward_density=0.2, refresh_every=every, stop_exploring_at=5
    )
    assert [step for step in range(1, 11) if tx.plan.needs_dense_gradient(step)] == expected
    assert tx.plan.dense_gradients(1, 2**31) == len(expected)


def test_counts_of_the_last_step_and_of_the_next():
    """Where a choice is due, the next step has other sets than the last; both are counted."""
    params = {"w": jnp.arange(1.0, 101).reshape(10, 10), "b": jnp.ones(10)}
    tx = tk.methods.get("pruning")(optax.sgd(0.0), 0.1, begin_at=0, end_at=2, refresh_every=1)
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    last = tk.statistics.start_leaf_counts(params, state, of_last_step=True)()
    assert [last[name].forward for name in "wb"] == [100, 10]
    assert tk.statistics.leaf_counts(params, state)["w"].forward == 10 + round(90 / 8)
