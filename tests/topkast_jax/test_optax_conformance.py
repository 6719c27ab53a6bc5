"""What optax's own tests ask of an optimizer, asked of every factory of this package."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk

# Each method by its name, choosing at every step, always.
OPTIONS = {
    "top_kast": {"backward_density": 0.5, "refresh_every": 1},
    "static_random": {"seed": 3},
    "snip": {},
    "pruning": {"begin_at": 1, "end_at": 4, "refresh_every": 1},
}
METHODS = {
    name: functools.partial(tk.methods.get(name), forward_density=0.25,
                            **OPTIONS.get(name, {"refresh_every": 1}))
    for name in tk.methods.names()
}  # fmt: skip
FACTORIES = METHODS | {
    "reset": functools.partial(tk.top_kast, forward_density=0.25, backward_density=0.5,
                               refresh_every=3, inner_state="reset"),
    "stopping": functools.partial(tk.top_kast, forward_density=0.25, backward_density=0.5,
                                  refresh_every=1, stop_exploring_at=2, inner_state="reset"),
    "blocks": functools.partial(tk.top_kast, forward_density=0.25, backward_density=0.5,
                                refresh_every=1, pattern=tk.Block(4, 2)),
}  # fmt: skip
every_factory = pytest.mark.parametrize("factory", FACTORIES)
# The others differ from these in how they choose, which is not what is asked; -m slow runs all.
QUICK = ("top_kast", "rigl", "snip", "blocks", "stopping")


def telling(factories):
    """All of them; those that are not quick are marked."""
    return [
        pytest.param(name, marks=[] if name in QUICK or name not in METHODS else pytest.mark.slow)
        for name in factories
    ]


telling_factories = pytest.mark.parametrize("factory", telling(FACTORIES))


def example(dtype=jnp.float32):
    kernel = jax.random.normal(jax.random.key(0), (8, 4), jnp.float32)
    return {"kernel": kernel.astype(dtype), "bias": jnp.ones(4, dtype)}


def objective(params):
    return sum(jnp.sum((x - jnp.ones_like(x)) ** 2) for x in jax.tree.leaves(params))


def described(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


@telling_factories
def test_unknown_extra_arguments_and_one_compilation(factory):
    tx = FACTORIES[factory](optax.adam(1e-2))

    @jax.jit
    def step(params, state):
        grads = jax.grad(objective)(tk.forward_params(params, state))
        updates, state = tx.update(grads, state, params, an_argument_nobody_knows=1)
        return optax.apply_updates(params, updates), state

    params, state = example(), tx.init(example())
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1
    assert np.any(params["kernel"] != example()["kernel"])


@every_factory
def test_map_params_reaches_everything_that_is_shaped_like_a_parameter(factory):
    tx = FACTORIES[factory](optax.adam(1e-2))
    params = example()
    state = tx.init(params)
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, same, state)

    # The documented use: a state's shardings from those of the parameters. As with `optax.masked`,
    # what is not there for a dense leaf is a MaskedNode.
    specs = {"kernel": jax.P("x", None), "bias": jax.P("x")}
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    placed = optax.tree.map_params(
        tx, lambda x, spec: x if is_masked(x) else spec, state, specs,
        transform_non_params=lambda _: jax.P(), is_leaf=is_masked,
    )  # fmt: skip
    expected = {(8, 4): specs["kernel"], (4,): specs["bias"]}
    # What a method remembers is a tree of its own, by the path of a leaf.
    placed, memory = placed._replace(memory=()), jax.tree.leaves(placed.memory)
    assert all(spec == jax.P() for spec in memory)
    state, shapes = state._replace(memory=()), []

    def check(spec, arrays):
        for x in jax.tree.leaves(arrays):
            assert spec == expected.get(jnp.shape(x), jax.P())
            shapes.append(jnp.shape(x))

    jax.tree.map(check, placed, state, is_leaf=lambda x: isinstance(x, jax.P))
    assert len(shapes) == len(jax.tree.leaves(state))
    # Sets and two moments, and the gradient that these methods grow by.
    assert shapes.count((8, 4)) == 3 + (factory in ("rigl", "srigl"))


@pytest.mark.parametrize("method", telling(METHODS))
def test_inject_hyperparams_around_the_factory_changes_nothing(method):
    options = {"exploration_weight": 1e-2, "stop_exploring_at": 5} if method == "top_kast" else {}
    options = {"forward_density": 0.25, **OPTIONS.get(method, {"refresh_every": 1}), **options}
    factory = functools.partial(tk.methods.get(method), optax.adam(1e-2))
    plain, injected = factory(**options), optax.inject_hyperparams(factory)(**options)
    params, grads = example(), jax.tree.map(jnp.cos, example())
    state, state_injected = jax.jit(plain.init)(params), jax.jit(injected.init)(params)
    for _ in range(2):
        updates, state = jax.jit(plain.update)(grads, state, params)
        others, state_injected = jax.jit(injected.update)(grads, state_injected, params)
        found = (others, state_injected.inner_state)
        assert jax.tree.structure(found) == jax.tree.structure((updates, state))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            found, (updates, state),
        )  # fmt: skip


@telling_factories
def test_multi_steps_waits_and_then_takes_the_mean(factory):
    tx = FACTORIES[factory](optax.sgd(0.1))
    several = optax.MultiSteps(tx, 2)
    params = example(jnp.bfloat16)
    first, second = jax.tree.map(jnp.cos, params), jax.tree.map(jnp.sin, params)
    update = jax.jit(several.update)
    updates, state = update(first, several.init(params), params)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, np.zeros(u.shape)), updates)
    updates, _ = update(second, state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, _ = tx.update(mean, tx.init(params), params)
    assert described(updates) == described(params)
    to_float = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float32), tree)  # noqa: E731
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-4),
        to_float(updates), to_float(expected),
    )  # fmt: skip


@every_factory
@pytest.mark.parametrize(
    "dtype",
    [pytest.param("float16", marks=pytest.mark.slow), "bfloat16", "float32", "float64"],
)
def test_types_and_shapes_are_stable_under_cond(factory, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx = FACTORIES[factory](optax.adam(1e-2))
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), example())
        state = jax.eval_shape(tx.init, params)

        def step(flip, params, state):
            grads = jax.grad(objective)(tk.forward_params(params, state))
            updates, state = jax.lax.cond(
                flip,
                lambda: tx.update(grads, state, params),
                lambda: (jax.tree.map(jnp.zeros_like, params), state),
            )
            return optax.apply_updates(params, updates), state

        # `cond` raises where its branches differ, in weak types too.
        found = jax.eval_shape(step, jax.ShapeDtypeStruct((), bool), params, state)
        assert described(found) == described((params, state))


def test_float64_is_selected_as_float64():
    with jax.enable_x64(True):
        theta = 1 + jnp.arange(16, dtype=jnp.float64).reshape(4, 4) * 1e-12
        tx = tk.top_kast(optax.sgd(1e-13), 0.25, 0.5, refresh_every=1)
        params, state = {"w": theta}, tx.init({"w": theta})
        updates, state = tx.update({"w": jnp.ones_like(theta)}, state, params)
        params = optax.apply_updates(params, updates)
        assert params["w"].dtype == jnp.float64
        kept = np.flatnonzero(tk.keep_masks(params, state)[0]["w"])
    np.testing.assert_array_equal(kept, [12, 13, 14, 15])


@every_factory
def test_init_takes_shapes_in_place_of_arrays(factory):
    tx = FACTORIES[factory](optax.adam(1e-2))
    params = example()
    abstract = tx.init(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params))
    state = tx.init(params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    assert described(abstract) == described(state)


@pytest.mark.parametrize("factory", ["top_kast", "static_random"])
def test_a_schedule_is_a_learning_rate(factory):
    def trained(*rates):
        txs = [FACTORIES[factory](optax.sgd(rate)) for rate in rates]
        params, state = example(), txs[0].init(example())
        for step in range(3):
            update = jax.jit(txs[step % len(txs)].update)
            updates, state = update(jax.tree.map(jnp.cos, params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        trained(optax.piecewise_constant_schedule(1e-2, {2: 0.1})), trained(1e-2, 1e-2, 1e-3),
    )  # fmt: skip


ALONG_AXIS_1 = [(".*", tk.Sparse(stacked=1))]
EXPLICIT = METHODS | {
    "reset": functools.partial(tk.top_kast, forward_density=0.25, backward_density=0.5,
                               refresh_every=1, stop_exploring_at=3, inner_state="reset"),
    "stacked_on_a_whole_axis": functools.partial(
        tk.top_kast, forward_density=0.25, backward_density=0.5, refresh_every=1,
        rules=[(".*", tk.Sparse(stacked=0))]),
    "stacked_on_a_cut_axis": functools.partial(
        tk.top_kast, forward_density=0.25, backward_density=0.5, refresh_every=1,
        rules=ALONG_AXIS_1),
    "blocks_across_shards": functools.partial(
        tk.top_kast, forward_density=0.25, backward_density=0.5, refresh_every=1,
        pattern=tk.Block(4, 2)),
    "static_random_stacked": functools.partial(
        tk.static_random, forward_density=0.25, seed=3, rules=ALONG_AXIS_1),
    "static_random_blocks": functools.partial(
        tk.static_random, forward_density=0.25, seed=3, pattern=tk.Block(4, 2)),
}  # fmt: skip


@pytest.mark.parametrize("factory", telling(EXPLICIT))
def test_an_explicit_mesh_keeps_types_and_sets(factory):
    """Each of the eight devices has one row of each matrix."""
    theta = jax.random.normal(jax.random.key(1), (2, 8, 4)).astype(jnp.float16)
    tx = EXPLICIT[factory](optax.sgd(0.1, momentum=0.9))
    alone = tx.init(theta)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        cut = jax.device_put(theta, jax.NamedSharding(mesh, jax.P(None, "x")))
        eager, state = tx.init(cut), jax.jit(tx.init)(cut)
        types = jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, eager) == types
        assert jax.typeof(state.sets).sharding.spec == jax.P(None, "x", None)
        updates, new = jax.jit(tx.update)(cut, state, cut)
        assert jax.tree.map(jax.typeof, new) == types
        assert jax.typeof(updates) == jax.typeof(cut)
        forward, _ = jax.jit(tk.keep_masks)(cut + updates, new)
        assert jax.typeof(forward).sharding.spec == jax.P(None, "x", None)
        sets = jax.device_get(state.sets)
    np.testing.assert_array_equal(sets, alone.sets)


def test_update_outside_jit_on_an_explicit_mesh():
    theta = jax.random.normal(jax.random.key(1), (8, 4))
    tx = EXPLICIT["reset"](optax.adam(0.1))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        cut = jax.device_put(theta, jax.NamedSharding(mesh, jax.P("x")))
        state = tx.init(cut)
        _, new = tx.update(cut, state, cut)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
