"""What would go wrong without a word: sets of another θ, lost derivatives, NaNs, wrong leaves."""

import functools
import logging

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx

import topkast_jax as tk
from topkast_jax import rules as rules_module
from topkast_jax import statistics
from topkast_jax.always_sparse import AlwaysSparse
from topkast_jax.methods.rigl import RigL
from topkast_jax.rules import resolve

TARGET = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
EVERYTHING = [(".*", tk.Sparse())]


def top_kast(inner, **options):
    return tk.top_kast(inner, 0.1, 0.2, **{"refresh_every": 1, "rules": EVERYTHING, **options})


def normal(shape=(16, 16), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


# 1. The sets are those of the θ that the caller has.


def sets_over_time(tx, theta, target, steps, of=lambda params: params):
    """θ and both sets before each step of training towards a target, as NumPy arrays."""
    params = theta

    def step(carry, _):
        params, state = carry
        seen = of(params)
        grads = tk.forward_params(seen, state) - target
        updates, new = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), new), (seen, tk.keep_masks(seen, state))

    state = tx.init(params)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[1])
    thetas, (forward, backward) = run((params, state))
    return np.asarray(thetas), np.asarray(forward), np.asarray(backward)


def check_sets(thetas, forward, backward):
    for theta, a, b in zip(thetas, forward, backward, strict=True):
        np.testing.assert_array_equal(a, oracle.select(theta, 0.1))
        np.testing.assert_array_equal(b, oracle.select(theta, 0.2))


def test_a_scaling_after_the_wrapper():
    target = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    tx = optax.chain(top_kast(optax.scale_by_adam()), optax.scale(-3e-3))
    thetas, forward, backward = sets_over_time(tx, normal((64, 64)), target, 200)
    check_sets(thetas, forward, backward)
    for before, after, b in zip(thetas, thetas[1:], backward, strict=False):
        np.testing.assert_array_equal(before[~b], after[~b])
    assert np.any(forward[0] != forward[-1])


OUTSIDE = {
    "add_decayed_weights": lambda tx: optax.chain(
        tx, optax.add_decayed_weights(0.3), optax.scale(-3e-2)),
    "ema": lambda tx: optax.chain(tx, optax.ema(0.9), optax.scale(-3e-2)),
    "schedule_free": lambda tx: optax.contrib.schedule_free(
        optax.chain(tx, optax.scale(-0.1)), 0.1),
    "mechanize": lambda tx: optax.contrib.mechanize(optax.chain(tx, optax.scale(-0.1))),
    "multi_steps": lambda tx: optax.MultiSteps(optax.chain(tx, optax.scale(-0.1)), 2),
}  # fmt: skip


@pytest.mark.parametrize("outside", OUTSIDE)
def test_what_alters_updates_after_the_wrapper(outside):
    tx = OUTSIDE[outside](top_kast(optax.scale_by_adam()))
    thetas, forward, backward = sets_over_time(tx, normal(), TARGET, 12)
    if outside == "multi_steps":  # the sets of a step that only collects are those before it
        thetas, forward, backward = thetas[::2], forward[::2], backward[::2]
    check_sets(thetas, forward, backward)
    assert np.any(thetas[0] != thetas[-1])


def test_lookahead_outside():
    tx = optax.lookahead(top_kast(optax.sgd(0.1)), sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(normal())
    history = sets_over_time(tx, params, TARGET, 8, of=lambda params: params.fast)
    check_sets(*history)


def test_the_view_and_the_update_make_the_same_choice():
    """An inner optimizer that shifts everything shows where the update is let through."""
    shift = optax.stateless(lambda updates, _: jax.tree.map(jnp.ones_like, updates))
    tx = top_kast(shift)
    theta, state = normal(), tx.init(normal())
    _, state = tx.update(jnp.ones_like(theta), state, theta)
    other = normal(seed=5)  # θ that no update has made
    forward, backward = tk.keep_masks(other, state)
    np.testing.assert_array_equal(forward, oracle.select(np.asarray(other), 0.1))
    np.testing.assert_array_equal(tk.forward_params(other, state), np.where(forward, other, 0))
    updates, _ = tx.update(jnp.ones_like(other), state, other)
    np.testing.assert_array_equal(updates != 0, backward)


# 2. Derivatives, and the inner optimizer itself at densities of 1.


def test_derivatives_through_the_update_are_the_inner_optimizers():
    theta, cotangent = normal(), normal(seed=3)
    tx = lambda rate: top_kast(optax.adam(rate), exploration_weight=0.0)  # noqa: E731
    state = tx(0.1).init(theta)
    backward = tk.keep_masks(theta, state)[1]

    def wrapped(rate, grads):
        return tx(rate).update(grads, state, theta)[0]

    def inside(rate, grads):
        inner = optax.adam(rate)
        updates, _ = inner.update(jnp.where(backward, grads, 0), inner.init(theta), theta)
        return jnp.where(backward, updates, 0)

    grads = normal(seed=4)
    found, expected = (
        jax.jit(lambda rate, g, f=f: jax.vjp(f, rate, g)[1](cotangent))(jnp.float32(0.1), grads)
        for f in (wrapped, inside)
    )
    assert abs(float(expected[0])) > 0
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-7)
    assert np.all(np.asarray(found[1])[~np.asarray(backward)] == 0)


@pytest.mark.parametrize("inner", [optax.adamw(1e-2), optax.sgd(0.1, momentum=0.9)])
def test_at_full_density_the_wrapper_is_the_inner_optimizer_to_the_bit(inner):
    tx = tk.top_kast(inner, 1.0, 1.0, refresh_every=1, exploration_weight=0.0)

    def run(tx, view):
        @jax.jit
        def step(params, state):
            grads = jnp.sin(3 * view(params, state)) - TARGET
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state = normal(), tx.init(normal())
        for _ in range(5):
            params, state = step(params, state)
        return np.asarray(params)

    found, expected = run(tx, tk.forward_params), run(inner, lambda params, _: params)
    assert found.tobytes() == expected.tobytes()


# 3. What the default rules take.


def taken(params):
    leaves = resolve(params, None, 0.1, 0.2, tk.Unstructured())
    return {name for name, leaf in leaves.items() if leaf is not None}


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_default_rules_on_flax_linen():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.LayerNorm(name="ln_1")(x)
            x = nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(x, x)
            return nn.Dense(8, name="mlp")(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            split = {"params": True}
            layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs=split, length=3)
            x, _ = layers(name="layers")(x, None)
            x = nn.Conv(8, (3,), name="conv")(x)
            return nn.BatchNorm(use_running_average=True, name="bn")(x)

    params = jax.eval_shape(Model().init, jax.random.key(0), abstract(2, 5, 8))["params"]
    attention = {f"layers/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert taken(params) == attention | {"layers/mlp/kernel", "conv/kernel"}
    assert params["layers"]["attention"]["query"]["bias"].shape == (3, 4, 2)


def test_default_rules_on_flax_nnx():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.attention = nnx.MultiHeadAttention(4, 8, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.embed = nnx.Embed(16, 8, rngs=rngs)

    params = nnx.state(nnx.eval_shape(Model), nnx.Param)
    attention = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert taken(params) == attention | {"embed/embedding"}


def test_default_rules_on_equinox():
    class Model(eqx.Module):
        conv: eqx.nn.Conv2d
        linear: eqx.nn.Linear
        norm: eqx.nn.LayerNorm

    make = lambda key: Model(  # noqa: E731
        eqx.nn.Conv2d(2, 3, 3, key=key), eqx.nn.Linear(4, 5, key=key), eqx.nn.LayerNorm((4, 6))
    )
    params = eqx.filter(make(jax.random.key(0)), eqx.is_inexact_array)
    assert taken(params) == {"conv/weight", "linear/weight"}
    assert params.conv.bias.shape == (3, 1, 1)
    assert params.norm.weight.shape == (4, 6)


def test_default_rules_on_haiku():
    params = {
        "mlp/~/linear_0": {"w": abstract(4, 8, 8), "b": abstract(4, 8)},
        "attention/query": {"w": abstract(8, 8), "b": abstract(2, 4)},
        "layer_norm": {"scale": abstract(4, 8), "offset": abstract(4, 8)},
        "batch_norm/~/mean_ema": {"average": abstract(1, 1, 1, 8), "hidden": abstract(1, 8)},
        "embed": {"embeddings": abstract(16, 8)},
        "lora": {"a": abstract(8, 2), "b": abstract(2, 8)},
    }
    matrices = {"mlp/~/linear_0/w", "attention/query/w", "embed/embeddings", "lora/a", "lora/b"}
    assert taken(params) == matrices


def test_default_rules_tell_norms_from_layers_whose_names_begin_alike():
    norms = ("ln", "lnf", "ln_1", "ln_final", "bn2", "bn2a", "pre_norm", "norms", "LayerNorm_0")
    layers = ("lnet", "bneck", "bnet_1", "lnproj", "normal_layer")
    params = {name: {"w": abstract(8, 8)} for name in (*norms, *layers)}
    assert taken(params) == {f"{name}/w" for name in layers}


def test_the_default_is_told_once_on_stderr(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a program that configures none
    monkeypatch.setattr(logging.getLogger("topkast_jax"), "handlers", [])
    monkeypatch.setattr(logging.lastResort, "level", logging.WARNING)
    monkeypatch.setattr(rules_module, "_told", set())
    tx = tk.top_kast(optax.sgd(0.1), 0.1, 0.2)
    params = {"a_kernel": jnp.ones((4, 4)), "a_bias": jnp.ones(4)}
    for _ in range(2):
        tx.init(params)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "sparse: a_kernel; dense: a_bias" in told[0]
    tk.top_kast(optax.sgd(0.1), 0.1, 0.2, rules=[(".*k.*", tk.Sparse()), (".*", tk.Dense())]).init(
        params
    )
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (None, r"nothing is sparse: b \(4,\); give rules"),
        ([(".*", tk.Dense())], "nothing is sparse"),
        ([(".*", tk.Sparse()), ("b", tk.Dense())], "rule 'b' is hidden: earlier rules match all"),
    ],
)
def test_rules_that_do_nothing_are_refused(rules, message):
    tx = tk.top_kast(optax.sgd(0.1), 0.1, 0.2, rules=rules)
    with pytest.raises(tk.SparsityError, match=message):
        tx.init({"b": jnp.ones(4)})


def test_describe_counts_what_is_kept():
    params = {"w": abstract(8, 10), "b": abstract(10), "s": abstract(3, 4, 5)}
    rules = [("s", tk.Sparse(stacked=0, forward_density=0.5)), ("w", tk.Sparse()),
             (".*", tk.Dense())]  # fmt: skip
    tx = optax.chain(optax.clip(1.0), tk.top_kast(optax.sgd(0.1), 0.1, 0.2, rules=rules))
    rows = [line.split()[-3:] for line in tk.describe(params, tx).splitlines()[1:]]
    assert rows == [["10", "10", "10"], ["30", "30", "60"], ["8", "16", "80"], ["48", "56", "150"]]


# 4. Ties at the first choice.


def test_a_leaf_of_zeros_does_not_train_its_first_rows_only():
    params = {"layer_0": {"b": jnp.zeros((64, 8))}, "layer_1": {"b": jnp.zeros((64, 8))}}
    tx = top_kast(optax.sgd(0.0))
    state = tx.init(params)
    backward = [np.asarray(x) for x in jax.tree.leaves(tk.keep_masks(params, state)[1])]
    for mask in backward:
        assert mask.sum() == oracle.keep_count(512, 0.2)
        # 102 of 512 entries at random touch 54 of 64 rows on average; the first ones touch 13.
        assert mask.any(axis=1).sum() > 40
        assert 8 < mask[:32].any(axis=1).sum() < 32 + 1
        assert mask[32:].sum() > 30
    assert np.any(backward[0] != backward[1])
    _, state = tx.update(params, state, params)
    later = np.asarray(tk.keep_masks(params, state)[1]["layer_0"]["b"])
    np.testing.assert_array_equal(later, oracle.select(np.zeros((64, 8)), 0.2))


# 5. A NaN stays and shows.


def test_a_nan_stays_in_the_forward_set_and_shows():
    theta = jnp.arange(1.0, 41.0).reshape(4, 10)
    tx = top_kast(optax.sgd(0.1))
    state = tx.init(theta)
    grads = jnp.zeros_like(theta).at[3, 4].set(jnp.nan)  # entry 35 is in B, not in A
    assert not tk.keep_masks(theta, state)[0][3, 4]
    for _ in range(3):
        updates, state = tx.update(grads, state, theta)
        theta = optax.apply_updates(theta, updates)
        forward, backward = tk.keep_masks(theta, state)
        assert forward[3, 4]
        assert np.isnan(tk.forward_params(theta, state)[3, 4])
        assert (forward.sum(), backward.sum()) == (4, 8)
        np.testing.assert_array_equal(forward, oracle.select(np.asarray(theta), 0.1))


def test_a_nan_shows_always_sparse():
    params = {"w": np.arange(1.0, 41.0, dtype=np.float32).reshape(4, 10)}
    sparse = AlwaysSparse(top_kast(optax.sgd(0.1)), params)
    values, state, reservoir = sparse.start(params)
    values = {"w": values["w"].at[5].set(jnp.nan)}  # the first four values are those of A
    state = state._replace(step=jnp.int32(1))
    values, state, reservoir = sparse.refresh(1, values, state, reservoir)
    assert np.isnan(tk.forward_params(values, state)["w"].values[:4]).sum() == 1


# 6. The gradient at the forward view.


def test_value_and_grad_is_taken_at_the_forward_view():
    theta = normal()
    tx = top_kast(optax.sgd(0.1))
    state = tx.init(theta)
    calls = []

    def loss(w, x, *, scale):
        calls.append(w)
        return scale * jnp.sum((x @ w) ** 2), {"sum": jnp.sum(w)}

    x = normal((4, 16), 7)
    run = tk.value_and_grad(loss, has_aux=True)
    (value, aux), grads = jax.jit(lambda p, s: run(p, s, x, scale=0.5))(theta, state)
    alpha = np.where(oracle.select(np.asarray(theta), 0.1), np.asarray(theta), 0)
    np.testing.assert_allclose(value, 0.5 * np.sum((x @ alpha) ** 2), rtol=1e-4)
    np.testing.assert_allclose(grads, np.asarray(x).T @ (x @ alpha), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(aux["sum"], alpha.sum(), rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


def test_a_step_on_nnx_state_leaves_the_reservoir_in_the_model():
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)  # `params` holds the model's own variables
    theta = np.array(model.kernel)
    tx = tk.top_kast(optax.sgd(0.1), 0.1, 0.2)
    state = tx.init(params)
    loss = lambda p, x: jnp.sum(nnx.merge(graph, p)(x) ** 2)  # noqa: E731
    _, grads = tk.value_and_grad(loss)(params, state, jnp.ones((1, 8)))
    np.testing.assert_array_equal(model.kernel, theta)
    updates, state = tx.update(grads, state, params)
    nnx.update(model, optax.apply_updates(params, updates))
    outside = ~oracle.select(theta, 0.2)
    np.testing.assert_array_equal(np.asarray(model.kernel)[outside], theta[outside])
    assert np.any(np.asarray(model.kernel) != theta)


# 7. Counts beyond 2**31.


@pytest.mark.parametrize("shape", [(4, 2**16, 2**15), (2, 2**16, 2**16), (1, 2**20, 2**12)])
def test_no_count_of_flags_can_overflow(shape):
    """Each int32 count is of fewer than 2**31 entries, whichever axis is stacked."""
    counts = jax.eval_shape(statistics._counted, jax.ShapeDtypeStruct(shape, bool))
    assert counts.dtype == jnp.int32
    assert int(np.prod(shape)) // int(np.prod(counts.shape)) < 2**31


def test_counts_in_parts_add_up(monkeypatch):
    """With a limit that a small leaf passes."""
    monkeypatch.setattr(statistics, "MOST_ENTRIES", 50)
    statistics._leaf_counts.clear_cache()
    theta = normal((3, 8, 10))
    tx = top_kast(optax.sgd(0.1), rules=[(".*", tk.Sparse(stacked=1))])
    state = tx.init({"w": theta})
    found = statistics.leaf_counts({"w": theta}, state)["w"]
    shares = statistics.mask_statistics({"w": theta}, state)
    statistics._leaf_counts.clear_cache()
    assert (found.entries, found.forward, found.backward) == (240, 24, 48)
    assert float(shares["backward_density"]) == pytest.approx(48 / 240)


# 8. A inside B, and states of other parameters or rules.


def test_a_traced_density_never_lifts_the_forward_set_out_of_the_backward_one():
    theta = normal()
    falling = optax.piecewise_constant_schedule(0.5, {1: 0.2})  # 0.5, then 0.1
    tx = optax.inject_hyperparams(tk.top_kast)(optax.sgd(0.1), 0.25, falling, refresh_every=1)
    state, update = tx.init(theta), jax.jit(tx.update)
    for _ in range(4):
        forward, backward = tk.keep_masks(theta, state)
        assert not np.any(forward & ~backward)
        assert forward.sum() == 64
        updates, state = update(TARGET, state, theta)
        theta = optax.apply_updates(theta, updates)
    assert backward.sum() == 64


def test_a_rule_whose_forward_density_passes_a_plain_or_traced_backward_one():
    theta = normal()
    rules = [(".*", tk.Sparse(forward_density=0.5))]
    plain = tk.top_kast(optax.sgd(0.1), 0.1, 0.2, rules=rules)
    injected = optax.inject_hyperparams(tk.top_kast)(optax.sgd(0.1), 0.1, 0.2, rules=rules)
    for tx in (plain, injected):
        forward, backward = tk.keep_masks(theta, tx.init(theta))
        np.testing.assert_array_equal(forward, oracle.select(np.asarray(theta), 0.5))
        np.testing.assert_array_equal(forward, backward)


def test_a_state_made_under_other_rules_is_refused():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    rules = {name: [(name, tk.Sparse()), (".*", tk.Dense())] for name in ("a", "b")}
    state = top_kast(optax.sgd(0.1), rules=rules["a"]).init(params)
    with pytest.raises(tk.SparsityError, match="a is dense under these rules and sparse in this"):
        top_kast(optax.sgd(0.1), rules=rules["b"]).update(params, state, params)


def test_a_state_of_other_shapes_is_refused():
    tx = top_kast(optax.sgd(0.1))
    state = tx.init({"w": jnp.ones((4, 4))})
    params = {"w": jnp.ones((1, 4))}
    message = r"w has shape \(1, 4\) and this state is of parameters where it has shape \(4, 4\)"
    for use in (tk.forward_params, tk.keep_masks, lambda p, s: tx.update(p, s, p)):
        with pytest.raises(tk.SparsityError, match=message) as caught:
            use(params, state)
        assert "\n" not in str(caught.value)
    with pytest.raises(tk.SparsityError, match="these lack w"):
        tk.forward_params({"v": jnp.ones((4, 4))}, state)


# 9. Wrappers and inner optimizers that do not fit.


def test_an_optimizer_is_wrapped_once():
    once = top_kast(optax.sgd(0.1))
    with pytest.raises(tk.SparsityError, match="wrap an optimizer once"):
        top_kast(once)
    with pytest.raises(tk.SparsityError, match="wrap an optimizer once"):
        top_kast(optax.chain(optax.clip(1.0), once)).init({"w": jnp.ones((4, 4))})


def test_two_wrappers_of_one_leaf_in_a_chain_are_refused():
    params = {"w": normal()}
    tx = optax.chain(top_kast(optax.sgd(0.1)), tk.static_random(optax.identity(), 0.1, 0))
    state = tx.init(params)
    for view in (tk.forward_params, tk.keep_masks, statistics.mask_statistics):
        with pytest.raises(tk.SparsityError, match="w is sparse in two sparsity states"):
            view(params, state)


def test_what_is_frozen_inside_the_wrapper_keeps_its_values_and_sets():
    params = {"on": normal(), "off": normal(seed=1)}
    inner = optax.partition(
        {"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, {"on": "train", "off": "freeze"}
    )
    tx = top_kast(inner)
    state = tx.init(params)
    sets = tk.keep_masks(params, state)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["off"], params["off"])
    assert np.any(new["on"] != params["on"])
    for before, after in zip(sets, tk.keep_masks(new, state), strict=True):
        np.testing.assert_array_equal(before["off"], after["off"])


def test_muon_is_refused_always_sparse():
    params = {"w": np.ones((8, 8), np.float32)}
    with pytest.raises(tk.SparsityError, match="treats leaves by their number of axes"):
        AlwaysSparse(top_kast(optax.contrib.muon(1e-2)), params)


@pytest.mark.parametrize("argument", ["value_fn", "obj_fn", "grad_fn"])
def test_a_loss_that_the_inner_optimizer_evaluates_is_that_of_the_forward_view(argument):
    def update(updates, state, params=None, **extra):
        return jax.tree.map(lambda u: u * extra[argument](params), updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    params = {"w": normal()}
    tx = top_kast(inner, exploration_weight=0.0)
    state = tx.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, state, params, **{argument: lambda p: jnp.sum(p["w"] ** 3)})
    theta = np.asarray(params["w"])
    alpha = np.where(oracle.select(theta, 0.1), theta, 0)
    backward = oracle.select(theta, 0.2)
    np.testing.assert_allclose(np.asarray(updates["w"])[backward], np.sum(alpha**3), rtol=1e-4)


def test_a_line_search_searches_on_the_forward_view():
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    inner = optax.chain(optax.sgd(1.0), search)
    tx = tk.top_kast(inner, 0.5, 0.5, rules=EVERYTHING, exploration_weight=0.0)
    loss = lambda w: jnp.sum(10 * (w - TARGET) ** 2)  # noqa: E731
    theta, state = normal(), tx.init(normal())

    @jax.jit
    def step(theta, state):
        value, grads = tk.value_and_grad(loss)(theta, state)
        updates, state = tx.update(grads, state, theta, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(theta, updates), state, value

    values = []
    for _ in range(4):
        theta, state, value = step(theta, state)
        values.append(float(value))
    stored = float(state.inner_state[1].value)
    np.testing.assert_allclose(stored, loss(tk.forward_params(theta, state)), rtol=1e-4)
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


# 7. What is outside B stays outside, and states keep their types and their buffers.


@pytest.mark.parametrize("stop", [0, 2])
def test_a_full_backward_set_that_shrinks_leaves_the_rest_alone(stop):
    inner = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
    tx = tk.top_kast(inner, 0.1, 1.0, 1, 0.0, stop_exploring_at=stop, rules=EVERYTHING)
    theta = normal()
    state = tx.init(theta)
    for finished in range(4):
        updates, state = tx.update(jnp.ones_like(theta), state, theta)
        forward, _ = tk.keep_masks(theta, state)
        if finished >= stop:
            assert not jnp.any(updates[~forward])
            norm = float(jnp.linalg.norm(updates))
            np.testing.assert_allclose(norm, 0.01, rtol=1e-5)  # of A alone, at the clip
        theta = theta + updates


def test_a_dense_share_in_a_global_ranking_loses_what_it_gives_away():
    params = {"a": normal(), "b": normal(seed=1)}
    rules = [("a", tk.Sparse(forward_density=1.0)), ("b", tk.Sparse())]
    tx = tk.methods.snip(optax.sgd(0.1), 0.1, rules=rules)
    grads = {"a": normal(seed=2), "b": 10 * normal(seed=3)}
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    forward, _ = tk.keep_masks(optax.apply_updates(params, updates), state)
    assert not jnp.all(forward["a"])
    assert not jnp.any(updates["a"][~forward["a"]])


@pytest.mark.parametrize("method", [tk.methods.rigl, tk.methods.snfs, tk.top_kast])
def test_states_of_injected_hyperparameters_can_be_donated(method):
    more = (0.2,) if method is tk.top_kast else ()
    tx = optax.inject_hyperparams(method)(optax.adam(0.1), 0.1, *more)
    params = {"w": normal()}
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        params, state = step(params, state)
    assert jnp.all(jnp.isfinite(params["w"]))


def test_a_donated_state_leaves_the_callers_numbers():
    fraction = jnp.float32(0.3)
    tx = tk.methods.rigl(optax.sgd(0.1), 0.1, drop_fraction=fraction)
    params = {"w": normal()}
    update = jax.jit(lambda s, p: tx.update(p, s, p), donate_argnums=0)
    update(tx.init(params), params)
    assert not fraction.is_deleted()


def test_gradients_of_another_type_keep_the_type_of_the_state():
    tx = tk.methods.rigl(optax.adam(0.01), 0.1, refresh_every=2)
    params = {"w": normal()}

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=3)
    assert params["w"].dtype == jnp.float32


def test_the_exploration_penalty_is_not_rounded_to_the_gradients_type():
    tx = top_kast(optax.identity(), exploration_weight=1e-3)
    theta = jnp.ones((16, 16))
    state = tx.init(theta)
    forward, backward = tk.keep_masks(theta, state)
    shaped, _ = tx.update(jnp.ones_like(theta, jnp.bfloat16), state, theta)
    expected = np.where(forward, 1.001, np.where(backward, 1.01, 0.0))
    np.testing.assert_allclose(shaped, expected, rtol=1e-6)


def test_a_forward_view_of_cast_parameters_is_refused():
    tx = top_kast(optax.sgd(0.1))
    theta = normal()
    state = tx.init(theta)
    with pytest.raises(tk.SparsityError, match="is bfloat16 and this state is of float32"):
        tk.forward_params(theta.astype(jnp.bfloat16), state)
    assert tk.forward_params(theta, state).astype(jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(("last", "stop"), [(4, None), (None, 6)])
def test_skipped_steps_end_with_the_last_choice(last, stop):
    method = RigL(last_choice_at=last, skips_update=True)
    tx = tk.sparsify(
        optax.sgd(0.1), method, forward_density=0.2, refresh_every=2, stop_exploring_at=stop
    )
    params = {"w": normal()}
    state = tx.init(params)
    moved = []
    for _ in range(8):
        updates, state = tx.update({"w": jnp.ones((16, 16))}, state, params)
        moved.append(bool(jnp.any(updates["w"])))
        params = optax.apply_updates(params, updates)
    # Steps 2 and 4 are skipped; the update after each brings in what has entered B.
    assert moved[4:] == [True, True, True, True]


def test_a_first_choice_at_the_first_update_freezes_after_it():
    class Late(tk.Method):
        first_choice = "first_update"

        def choose(self, layer, leaf, counts):
            masks, _ = leaf.pattern.top(leaf.pattern.magnitudes(layer.theta), counts)
            return tk.Sets(*masks), None

    theta = normal()
    tx = tk.sparsify(
        optax.sgd(0.1), Late(), forward_density=0.1, backward_density=0.3, rules=EVERYTHING,
        stop_exploring_at=0,
    )  # fmt: skip
    _, state = tx.update(theta, tx.init(theta), theta)
    forward, backward = tk.keep_masks(theta, state)
    assert int(forward.sum()) == int(backward.sum()) == 26


def test_the_gradient_that_a_line_search_keeps_reaches_all_of_b():
    target = jnp.asarray(TARGET)
    loss = lambda x: 0.5 * jnp.sum((x - target) ** 2)  # noqa: E731
    tx = top_kast(optax.lbfgs(), exploration_weight=0.0, refresh_every=None)
    theta = normal()
    state = tx.init(theta)
    grads = jax.grad(loss)(tk.forward_params(theta, state))
    updates, state = tx.update(
        grads, state, theta, value=loss(tk.forward_params(theta, state)), grad=grads, value_fn=loss
    )
    theta = optax.apply_updates(theta, updates)
    _, backward = tk.keep_masks(theta, state)
    kept = optax.tree.get(state, "grad")
    alpha = tk.forward_params(theta, state)
    np.testing.assert_allclose(kept[backward], (alpha - target)[backward], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [jax.random.key(0), jax.random.PRNGKey(0), jnp.float32(1)])
def test_a_key_as_a_seed_is_refused(seed):
    with pytest.raises(tk.SparsityError, match=r"seed=.*: must be an integer"):
        tk.top_kast(optax.sgd(0.1), 0.1, 0.2, seed=seed)
