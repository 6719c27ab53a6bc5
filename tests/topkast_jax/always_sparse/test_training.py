"""Always-sparse training against the masked path with its inner state reset."""

import dataclasses
import gc
import math
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import topkast_jax as tk
from topkast_jax.always_sparse import AlwaysSparse, matmul, to_dense, values_of, with_tile
from topkast_jax.always_sparse import host as hosts
from topkast_jax.always_sparse.host import Move
from topkast_jax.always_sparse.refresh import Mover
from topkast_jax.sets import CompactState, find_compact, leaf_flags, presents

ALL = [("stack/.*", tk.Sparse(stacked=0)), (".*kernel", tk.Sparse()), (".*", tk.Dense())]
LAYERS = [("stack/.*", tk.Sparse(stacked=0)), (".*", tk.Dense())]
ONE = [("first/kernel", tk.Sparse()), (".*", tk.Dense())]  # compiles in a third of the time


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "first": {"kernel": rng.normal(size=(12, 8)) / 3, "bias": rng.normal(size=8)},
        "stack": {"kernel": rng.normal(size=(3, 8, 8)) / 3},
        "conv": {"kernel": rng.normal(size=(3, 1, 8, 8)) / 3},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def loss(params, x, y):
    x = jnp.tanh(matmul(x, params["first"]["kernel"]) + params["first"]["bias"][None])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(matmul(x, w)), None), x, params["stack"]["kernel"])
    kernel = params["conv"]["kernel"]
    summed = lambda w, x: jnp.einsum("bc,hwcd->bd", x, w)  # noqa: E731
    x = summed(kernel, x) if isinstance(kernel, jax.Array) else with_tile(summed, kernel, x)
    return jnp.mean((x - y) ** 2)


def data(steps, seed=1):
    """Inputs, and targets from a fixed teacher: gradients do not vanish into rounding errors."""
    rng = np.random.default_rng(seed)
    teacher = rng.normal(size=(12, 8)).astype(np.float32)
    inputs = rng.normal(size=(steps, 24, 12)).astype(np.float32)
    return [(x, x @ teacher) for x in inputs]


def masked(tx, params, batches):
    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(loss)(tk.forward_params(params, state), x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for x, y in batches:
        params, state = step(params, state, x, y)
        yield params, state


def compact(sparse, tx, params, batches):
    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(loss, allow_int=True)(tk.forward_params(params, state), x, y)
        updates, state = tx.update(values_of(grads), state, params)
        return optax.apply_updates(params, updates), state

    params, state, reservoir = sparse.start(params, tx)
    done = 0
    for x, y in batches:
        params, state = step(params, state, x, y)
        if (finished := int(find_compact(state).step)) > done:  # MultiSteps: not in every step
            params, state, reservoir = sparse.refresh(finished, params, state, reservoir)
            done = finished
        yield params, state, reservoir


def at_step(state, step):
    """The state as if so many steps were finished."""
    here = lambda s: s._replace(step=jnp.int32(step)) if isinstance(s, CompactState) else s  # noqa: E731
    return jax.tree.map(here, state, is_leaf=lambda s: isinstance(s, CompactState))


def assert_same(dense, other, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.max(np.abs(a - b)) <= rtol * max(np.max(np.abs(a)), 1e-3)


@jax.jit
def flags_of(params, state):
    return presents(params, state).flags


def on_b(inner_state, sets):
    """An inner state's arrays of a sparse leaf's shape, 0 outside B."""
    flags = [f for f in jax.tree.leaves(sets) if np.ndim(f)]

    def inside(array):
        for f in flags:
            if np.shape(array) == f.shape:
                return np.where(np.asarray(f) & 2, array, 0)
        return array

    return jax.tree.map(inside, inner_state)


INNER = {
    "momentum": lambda: optax.sgd(0.01, momentum=0.9),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "rmsprop": lambda: optax.rmsprop(1e-3, momentum=0.9),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9)),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    # Entries outside B have a state of their own: what init gives, or decay that gathers.
    "adagrad": lambda: optax.adagrad(0.1),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(0.1, weight_decay=0.01),
    "decayed": lambda: optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.01, momentum=0.9)),
}


@pytest.mark.parametrize(
    ("inner", "rules", "pattern", "stop"),
    [
        pytest.param("momentum", ALL, tk.Unstructured(), None, marks=pytest.mark.slow),
        pytest.param("adam", ALL, tk.Block(4, 2), None, marks=pytest.mark.slow),
        ("adam", LAYERS, tk.Block(4, 2), None),
        ("adam", ONE, tk.Unstructured(), 100),
        ("momentum", ONE, tk.Unstructured(), 0),
        *[
            pytest.param(inner, ONE, tk.Unstructured(), stop, marks=pytest.mark.slow)
            for inner, stop in (
                ("adamw", None),
                ("rmsprop", None),
                ("adagrad", 100),
                ("schedule_free", 100),
            )
        ],
        ("inject", ONE, tk.Unstructured(), None),
        ("decayed", ONE, tk.Unstructured(), 100),
        pytest.param("clipped", ONE, tk.Block(3, 2), None, marks=pytest.mark.slow),
        pytest.param("momentum", ONE, tk.FanIn(), None, marks=pytest.mark.slow),
        ("momentum", ONE, tk.NOfM(2, 4), None),
    ],
)
def test_follows_the_masked_path(inner, rules, pattern, stop):
    """200 steps, a refresh every 7, sets identical at every refresh."""
    densities = (0.5, 0.75) if isinstance(pattern, tk.NOfM) else (0.2, 0.4)
    tx = tk.top_kast(
        INNER[inner](), *densities, refresh_every=7, exploration_weight=1e-2, rules=rules,
        pattern=pattern, inner_state="reset", stop_exploring_at=stop,
        exploration_decay=(lambda steps: 0.02 / (1 + steps)) if inner == "adam" else 0.0,
    )  # fmt: skip
    params, batches = parameters(), data(200)
    sparse = AlwaysSparse(tx, params)
    pairs = zip(
        masked(tx, params, batches),
        compact(sparse, sparse.transform, params, batches), strict=True,
    )  # fmt: skip
    changed = 0.0
    for i, ((dense, state), (values, held, reservoir)) in enumerate(pairs, start=1):
        if i % 7 and i != stop:
            continue
        found, found_state = sparse.to_masked(values, held, reservoir)
        assert_same(dense, found)
        now = flags_of(dense, state)
        for name, flags in reservoir.sets.items():
            np.testing.assert_array_equal(now[name], flags, err_msg=f"{name} {i}")
        # What has just entered B gets its first state in the next update of the masked path.
        stayed = [now[name] & f for name, f in leaf_flags(state).items()]
        inner_b = on_b(state.inner_state, stayed)
        assert_same(inner_b, on_b(found_state.inner_state, stayed), 1e-4)
        changed += float(tk.statistics.churn_since_last_refresh(dense, state))
    assert changed > 0.05 or stop == 0


def test_the_device_holds_nothing_dense():
    params = parameters()
    tx = tk.top_kast(optax.adam(1e-3), 0.1, 0.2, rules=ALL, inner_state="reset")
    sparse = AlwaysSparse(tx, params)
    *_, (values, state, _) = compact(sparse, sparse.transform, params, data(2))
    dense = {"first": 12 * 8, "stack": 3 * 8 * 8, "conv": 3 * 8 * 8}
    for name, size in dense.items():
        index = find_compact(state).kernels[name]["kernel"].index
        for leaf in (values[name]["kernel"], index, state.inner_state[0].mu[name]["kernel"]):
            assert leaf.size == pytest.approx(0.2 * size, rel=0.05)


def test_a_delayed_choice_is_that_of_the_earlier_step():
    """Sets in use from t + d on are those of θ after step t, chosen while steps run or before."""
    params, batches, delay = parameters(), data(40), 4
    tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, refresh_every=10, rules=ALL, inner_state="reset")
    sparse = AlwaysSparse(tx, params, delay=delay)
    in_use = [
        {k: np.array(v & 3) for k, v in reservoir.sets.items()}
        for _, _, reservoir in compact(sparse, sparse.transform, params, batches)
    ]
    chosen = {}
    watched = compact(sparse, sparse.transform, params, batches)  # to_masked waits for the choice
    for i, (values, state, reservoir) in enumerate(watched, start=1):
        if i % 10 == delay and i > 10:
            for name, theta in chosen.items():
                np.testing.assert_array_equal(_oracle_sets(name, theta), in_use[i - 1][name])
        elif i > 1:
            for name, sets in in_use[i - 1].items():
                np.testing.assert_array_equal(sets, in_use[i - 2][name])
        if i % 10 == 0:
            dense, _ = sparse.to_masked(values, state, reservoir)
            chosen = {n: np.array(dense[n.split("/")[0]]["kernel"]) for n in in_use[0]}
    assert chosen


def _oracle_sets(name, theta):
    layers = theta if name.startswith("stack") else theta[None]
    flags = []
    for layer in layers:
        order = np.argsort(-np.abs(layer).ravel(), kind="stable")
        flag = np.zeros(layer.size, np.uint8)
        flag[order[: int(0.4 * layer.size + 0.5)]] = 2
        flag[order[: int(0.2 * layer.size + 0.5)]] = 3
        flags.append(flag.reshape(layer.shape))
    return np.stack(flags) if name.startswith("stack") else flags[0]


def test_there_and_back_again_to_the_bit():
    params = parameters()
    tx = tk.top_kast(optax.adam(1e-2), 0.2, 0.5, refresh_every=3, rules=ONE, inner_state="reset")
    sparse = AlwaysSparse(tx, params)
    *_, (values, state, reservoir) = compact(sparse, sparse.transform, params, data(20))
    dense, held = sparse.to_masked(values, state, reservoir)
    before = jax.tree.map(np.array, (values, state, reservoir))
    again = sparse.from_masked(dense, held)
    assert jax.tree.structure(again) == jax.tree.structure(before)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", [tk.methods.set_evolution, tk.methods.rigl])
def test_back_again_where_a_choice_is_due(method):
    """What enters starts from zero with new moments, as in the update that follows under masks."""
    plan = method(INNER["decayed"](), 0.3, drop_fraction=0.5).plan
    tx = tk.sparsify(
        plan.inner, plan.method, forward_density=0.3, refresh_every=2, inner_state="reset",
        rules=[(".*", tk.Sparse(stacked=0))],
    )  # fmt: skip
    dense = {"w": grid(2, 8, 10)}
    state, grads, update = tx.init(dense), {"w": grid(2, 8, 10, seed=1)}, jax.jit(tx.update)

    def step(dense, state):
        updates, state = update(grads, state, dense)
        return optax.apply_updates(dense, updates), state

    for _ in range(2):
        dense, state = step(dense, state)
    assert state.due
    sparse = AlwaysSparse(tx, dense)
    values, held, reservoir = sparse.from_masked(dense, state)
    view = tk.forward_params(dense, state)
    assert_same(view, {"w": to_dense(jax.device_get(tk.forward_params(values, held)["w"]))})
    index = find_compact(held).kernels["w"].index
    at_units = {"w": jnp.take_along_axis(grads["w"].reshape(2, -1), index, axis=1)}
    updates, held = sparse.transform.update(at_units, held, values)
    dense, state = step(dense, state)
    values = optax.apply_updates(values, updates)
    found, found_state = sparse.to_masked(values, held, reservoir)
    assert_same(dense, found)
    assert_same(
        on_b(state.inner_state, state.sets), on_b(found_state.inner_state, found_state.sets)
    )


def test_masks_made_under_other_rules_do_not_come_over():
    params = {"v": grid(8, 8), "w": grid(8, 8)}
    rules = [("v", tk.Dense()), ("w", tk.Sparse())]
    some, both = (tk.top_kast(optax.sgd(0.1), 0.25, 0.5, rules=r) for r in (rules, None))
    for tx, other, words in (
        (some, both, "v is dense under these rules and sparse in this state"),
        (both, some, "v is sparse under these rules and dense in this state"),
    ):
        with pytest.raises(tk.SparsityError, match=words):
            AlwaysSparse(tx, params).from_masked(params, other.init(params))


def test_a_step_that_donates_its_arrays_deletes_none_of_a_masked_state():
    """A state that comes over is copied to where it belongs, one that goes leaves the device."""
    params, device = {"w": grid(16, 16), "bias": jnp.ones(16)}, jax.devices()[1]
    inner = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.adam(0.1))
    tx = tk.top_kast(inner, 0.2, 0.4)
    sparse = AlwaysSparse(tx, params, place=lambda _: jax.sharding.SingleDeviceSharding(device))
    before = params, tx.init(params)
    values, state, reservoir = sparse.from_masked(*before)
    assert {d for x in jax.tree.leaves((values, state)) for d in x.devices()} == {device}
    after = sparse.to_masked(values, state, reservoir)
    step = jax.jit(sparse.transform.update, donate_argnums=1)
    step(values, state, values)
    assert state.inner_state[0].rng_key.is_deleted()
    (key,) = (x for x in jax.tree.leaves(after) if isinstance(x, jax.Array))
    assert key == jax.random.key(0)
    jax.tree.map(np.testing.assert_array_equal, before[1].inner_state[1], after[1].inner_state[1])


@pytest.mark.parametrize("device", [None, 1])
def test_refreshes_do_not_make_a_step_compile_again(device):
    """Arrays are committed to a device from the start on, or never."""
    params = {"w": grid(16, 16), "bias": jnp.ones(16)}
    tx = tk.top_kast(optax.adam(0.1), 0.2, 0.4, refresh_every=2)
    place = device and (lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[device]))
    now, ahead = (AlwaysSparse(tx, params, delay=delay, place=place) for delay in (0, 1))

    @jax.jit
    def step(values, state):
        updates, state = now.transform.update(values, state, values)
        return optax.apply_updates(values, updates), state

    for sparse in (now, ahead):
        starts = sparse.start(params), sparse.from_masked(params, tx.init(params))
        for values, state, reservoir in starts:
            for i in range(1, 6):
                values, state = step(values, state)
                values, state, reservoir = sparse.refresh(i, values, state, reservoir)
            assert step._cache_size() == 1


def test_an_optimizer_that_evaluates_the_loss_does_so_at_the_forward_view():
    params, x = {"w": grid(16, 16)}, grid(4, 16)
    loss = lambda p: jnp.mean((matmul(x, p["w"]) - 1) ** 2)  # noqa: E731
    search = optax.chain(optax.sgd(50.0), optax.scale_by_backtracking_linesearch(15))
    tx = tk.top_kast(search, 0.2, 0.4)
    sparse = AlwaysSparse(tx, params)
    values, held, reservoir = sparse.start(params)

    def moved(update, params, state):
        value, grads = tk.value_and_grad(loss)(params, state)
        updates, state = update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(params, updates), state

    dense, state = moved(tx.update, params, tx.init(params))
    found, found_state = sparse.to_masked(*moved(sparse.transform.update, values, held), reservoir)
    assert_same(dense, found)
    rate = state.inner_state[1].learning_rate
    assert rate == found_state.inner_state[1].learning_rate < 1

    again = optax.GradientTransformationExtraArgs(
        lambda _: optax.EmptyState(), lambda _, state, params, grad_fn: (grad_fn(params), state)
    )
    sparse = AlwaysSparse(tk.top_kast(again, 0.2, 0.4), params)
    values, held, _ = sparse.start(params)
    _, grads = tk.value_and_grad(loss)(values, held)
    view = lambda p: tk.forward_params(p, held)  # noqa: E731  (of a view, it is the view)
    grad_fn = jax.grad(lambda p: loss(view(p)), allow_int=True)
    assert_same(grads, sparse.transform.update(grads, held, values, grad_fn=grad_fn)[0])


def test_a_stop_that_has_passed_already_ends_exploration():
    params = {"w": grid(16, 16)}
    explores, stops = (
        AlwaysSparse(tk.top_kast(optax.adam(0.1), 0.2, 0.4, refresh_every=2, **more), params)
        for more in ({}, {"stop_exploring_at": 2})
    )
    values, state, reservoir = explores.start(params)
    for step in range(1, 6):
        sparse = explores if step < 4 else stops
        updates, state = sparse.transform.update({"w": jnp.ones_like(values["w"])}, state, values)
        values = optax.apply_updates(values, updates)
        values, state, reservoir = sparse.refresh(step, values, state, reservoir)
        assert values["w"].size == (102 if step < 4 else 51)
    forward, backward = tk.keep_masks(*sparse.masks(reservoir))
    np.testing.assert_array_equal(forward["w"], backward["w"])


def test_a_stop_that_passed_in_a_masked_run_ends_exploration():
    params = {"w": grid(16, 16)}
    explores, stops = (
        tk.top_kast(optax.adam(0.1), 0.2, 0.4, refresh_every=2, **more)
        for more in ({}, {"stop_exploring_at": 2})
    )
    state, grads = explores.init(params), {"w": jnp.ones((16, 16))}
    for _ in range(5):
        updates, state = jax.jit(explores.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    sparse = AlwaysSparse(stops, params)
    values, held, reservoir = sparse.from_masked(params, state)
    updates, held = sparse.transform.update({"w": jnp.ones_like(values["w"])}, held, values)
    values = optax.apply_updates(values, updates)
    values, held, reservoir = sparse.refresh(6, values, held, reservoir)
    updates, state = stops.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    assert values["w"].size == 51
    wanted = tk.keep_masks(params, state)[1]
    np.testing.assert_array_equal(tk.keep_masks(*sparse.masks(reservoir))[1]["w"], wanted["w"])


def test_optax_maps_over_what_a_state_holds_of_the_values():
    params = {"w": grid(16, 16), "bias": jnp.ones(16)}
    sparse = AlwaysSparse(tk.top_kast(optax.adam(0.1), 0.2, 0.4), params)
    tx = optax.chain(optax.clip(1.0), sparse.transform)
    values, state, _ = sparse.start(params, tx)
    found = optax.tree.map_params(
        tx, lambda x, value: x + value, state, values, transform_non_params=lambda x: x + 1
    )
    moments = state[1].inner_state[0]
    expected = moments._replace(count=1, mu=values, nu=values)
    jax.tree.map(np.testing.assert_array_equal, found[1].inner_state[0], expected)
    more = jax.tree.map(lambda x: x + 1, (state[1].step, state[1].kernels))
    jax.tree.map(np.testing.assert_array_equal, (found[1].step, found[1].kernels), more)


@pytest.mark.parametrize("split", [False, True])
def test_a_refresh_of_arrays_that_were_read_from_a_file(split):
    tx = tk.top_kast(optax.adam(0.1), 0.2, 0.4, refresh_every=1)
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    halves = lambda shape: jax.sharding.NamedSharding(mesh, P("fsdp") if shape else P())  # noqa: E731
    place = halves if split else None
    sparse, _, values, state, reservoir = refreshed(tx, {"w": grid(16, 16)}, place=place)
    state = at_step(state, 1)
    read = jax.tree.map(np.array, (values, state, reservoir))
    found, expected = sparse.refresh(1, *read), sparse.refresh(1, values, state, reservoir)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_fixed_random_mask_and_multi_steps():
    """Another method, and a wrapper around the transform whose state has the values' shape."""
    params, batches = parameters(), data(12)
    tx = tk.static_random(optax.adam(1e-2), 0.3, seed=3, rules=ONE)
    sparse = AlwaysSparse(tx, params)
    *_, (dense, _) = masked(tx, params, batches)
    *_, (values, held, reservoir) = compact(sparse, sparse.transform, params, batches)
    assert_same(dense, sparse.to_masked(values, held, reservoir)[0])

    tx = tk.top_kast(optax.adam(1e-2), 0.2, 0.4, refresh_every=4, rules=ONE, inner_state="reset")
    sparse = AlwaysSparse(tx, params)
    outer = optax.MultiSteps(sparse.transform, 2).gradient_transformation()
    for _, state, _ in compact(sparse, outer, params, batches):
        mu = state.inner_opt_state.inner_state[0].mu["first"]["kernel"]
        assert state.acc_grads["first"]["kernel"].shape == mu.shape


WRAPPERS = {
    r"state.z\['w'\]": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    r"state\[1\].z\['w'\]": lambda tx: optax.chain(
        optax.clip(1.0), optax.contrib.schedule_free(tx, 0.1)
    ),
    r"state.x0\['w'\]": optax.contrib.mechanize,
    r"state\[1\].sum_of_squares\['w'\]": lambda tx: optax.chain(tx, optax.scale_by_rss(0.1)),
}


@pytest.mark.parametrize("where", WRAPPERS)
def test_a_wrapper_that_remembers_parameters_is_refused(where):
    """It moves entries outside B under masks, and units that enter B would start from zeros."""
    tx, params = tk.top_kast(optax.sgd(0.1), 0.2, 0.4), {"w": grid(16, 16)}
    sparse = AlwaysSparse(tx, params)
    wrapper = WRAPPERS[where](sparse.transform)
    masked_state = WRAPPERS[where](tx).init(params)
    refused = f"a wrapper's {where} is not zero at first"
    for call in (
        lambda: sparse.start({"w": jnp.zeros((16, 16))}, wrapper),
        lambda: sparse.abstract_start(wrapper),
        lambda: sparse.from_masked(params, masked_state, wrapper),
    ):
        with pytest.raises(tk.SparsityError, match=refused) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(tk.SparsityError, match=f"from_masked: .*{where}.*from_masked.params, st"):
        sparse.from_masked(params, masked_state)


def test_a_wrapper_that_starts_at_zero_comes_over_from_masks():
    tx, params = tk.top_kast(optax.sgd(0.1), 0.2, 0.4), {"w": grid(16, 16)}
    sparse = AlwaysSparse(tx, params)
    around = lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()  # noqa: E731
    state = around(tx).init(params)._replace(acc_grads=params)
    values, held, _ = sparse.from_masked(params, state, around(sparse.transform))
    np.testing.assert_array_equal(held.acc_grads["w"], values["w"])


class FirstHalf(tk.Method):
    """Keeps the first half of a leaf and scales its gradient."""

    def choose(self, layer, leaf, counts):
        mask = jnp.arange(layer.theta.size).reshape(layer.theta.shape) < counts.forward
        return tk.Sets(mask, mask), ()

    def gradient(self, grad, theta, sets, leaf, step):
        return grad * 2 + jnp.sign(theta) * (3 + step)


def test_a_method_with_a_gradient_of_its_own():
    params = {name: jnp.asarray(np.random.default_rng(1).normal(size=(4, 6))) for name in "ab"}
    tx = tk.sparsify(optax.sgd(0.1), FirstHalf(), forward_density=0.5, refresh_every=1)
    sparse = AlwaysSparse(tx, params)
    values, held, reservoir = sparse.start(params)
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params)
    moved, held = sparse.transform.update(jax.tree.map(jnp.ones_like, values), held, values)
    values, held, reservoir = sparse.refresh(1, optax.apply_updates(values, moved), held, reservoir)
    assert_same(optax.apply_updates(params, updates), sparse.to_masked(values, held, reservoir)[0])
    for ours, theirs in zip(
        tk.keep_masks(*sparse.masks(reservoir)), tk.keep_masks(params, state), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_factored_moments_of_units_move_and_others_stay():
    """Adafactor's sums over 64 blocks of 64 rows and 2 columns: by block, and by row of a block."""
    theta = jnp.asarray(np.random.default_rng(0).normal(size=(512, 16)), jnp.float32)
    inner = optax.adafactor(0.5, min_dim_size_to_factor=2)
    tx = tk.top_kast(inner, 0.5, 1.0, pattern=tk.Block(64, 2), refresh_every=1)
    sparse = AlwaysSparse(tx, {"w": theta})
    values, state, reservoir = sparse.start({"w": theta})
    index = np.array(find_compact(state).kernels["w"].index)
    scale = jax.random.normal(jax.random.key(0), (64, 1, 1))
    updates, state = sparse.transform.update({"w": values["w"] * scale}, state, values)
    values = optax.apply_updates(values, updates)
    factored = lambda s: {  # noqa: E731
        k: np.array(getattr(s.inner_state[0], k)["w"]) for k in ("v_row", "v_col")
    }
    before = factored(state)
    assert before["v_row"].shape == before["v_col"].shape == (64, 2)
    _, state, _ = sparse.refresh(1, values, state, reservoir)
    moved = [list(index).index(i) for i in np.array(find_compact(state).kernels["w"].index)]
    assert moved != sorted(moved)
    np.testing.assert_array_equal(factored(state)["v_row"], before["v_row"][moved])
    np.testing.assert_array_equal(factored(state)["v_col"], before["v_col"])


def grid(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def refreshed(tx, params, move=1.0, **options):
    """An object with its state, places, and values of which some have changed their rank."""
    sparse = AlwaysSparse(tx, params, **options)
    values, state, reservoir = sparse.start(params)
    scale = jax.random.uniform(jax.random.key(0), (128,), minval=0.1, maxval=3.0)
    scaled = jax.tree.map(
        lambda x: x * scale[: len(x)].reshape(-1, *(1,) * (x.ndim - 1)) * move, values
    )
    before = find_compact(state)
    index = jax.tree.map(np.array, before.kernels)
    return sparse, index, scaled, state, reservoir


def test_units_that_enter_have_what_init_gives():
    inner = optax.adagrad(0.1, initial_accumulator_value=0.5)
    tx = tk.top_kast(inner, 0.2, 0.4, refresh_every=1, exploration_weight=0.0)
    sparse, index, values, state, reservoir = refreshed(tx, {"w": grid(16, 16)})
    _, state = sparse.transform.update({"w": jnp.ones_like(values["w"])}, state, values)
    _, state, _ = sparse.refresh(1, values, state, reservoir)
    entered = ~np.isin(find_compact(state).kernels["w"].index, index["w"].index)
    assert entered.any()
    sums = state.inner_state[0].sum_of_squares["w"]
    np.testing.assert_allclose(sums, np.where(entered, 0.5, 1.5), rtol=1e-6)


def test_accumulators_that_lie_below_a_parameter_s_path_move_too():
    """SM3 keeps one accumulator an axis, in a list: that of the units moves, others stay."""
    tx = tk.top_kast(optax.sm3(0.1), 0.25, 0.5, pattern=tk.Block(2, 3), refresh_every=1)
    sparse, index, values, state, reservoir = refreshed(tx, {"w": grid(16, 12)})
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), values)
    updates, state = sparse.transform.update(grads, state, values)
    before = [np.array(x) for x in state.inner_state[0].mu["w"]]
    assert [x.shape for x in before] == [(16,), (2,), (3,)]
    values = optax.apply_updates(values, updates)
    _, state, _ = sparse.refresh(1, values, state, reservoir)
    after, places = state.inner_state[0].mu["w"], find_compact(state).kernels["w"].index
    where = [list(index["w"].index).index(i) if i in index["w"].index else -1 for i in places]
    assert where != sorted(where) or -1 in where
    np.testing.assert_array_equal(after[0], [before[0][j] if j >= 0 else 0 for j in where])
    for stays in (1, 2):
        np.testing.assert_array_equal(after[stays], before[stays])


@pytest.mark.parametrize(
    ("inner", "pattern", "where"),
    [
        (optax.flatten(optax.adam(0.1)), tk.Unstructured(), r"state\[0\].mu"),
        (optax.adafactor(0.1, min_dim_size_to_factor=8), tk.Block(8, 1), r"v_row\['w'\]"),
    ],
)
def test_a_state_that_mixes_units_is_refused(inner, pattern, where):
    """A vector of all parameters; sums that factor the units only just."""
    tx = tk.top_kast(inner, 0.25, 0.5, pattern=pattern)
    with pytest.raises(tk.SparsityError, match=f"{where}.* in a way that a refresh cannot follow"):
        AlwaysSparse(tx, {"w": grid(8, 16), "b": jnp.ones(3)})


def test_a_state_without_a_dense_form_is_not_converted():
    tx = tk.top_kast(optax.sm3(0.1), 0.25, 0.5, refresh_every=1)
    sparse = AlwaysSparse(tx, {"w": grid(8, 8)})
    with pytest.raises(tk.SparsityError, match=r"to_masked: .*mu\['w'\]\[0\] would have to turn"):
        sparse.to_masked(*sparse.start({"w": grid(8, 8)}))
    dense = optax.sm3(0.1).init({"w": grid(8, 8)})
    masked = tx.init({"w": grid(8, 8)})
    assert len(dense[0].mu["w"]) == 2
    with pytest.raises(tk.SparsityError, match="from_masked: "):
        sparse.from_masked({"w": grid(8, 8)}, masked)


@pytest.mark.parametrize("tree", [grid(16, 16), {"index": grid(16, 16)}, [grid(16, 16)]])
def test_any_tree_and_arrays_that_stand_in_two_places(tree):
    """A bare array, an entry named like the kernel's; a copy of the values in the state."""
    tx = tk.top_kast(optax.contrib.prodigy(0.5), 0.2, 0.4, refresh_every=1)
    sparse = AlwaysSparse(tx, tree)
    values, state, reservoir = sparse.start(tree)
    (held,) = jax.tree.leaves(values)
    values, (state, best), reservoir = sparse.refresh(
        1, values, (at_step(state, 1), values), reservoir
    )
    assert not held.is_deleted()
    (now,), (kept,) = jax.tree.leaves(values), jax.tree.leaves(best)
    np.testing.assert_array_equal(now, kept)
    np.testing.assert_array_equal(now, jax.tree.leaves(state.inner_state.params0)[0])


def test_what_stays_is_moved_in_place():
    """No second copy of values and moments on the device while a refresh runs."""
    tx = tk.top_kast(optax.adam(0.1), 0.2, 0.4, refresh_every=1)
    sparse, _, values, state, reservoir = refreshed(tx, {"w": grid(16, 16)})
    gone = [values["w"], state.inner_state[0].mu["w"], find_compact(state).kernels["w"].index]
    sparse.refresh(1, values, at_step(state, 1), reservoir)
    assert [array.is_deleted() for array in gone] == [True] * 3


def test_theta_in_another_order_of_memory_is_written_to():
    theta = np.asfortranarray(np.random.default_rng(0).normal(size=(2, 3, 8, 8)), np.float32)
    rules = [(".*", tk.Sparse(stacked=(0, 1)))]
    tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, refresh_every=1, rules=rules)
    sparse = AlwaysSparse(tx, {"w": theta})
    values, state, reservoir = sparse.start({"w": theta})
    doubled = {"w": values["w"] * 2}
    dense, _ = sparse.to_masked(doubled, state, reservoir)
    kept = np.asarray(reservoir.sets["w"] & 2 != 0)
    np.testing.assert_allclose(dense["w"], np.where(kept, 2 * theta, theta), rtol=1e-6)
    read_only = jax.tree.map(lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
                             reservoir)  # fmt: skip
    values, state, again = sparse.refresh(1, doubled, at_step(state, 1), read_only)
    np.testing.assert_allclose(again.theta["w"], dense["w"])


def test_sixty_four_bits_of_one_thread_reach_the_choice():
    """θ whose entries differ beyond float32 alone, all larger than the next."""
    with jax.enable_x64(True):
        theta = np.ones((8, 8)) + np.random.default_rng(0).permutation(64).reshape(8, 8) * 1e-12
        tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, refresh_every=1)
        sparse = AlwaysSparse(tx, {"w": theta})
        _, _, reservoir = sparse.start({"w": theta})
        np.testing.assert_array_equal(reservoir.sets["w"] & 3, _oracle_sets("w", theta))


def test_a_choice_under_way_is_waited_for_before_theta_is_written(monkeypatch):
    """Exploring stops while a thread chooses: θ stays as it was until the thread is done."""
    tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, refresh_every=4, stop_exploring_at=5)
    params = {"w": grid(16, 16)}
    sparse = AlwaysSparse(tx, params, delay=2)
    values, state, reservoir = sparse.start(params)
    choose, seen, hold = hosts.Choice.__call__, [], threading.Event()

    def slow(self, step, theta, *rest):
        seen.append(theta["w"].copy())
        hold.wait(0.3)
        seen.append(theta["w"].copy())
        return choose(self, step, theta, *rest)

    monkeypatch.setattr(hosts.Choice, "__call__", slow)
    values, state, reservoir = sparse.refresh(4, values, at_step(state, 4), reservoir)
    sparse.refresh(5, jax.tree.map(lambda x: x * 2, values), at_step(state, 5), reservoir)
    np.testing.assert_array_equal(*seen)


def test_a_reservoir_saved_without_its_choice():
    tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, refresh_every=4)
    params = {"w": grid(16, 16)}
    sparse = AlwaysSparse(tx, params, delay=2)
    values, state, reservoir = sparse.start(params)
    values, state, reservoir = sparse.refresh(4, values, at_step(state, 4), reservoir)
    state = at_step(state, 6)
    later = AlwaysSparse(tx, params, delay=2)
    with pytest.raises(tk.SparsityError, match="step 4 is not in this reservoir.*settled"):
        later.refresh(6, values, state, reservoir)
    expected = sparse.refresh(6, jax.tree.map(jnp.copy, values), state, reservoir)
    assert expected[2].chosen.keys() == {"w"}


def test_one_object_serves_one_run_after_another():
    """A choice that is under way when another run starts is none of that run's."""
    params = parameters()
    tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, refresh_every=10, rules=ONE, inner_state="reset")
    sparse = AlwaysSparse(tx, params, delay=4)
    *_, _ = compact(sparse, sparse.transform, params, data(10))
    _, _, reservoir = sparse.start(jax.tree.map(lambda x: -x[..., ::-1], params))
    assert sparse.settled(reservoir) is reservoir


def test_what_a_first_loop_gets_wrong():
    params = parameters()
    tx = tk.top_kast(optax.sgd(0.1), np.float32(0.2), jnp.float32(0.4), rules=ONE)
    sparse = AlwaysSparse(tx, params)
    values, state, reservoir = sparse.start(params)
    for read in (tk.keep_masks, tk.statistics.mask_statistics):
        with pytest.raises(tk.SparsityError, match="take AlwaysSparse.masks.reservoir."):
            read(values, state)
    other, state = optax.sgd(0.1).init(values), at_step(state, 100)
    short = jax.tree.map(lambda x: x[:-1], values)
    kernels = tk.forward_params(values, state)
    for words, call in {
        "not the one that start returned": lambda: sparse.refresh(100, values, other, reservoir),
        "refresh: first/kernel must be an array float32.38., found float32.12, 8.":
            lambda: sparse.refresh(100, params, state, reservoir),
        "a compact kernel: take values_of": lambda: sparse.refresh(100, kernels, state, reservoir),
        "refresh: first/bias .*found float32.7.":
            lambda: sparse.refresh(100, values | {"first": short["first"] | {
                "kernel": values["first"]["kernel"]}}, state, reservoir),
        "step=1.5: must be an integer": lambda: sparse.refresh(1.5, values, state, reservoir),
        "traced one: call it outside jit": lambda: jax.jit(
            lambda v: sparse.refresh(100, v, state, reservoir))(values),
        "start: stack/kernel must be .*float32.3, 8, 8., found": lambda: sparse.start(
            params | {"stack": {"kernel": params["stack"]["kernel"].T[:, :3]}}),
        "start: not a tree of the parameters' structure": lambda: sparse.start(params["first"]),
        "an abstract one": lambda: sparse.start(jax.eval_shape(lambda: params)),
        "found bfloat16": lambda: sparse.start(
            jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)),
        "transform is no part of the tx": lambda: sparse.start(params, optax.sgd(0.1)),
        "init does not know where": lambda: sparse.transform.init(values),
        "take the tree of values that came with the state":
            lambda: tk.forward_params(params, state),
        "update: gradient of first/kernel": lambda: sparse.transform.update(params, state, values),
        "update: values of first/kernel": lambda: sparse.transform.update(values, state, params),
        "update.*: state is a dict, must": lambda: sparse.transform.update(state, values, values),
        "update.*: state is a tuple, must":
            lambda: sparse.transform.update(values, (state,), values),
        "update: gradients must have the structure .*missing: conv/kernel":
            lambda: sparse.transform.update(values["first"], state, values),
        "update: values must have the structure":
            lambda: sparse.transform.update(values, state, values["first"]),
        "reservoir: found a CompactState": lambda: sparse.masks(state),
        "reservoir: found a dict": lambda: sparse.settled(values),
        "reservoir: found a CompactState, must be": lambda: sparse.refresh(1, values, state, state),
        "reservoir: theta: first/kernel must be of shape .12, 8., found nothing":
            lambda: sparse.refresh(1, values, state, reservoir._replace(theta={})),
        "to_masked: this optimizer state": lambda: sparse.to_masked(values, other, reservoir),
    }.items():  # fmt: skip
        with pytest.raises(tk.SparsityError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    grads = jax.grad(loss, allow_int=True)(tk.forward_params(values, state), *data(1)[0])
    for found, expected in zip(
        jax.tree.leaves(sparse.transform.update(grads, state, values)[0]),
        jax.tree.leaves(sparse.transform.update(values_of(grads), state, values)[0]), strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(found, expected)


def test_value_and_grad_is_the_gradient_of_the_values():
    """Of all of B, in the tree that the update takes, with auxiliary data as well."""
    sparse = AlwaysSparse(tk.top_kast(optax.sgd(0.1), 0.2, 0.4, rules=ONE), parameters())
    values, state, _ = sparse.start(parameters())
    (batch,) = data(1)
    kernels = jax.jit(jax.value_and_grad(loss, allow_int=True))
    expected, grads = kernels(tk.forward_params(values, state), *batch)
    found, of_values = jax.jit(tk.value_and_grad(loss))(values, state, *batch)
    assert_same((expected, values_of(grads)), (found, of_values))
    assert jax.tree.structure(of_values) == jax.tree.structure(values)
    with_aux = tk.value_and_grad(lambda p, x, y: (loss(p, x, y), "aux"), has_aux=True)
    assert with_aux(values, state, batch[0], y=batch[1])[0][1] == "aux"


class Uneven(tk.Method):
    def choose(self, layer, leaf, counts):
        mask = jnp.arange(layer.theta.size).reshape(layer.theta.shape) < 5
        return tk.Sets(mask, mask), ()


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: optax.sgd(0.1), {}, "needs what top_kast.*found a GradientTransformation"),
        (lambda: tk.top_kast(optax.sgd(0.1), 0.1, 0.2), {"delay": 1.5}, "delay=1.5"),
        (
            lambda: tk.top_kast(optax.sgd(0.1), 0.1, 0.2, rules=[(".*", tk.Sparse())]),
            {},
            "s is a scalar",
        ),
        (lambda: tk.top_kast(optax.sgd(0.1), 0.1, 0.2), {"delay": 100}, "below refresh_every"),
        (lambda: tk.top_kast(optax.sgd(0.1), 0.1, 0.2), {"delay": -1}, "delay=-1"),
        (lambda: tk.static_random(optax.sgd(0.1), 0.1, seed=0), {"delay": 3}, "sets never change"),
        (lambda: tk.methods.snip(optax.sgd(0.1), 0.5), {}, "SNIP makes its first step with whole"),
        (lambda: tk.methods.snfs(optax.sgd(0.1), 0.5), {}, "SNFS observes the dense gradient"),
        (
            lambda: tk.top_kast(optax.sgd(0.1), 0.1, 0.2, pattern=tk.Block(5, 5)),
            {},
            "does not divide",
        ),
        (
            lambda: tk.top_kast(optax.sgd(0.1), 0.1, 0.2, pattern=tk.Block(4, 4)),
            {},
            r"w: forward density 0.1 of 4 blocks .* leaves less than one block",
        ),
        (lambda: tk.methods.pruning(optax.sgd(0.1), 0.5, 10, 20), {}, "other numbers of units"),
        (
            lambda: tk.top_kast(optax.sgd(0.1), 0.1, 0.2, pattern=tk.Channel()),
            {},
            r"w: pattern Channel\(\) has no compact form",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(make, options, words):
    with pytest.raises(tk.SparsityError, match=words) as caught:
        AlwaysSparse(make(), {"w": jnp.ones((8, 8)), "s": 1.0}, **options)
    assert "\n" not in str(caught.value)


def test_a_stack_without_layers_is_refused():
    tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, rules=[(".*", tk.Sparse(stacked=0))])
    with pytest.raises(tk.SparsityError, match="w: a stack of 0 layers .*must be dense"):
        AlwaysSparse(tx, {"w": jnp.zeros((0, 8, 8)), "v": jnp.ones((2, 8, 8))})


def test_sets_of_another_size_than_the_densities_ask_for():
    tx = tk.sparsify(optax.sgd(0.1), Uneven(), forward_density=0.5)
    sparse = AlwaysSparse(tx, {"w": jnp.ones((8, 8))})
    with pytest.raises(tk.SparsityError, match="w: always sparse needs sets of fixed size"):
        sparse.start({"w": jnp.ones((8, 8))})


def test_a_host_without_jax_cpu_backend(monkeypatch):
    def no_cpu(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", no_cpu)
    with pytest.raises(tk.SparsityError, match="cpu backend, which JAX_PLATFORMS=.*: add ',cpu'"):
        AlwaysSparse(tk.top_kast(optax.sgd(0.1), 0.25, 0.5, rules=ALL), parameters())


def test_a_step_that_is_not_that_of_the_state():
    """Found before a choice is made or missed; what is due is due by the state."""
    tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, refresh_every=10, stop_exploring_at=25)
    params = {"w": grid(16, 16)}
    sparse = AlwaysSparse(tx, params)
    values, state, reservoir = sparse.start(params)
    refused = "refresh: found step={}; must be the {} finished steps of the state"
    for given, finished in ((0, 1), (7, 3), (10, 9), (20, 21), (25, 24)):
        with pytest.raises(tk.SparsityError, match=refused.format(given, finished)):
            sparse.refresh(given, values, at_step(state, finished), reservoir)
    for step in (1, 2, 3):
        sparse.refresh(step, values, at_step(state, step), reservoir)
    with pytest.raises(tk.SparsityError, match=refused.format(3, 4)):
        sparse.refresh(3, values, at_step(state, 4), reservoir)


def test_a_refresh_that_was_left_out():
    """Steps may run together, as in a scan, as long as none of them ends with a refresh."""
    tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, refresh_every=4, stop_exploring_at=9)
    params = {"w": grid(16, 16)}

    def ends(steps, sparse, start):
        values, state, reservoir = start(sparse)
        for step in steps:
            state = at_step(state, step)
            values, state, reservoir = sparse.refresh(step, values, state, reservoir)
        return reservoir

    now, ahead = AlwaysSparse(tx, params), AlwaysSparse(tx, params, delay=2)
    new = lambda sparse: sparse.start(params)  # noqa: E731
    ends([2, 4, 8, 9], now, new)
    ends([4, 6, 8, 9], ahead, new)
    skipped = "refresh: found step=.*: the refresh that fell due after step {} was left out"
    for sparse, steps, due in (
        (now, [6], 4),
        (now, [3, 7], 4),
        (now, [4, 8, 11], 9),
        (ahead, [4, 8], 6),
        (ahead, [5], 4),
    ):
        with pytest.raises(tk.SparsityError, match=skipped.format(due)):
            ends(steps, sparse, new)
    back = lambda sparse: sparse.from_masked(params, tx.init(params))  # noqa: E731
    with pytest.raises(tk.SparsityError, match=skipped.format(4)):
        ends([5], now, back)

    # Another run may be at any step: one that was restored, or an earlier checkpoint of this one.
    ends([8, 9, 3], now, lambda _: jax.tree.map(jnp.array, now.start(params)))
    ends([4, 5, 2, 4], now, new)


def test_nothing_keeps_an_object_alive():
    """What jax.jit keeps of the functions it has compiled is gone with the object."""
    params, batches = parameters(), data(6)
    tx = tk.top_kast(optax.adam(1e-2), 0.2, 0.4, 2, stop_exploring_at=5, rules=ONE)
    sparse = AlwaysSparse(tx, params, delay=1)
    *_, (values, state, reservoir) = compact(sparse, sparse.transform, params, batches)
    sparse.from_masked(*sparse.to_masked(values, state, reservoir))
    jax.jit(sparse.transform.update)(values, state, values)
    gone = weakref.ref(sparse)
    del sparse
    gc.collect()
    assert gone() is None


def test_start_may_take_the_parameters_over():
    tx = tk.top_kast(optax.adam(1e-2), 0.2, 0.4, rules=ALL)
    expected = AlwaysSparse(tx, parameters()).start(parameters())
    arrays = jax.tree.map(np.array, parameters())
    found = AlwaysSparse(tx, parameters()).start(arrays, donate=True)
    assert found[2].theta["first/kernel"] is arrays["first"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    given = parameters()
    found = AlwaysSparse(tx, parameters()).start(given, donate=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert given["stack"]["kernel"].is_deleted()
    assert not given["first"]["bias"].is_deleted()


def test_no_layer_of_a_stack_is_chosen_with_another(monkeypatch):
    """The loop of a stack would run until the last of its layers has found its threshold."""
    choose, shapes = hosts._choose, []

    def seen(*args):
        shapes.append(np.shape(args[4]))
        return choose(*args)

    monkeypatch.setattr(hosts, "_choose", seen)
    tx = tk.top_kast(optax.adam(1e-2), 0.2, 0.4, refresh_every=1, rules=ALL)
    sparse = AlwaysSparse(tx, parameters())
    sparse.start(parameters())
    assert sorted(shapes) == [(3, 1, 8, 8), *[(8, 8)] * 3, (12, 8)]


@pytest.mark.parametrize("pattern", [tk.Unstructured(), tk.Block(4, 2)], ids=str)
def test_a_choice_made_ahead_says_what_leaves(pattern):
    """What leaves is written back to θ when the sets come to the device, and nothing else is."""
    tx = tk.top_kast(
        optax.sgd(0.5), 0.2, 0.4, refresh_every=2, inner_state="reset", pattern=pattern, rules=ONE
    )
    sparse = AlwaysSparse(tx, parameters(), delay=1)
    values, state, reservoir = sparse.start(parameters())
    for step in (1, 2, 3):
        kernel = find_compact(state).kernels["first"]["kernel"]
        held = jax.tree.map(lambda x: 0.3 * x, values)
        shaped = dataclasses.replace(kernel, values=held["first"]["kernel"])
        before = to_dense(jax.device_get(shaped))
        old = np.array(reservoir.sets["first/kernel"]) & 2 != 0
        state = at_step(state, step)
        values, state, reservoir = sparse.refresh(step, held, state, reservoir)
    new = reservoir.sets["first/kernel"] & 2 != 0
    left = old & ~new
    assert left.any()
    theta = reservoir.theta["first/kernel"]
    np.testing.assert_array_equal(theta[left], before[left])
    kernel = find_compact(state).kernels["first"]["kernel"]
    now = to_dense(jax.device_get(dataclasses.replace(kernel, values=values["first"]["kernel"])))
    np.testing.assert_array_equal(now[old & new], before[old & new])
    np.testing.assert_array_equal(now[new & ~old], theta[new & ~old])


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("above", [0, 1])
@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
def test_a_move_is_that_of_numpy(stack, above, apart):
    rng, spares = np.random.default_rng(0), {} if apart else None
    layers, b, m, lead = math.prod(stack), 6, 4, (2,) * above
    source = np.stack([rng.permutation(b) for _ in range(layers)]).astype(np.int32)
    source[:, [1, 4]] = [-1, -3]
    shape = (*lead, *stack)
    array = rng.standard_normal((*shape, b, 5), np.float32)
    fresh = rng.standard_normal((*shape, m, 5), np.float32)
    move = Move(source, np.zeros((layers, m), np.int32), np.zeros((layers, m)), 3, [])
    for _ in range(2):  # With spares, the second one goes into the first one's array.
        held, first = jnp.array(array), jnp.array(fresh)
        mover = Mover(move, stack, None, None, lambda _: False, spares)
        moved = mover.moment(held, first, above + len(stack))
        for i, row in enumerate(source):
            at = (..., *np.unravel_index(i, stack), slice(None), slice(None))
            both = np.concatenate([array[at], fresh[at][..., ::-1, :]], axis=-2)
            np.testing.assert_array_equal(np.asarray(moved)[at], both[..., row, :])
    assert not apart or len(spares) == 1


def test_a_run_may_go_back_while_a_choice_is_under_way():
    """Its own checkpoint, with a choice in it, goes on in the same object as in a new one."""
    params = {"w": grid(16, 16), "v": grid(8, 16)}
    tx = tk.top_kast(optax.adam(0.1), 0.2, 0.4, refresh_every=10, inner_state="reset")

    def follow(sparse, values, state, reservoir, steps):
        for step in steps:
            values = jax.tree.map(
                lambda x, n=step: x * jnp.cos(0.1 * n * jnp.arange(x.size)), values
            )
            values, state, reservoir = sparse.refresh(step, values, at_step(state, step), reservoir)
        return values, state, sparse.settled(reservoir)

    sparse = AlwaysSparse(tx, params, delay=5)
    at_12 = follow(sparse, *sparse.start(params), range(1, 13))
    saved = jax.tree.map(np.array, at_12)
    restored = lambda: jax.tree.map(np.copy, saved)  # noqa: E731
    follow(sparse, *at_12, range(13, 23))  # the choice of step 20 is under way
    back = follow(sparse, *restored(), range(13, 41))
    anew = follow(AlwaysSparse(tx, params, delay=5), *restored(), range(13, 41))
    jax.tree.map(np.testing.assert_array_equal, back, anew)
    follow(sparse, *sparse.start(params), range(1, 12))
    assert sparse.settled(saved[2]) is saved[2]


def test_a_partition_around_the_transform_takes_labels_for_every_leaf():
    params, batches = parameters(), data(6)
    tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, refresh_every=2, rules=ONE, inner_state="reset")

    def end(wrap):
        sparse = AlwaysSparse(tx, params)
        *_, (values, _, reservoir) = compact(sparse, wrap(sparse.transform), params, batches)
        return values, reservoir

    labels = jax.tree.map(lambda _: "dense", params)
    labels["first"]["kernel"] = "sparse"
    parted = end(lambda t: optax.partition({"sparse": t, "dense": optax.sgd(0.1)}, labels))
    jax.tree.map(np.testing.assert_array_equal, parted, end(lambda t: t))


def test_a_partition_around_an_optimizer_with_moments_goes_there_and_back():
    params, labels = {"w": grid(16, 16), "bias": jnp.ones(16)}, {"w": "sparse", "bias": "dense"}
    tx = tk.top_kast(optax.adam(0.1), 0.2, 0.4)
    sparse = AlwaysSparse(tx, params)
    masked, compact = (
        optax.partition({"sparse": t, "dense": optax.sgd(0.1)}, labels)
        for t in (tx, sparse.transform)
    )
    values, held, reservoir = sparse.start(params, compact)
    dense, state = sparse.to_masked(values, held, reservoir)
    wanted = masked.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, (dense, state), (params, wanted))
    jax.tree.map(np.testing.assert_array_equal, sparse.from_masked(dense, state)[1], held)


@pytest.mark.parametrize("delay", [0, 2])
def test_an_abstract_reservoir_has_room_for_each_array(delay):
    tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, refresh_every=4, rules=ALL)
    sparse = AlwaysSparse(tx, parameters(), delay=delay)
    arrays = jax.tree.leaves(sparse.abstract_reservoir())
    pairs = ((a, b) for i, a in enumerate(arrays) for b in arrays[:i])
    assert not any(np.may_share_memory(a, b) for a, b in pairs)
    like = jax.tree.map(np.shape, sparse.start(parameters())[2])
    assert jax.tree.map(np.shape, sparse.abstract_reservoir()) == like


@pytest.mark.parametrize("array", [np.array, jnp.array], ids=["numpy", "jax"])
def test_an_array_that_stands_for_two_leaves_is_taken_over_once(array):
    both = array(grid(16, 16))
    params = {"w": both, "v": both, "dense": array(grid(2, 2))}
    tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, rules=[("dense", tk.Dense()), (".*", tk.Sparse())])
    _, _, reservoir = AlwaysSparse(tx, params).start(params, donate=True)
    assert not np.may_share_memory(reservoir.theta["w"], reservoir.theta["v"])
    np.testing.assert_array_equal(reservoir.theta["w"], reservoir.theta["v"])


def test_a_thread_draws_the_random_numbers_of_its_caller():
    draw = lambda: jax.random.uniform(jax.random.key(0), (5,))  # noqa: E731
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        expected = draw()
        (found,) = hosts.in_threads([draw])
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(draw(), expected)


def test_sets_at_random_follow_the_generator_that_is_set():
    """Also after those of another generator were drawn."""
    params = {"w": jnp.zeros((16, 16))}

    def drawn():
        tx = tk.static_random(optax.sgd(0.1), 0.25, seed=0, rules=[(".*", tk.Sparse())])
        sparse = AlwaysSparse(tx, params)
        *_, reservoir = sparse.start(params)
        return np.asarray(sparse.masks(reservoir)[1].sets["w"])

    first = drawn()
    with jax.default_prng_impl("rbg"):
        other = drawn()
    np.testing.assert_array_equal(drawn(), first)
    assert not np.array_equal(other, first)
