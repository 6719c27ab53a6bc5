"""What `sparsify` promises beside `tk.testing.check_method`, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk
from topkast_jax.testing import example, gradient, step_of, train


def test_multi_steps_equals_the_mean_gradient():
    params = example()
    tx = tk.top_kast(optax.sgd(0.1), 0.1, 0.2, refresh_every=1)
    twice = optax.MultiSteps(tx, 2)
    state, reference = twice.init(params), tx.init(params)
    g1, g2 = gradient(params), jax.tree.map(jnp.cos, params)
    for g in (g1, g2):
        updates, state = twice.update(g, state, params)
        stepped = optax.apply_updates(params, updates)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, g1, g2)
    updates, reference = tx.update(mean, reference, params)
    expected = optax.apply_updates(params, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), stepped, expected)
    jax.tree.map(
        np.testing.assert_array_equal,
        tk.keep_masks(params, state), tk.keep_masks(params, reference),
    )  # fmt: skip


def test_reset_gives_what_init_gives_to_what_left_and_what_entered():
    params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    push = {"w": jnp.array([[0.5, 2.5, 0.0, 0.0]])}
    tx = tk.top_kast(
        optax.rmsprop(1.5, decay=0.5, initial_scale=1.0), 0.25, 0.5, refresh_every=1,
        exploration_weight=0.0, inner_state="reset", rules=[(".*", tk.Sparse())],
    )  # fmt: skip
    updates, state = tx.update(push, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(tk.keep_masks(moved, state)[1]["w"], [[True, False, True, False]])
    _, state = tx.update(jax.tree.map(jnp.zeros_like, push), state, moved)
    found = state.inner_state[0].nu["w"]
    np.testing.assert_allclose(found, [[0.3125, 0.5, 0.5, 0.5]], rtol=1e-5)


@pytest.mark.parametrize("static", [(), ("forward_density", "backward_density", "refresh_every")])
def test_inject_hyperparams_counts_exactly(static):
    options = {"forward_density": 0.1, "backward_density": 0.35, "refresh_every": 1}
    injected = optax.inject_hyperparams(tk.top_kast, static_args=static)(optax.sgd(0.1), **options)
    plain = tk.top_kast(optax.sgd(0.1), **options)
    for (_, a), (_, b) in zip(train(injected, example()), train(plain, example()), strict=True):
        masks = (tk.keep_masks(example(), s) for s in (a, b))
        jax.tree.map(np.testing.assert_array_equal, *masks)


def test_a_schedule_of_the_exploration_weight_is_followed():
    schedule = optax.piecewise_constant_schedule(0.5, {2: 0.0})
    tx = optax.inject_hyperparams(tk.top_kast)(
        optax.sgd(0.1), 0.1, 0.2, refresh_every=1, exploration_weight=schedule
    )
    params = example()
    state = tx.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    moved = []
    for _ in range(4):
        updates, state = tx.update(zero, state, params)
        moved.append(float(optax.tree.norm(updates)))
    assert moved[0] > 0
    assert moved[3] == 0


def test_negative_zeros_in_the_reservoir_keep_their_sign():
    params = {"w": jnp.array([[3.0, -2.0, -0.0, 0.0]])}
    tx = tk.top_kast(optax.sgd(0.1), 0.25, 0.5, refresh_every=1, rules=[(".*", tk.Sparse())])
    history = train(tx, params, steps=2)
    last = history[-1][0]["w"][0, 2:]
    np.testing.assert_array_equal(np.signbit(last), [True, False])


def test_reset_zeroes_what_left_and_nothing_else():
    params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    push = {"w": jnp.array([[0.0, 2.5, 0.0, 0.0]])}
    traces = {}
    for kept in ("keep", "reset"):
        tx = tk.top_kast(
            optax.sgd(1.0, momentum=0.9), 0.25, 0.5, refresh_every=1, exploration_weight=0.0,
            inner_state=kept, rules=[(".*", tk.Sparse())],
        )  # fmt: skip
        updates, state = tx.update(push, tx.init(params), params)
        moved = optax.apply_updates(params, updates)
        backward = tk.keep_masks(moved, state)[1]["w"]
        np.testing.assert_array_equal(backward, [[True, False, True, False]])
        _, state = tx.update(jax.tree.map(jnp.zeros_like, push), state, moved)
        traces[kept] = state.inner_state[0].trace["w"]
    np.testing.assert_allclose(traces["keep"], 0.9 * push["w"], rtol=1e-6)
    np.testing.assert_array_equal(traces["reset"], [[0.0, 0.0, 0.0, 0.0]])


def test_static_masks_follow_their_seed():
    def mask(seed):
        tx = tk.static_random(optax.sgd(0.1), 0.1, seed=seed)
        return np.asarray(tk.keep_masks(example(), tx.init(example()))[0]["out"]["kernel"])

    np.testing.assert_array_equal(mask(1), mask(1))
    assert np.any(mask(1) != mask(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward_density": 0.0}, r"forward_density=0.0: must be a number in \(0, 1\]"),
        ({"forward_density": 1.5}, "forward_density=1.5"),
        ({"forward_density": float("nan")}, "forward_density=nan"),
        ({"forward_density": "0.1"}, "forward_density='0.1'"),
        ({"forward_density": 0.5}, "backward_density=0.2 is below forward_density=0.5"),
        ({"refresh_every": 0}, "refresh_every=0"),
        ({"refresh_every": 2.5}, "refresh_every=2.5"),
        ({"stop_exploring_at": -1}, "stop_exploring_at=-1"),
        ({"exploration_norm": "l3"}, "exploration_norm='l3'"),
        ({"exploration_weight": -1.0}, "exploration_weight=-1.0"),
        ({"inner_state": "drop"}, "inner_state='drop'"),
        ({"pattern": "block"}, "pattern='block'"),
    ],
)
def test_a_bad_argument_is_named(options, message):
    arguments = {"forward_density": 0.1, "backward_density": 0.2, **options}
    with pytest.raises(tk.SparsityError, match=message) as caught:
        tk.top_kast(optax.sgd(0.1), **arguments)
    assert "\n" not in str(caught.value)


def test_what_update_and_views_need_is_said():
    tx = tk.top_kast(optax.sgd(0.1), 0.1, 0.2)
    state = tx.init(example())
    with pytest.raises(tk.SparsityError, match="needs the parameters"):
        tx.update(example(), state)
    with pytest.raises(tk.SparsityError, match="holds no sparsity state"):
        tk.forward_params(example(), optax.adam(1e-3).init(example()))


def test_a_compiled_step_selects_once():
    """`forward_params` and `update` choose from the same arguments, and XLA merges the two."""
    tx = tk.top_kast(optax.adam(1e-2), 0.1, 0.2, refresh_every=2)
    params = example()
    state = tx.init(params)

    def loops(function):
        text = jax.jit(function).lower(params, state).compile().as_text()
        return text.count(" while(")

    once = loops(tk.forward_params)
    assert once > 0
    assert loops(step_of(tx)) == once
