"""One table that every method joins, around every common optimizer and inside every wrapper."""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import topkast_jax as tk

METHODS = {
    "top_kast": functools.partial(tk.top_kast, forward_density=0.1, backward_density=0.2,
                                  refresh_every=2),
    "top_kast_every_step": functools.partial(tk.top_kast, forward_density=0.1,
                                             backward_density=0.2, refresh_every=1,
                                             inner_state="reset"),
    "top_kast_stopping": functools.partial(tk.top_kast, forward_density=0.1, backward_density=0.2,
                                           refresh_every=2, stop_exploring_at=3,
                                           inner_state="reset"),
    "top_kast_blocks": functools.partial(tk.top_kast, forward_density=0.25, backward_density=0.5,
                                         refresh_every=2, pattern=tk.Block(4, 2)),
    "static_random": functools.partial(tk.static_random, forward_density=0.1, seed=3),
}  # fmt: skip
INNERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "lamb": optax.lamb(1e-2),
    "rmsprop": optax.rmsprop(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "scheduled": optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.1, 0.0, 10)),
}
table = pytest.mark.parametrize("method", METHODS)


def example(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "in": {"kernel": jax.random.normal(keys[0], (16, 24), dtype), "bias": jnp.zeros(24, dtype)},
        "out": jax.random.normal(keys[1], (24, 8), dtype),
    }


def gradient(view):
    return jax.tree.map(lambda x: (jnp.sin(3 * x) + 0.3).astype(x.dtype), view)


def train(tx, params, steps=6):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = gradient(tk.forward_params(params, state))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    history = [(params, state)]
    for _ in range(steps):
        params, state = step(params, state)
        history.append((params, state))
    assert step._cache_size() == 1, "the step compiled again"
    return history


def check_invariants(history, density=None):
    """Counts exact, A ⊆ B, and what stays outside B keeps its value, bit for bit."""
    for (old, state), (new, _) in itertools.pairwise(history):
        forward, backward = tk.keep_masks(old, state)
        for path in (("in", "kernel"), ("out",)):
            a, b, before, after = (
                functools.reduce(lambda t, k: t[k], path, t) for t in (forward, backward, old, new)
            )
            a, b = np.asarray(a), np.asarray(b)
            assert not np.any(a & ~b)
            if density is not None:
                assert a.sum() == max(1, int(np.floor(density * a.size + 0.5)))
            np.testing.assert_array_equal(
                np.asarray(before)[~b].tobytes(), np.asarray(after)[~b].tobytes()
            )
        assert np.all(forward["in"]["bias"])
        assert np.all(backward["in"]["bias"])
    assert not np.array_equal(history[0][0]["out"], history[-1][0]["out"])


@table
@pytest.mark.parametrize("inner", INNERS)
def test_around_every_optimizer(method, inner):
    history = train(METHODS[method](INNERS[inner]), example())
    check_invariants(history, density=0.25 if method == "top_kast_blocks" else 0.1)


@table
def test_inside_every_wrapper(method):
    tx = METHODS[method](optax.sgd(0.1, momentum=0.9))
    labels = {"in": {"kernel": "a", "bias": "b"}, "out": "a"}
    a_only = {"in": {"kernel": True, "bias": False}, "out": True}
    wrappers = {
        "chain": optax.chain(optax.clip_by_global_norm(1.0), tx),
        "masked": optax.chain(
            optax.masked(tx, a_only),
            optax.masked(optax.sgd(0.1), jax.tree.map(lambda m: not m, a_only)),
        ),
        "multi_transform": optax.multi_transform({"a": tx, "b": optax.adam(1e-2)}, labels),
    }
    for wrapped in wrappers.values():
        check_invariants(train(wrapped, example()))
    accumulated = train(optax.MultiSteps(tx, 2), example(), steps=8)
    check_invariants(accumulated)


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


@table
def test_extra_arguments_go_through(method):
    def update(updates, state, params=None, *, scale, **_):
        del params
        return jax.tree.map(lambda u: u * scale, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    params = example()
    tx = METHODS[method](inner)
    state = tx.init(params)
    once, _ = tx.update(gradient(params), state, params, scale=1.0, unknown=None)
    twice, _ = tx.update(gradient(params), state, params, scale=2.0, unknown=None)
    np.testing.assert_allclose(2 * once["out"], twice["out"], rtol=1e-6)
    assert np.any(once["out"] != 0)


@table
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(method, dtype):
    history = train(METHODS[method](optax.sgd(0.1, momentum=0.9)), example(dtype))
    check_invariants(history, density=0.25 if method == "top_kast_blocks" else 0.1)
    assert all(x.dtype == dtype for x in jax.tree.leaves(history[-1][0]))


@table
def test_scan_and_abstract_init_keep_types(method):
    tx = METHODS[method](optax.adam(1e-2))
    params = example()
    state = tx.init(params)
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(tk.forward_params(params, state)), state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(body, (params, state), None, length=6)
    looped = train(tx, params)[-1][0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), scanned, looped)


@table
def test_sharding_and_types_of_the_state_stay(method):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    shard = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    place = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.device_put(x, shard if jnp.ndim(x) == 2 else whole), tree
    )
    tx = METHODS[method](optax.adam(1e-2))
    params = example()
    sharded, state = place(params), place(tx.init(params))
    shape_or_scalar = {x.shape for x in jax.tree.leaves(params)} | {()}
    assert {x.shape for x in jax.tree.leaves(state)} <= shape_or_scalar

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(tk.forward_params(params, state)), state, params)
        return optax.apply_updates(params, updates), state

    new, new_state = sharded, state
    for _ in range(4):
        new, new_state = step(new, new_state)
    for old, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True):
        assert (old.shape, old.dtype, old.weak_type) == (leaf.shape, leaf.dtype, leaf.weak_type)
        if leaf.ndim == 2:
            assert leaf.sharding.is_equivalent_to(shard, 2)
    alone = train(tx, params, steps=4)[-1]
    jax.tree.map(
        np.testing.assert_array_equal,
        tk.keep_masks(new, new_state), tk.keep_masks(*alone),
    )  # fmt: skip


def test_negative_zeros_in_the_reservoir_keep_their_sign():
    params = {"w": jnp.array([[3.0, -2.0, -0.0, 0.0]])}
    history = train(tk.top_kast(optax.sgd(0.1), 0.25, 0.5, refresh_every=1), params, steps=2)
    last = history[-1][0]["w"][0, 2:]
    np.testing.assert_array_equal(np.signbit(last), [True, False])


def test_reset_zeroes_what_left_and_nothing_else():
    params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    push = {"w": jnp.array([[0.0, 2.5, 0.0, 0.0]])}
    traces = {}
    for kept in ("keep", "reset"):
        tx = tk.top_kast(
            optax.sgd(1.0, momentum=0.9), 0.25, 0.5, refresh_every=1, exploration_weight=0.0,
            inner_state=kept,
        )  # fmt: skip
        _, state = tx.update(push, tx.init(params), params)
        traces[kept] = state.inner_state[0].trace["w"]
        backward = tk.keep_masks(params, state)[1]["w"]
        np.testing.assert_array_equal(backward, [[True, False, True, False]])
    np.testing.assert_array_equal(traces["keep"], push["w"])
    np.testing.assert_array_equal(traces["reset"], [[0.0, 0.0, 0.0, 0.0]])


def test_static_masks_follow_their_seed():
    def mask(seed):
        tx = tk.static_random(optax.sgd(0.1), 0.1, seed=seed)
        return np.asarray(tk.keep_masks(example(), tx.init(example()))[0]["out"])

    np.testing.assert_array_equal(mask(1), mask(1))
    assert np.any(mask(1) != mask(2))


def test_every_rule_is_logged_once(caplog):
    tx = tk.top_kast(optax.sgd(0.1), 0.1, 0.2)
    with caplog.at_level(logging.INFO, logger="topkast_jax"):
        tx.init(example())
        tx.init(example())
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 3
    assert "in/bias (24,): dense" in lines


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
