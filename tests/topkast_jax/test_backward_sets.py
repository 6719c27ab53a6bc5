"""Nothing outside B moves, whatever a method, a rule or a pattern makes of B."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk
from topkast_jax import Method, Sets, SparsityError, methods
from topkast_jax.methods.snfs import share_out
from topkast_jax.patterns import FanIn
from topkast_jax.statistics import LeafCounts, flops, planned_counts

FORWARD_ONLY = {
    "static": lambda **k: methods.static_random(optax.sgd(0.1), 1.0, 0, **k),
    "set": lambda **k: methods.set_evolution(optax.sgd(0.1), 1.0, **k),
    "rigl": lambda **k: methods.rigl(optax.sgd(0.1), 1.0, **k),
    "snfs": lambda **k: methods.snfs(optax.sgd(0.1), 1.0, **k),
    "pruning": lambda **k: methods.pruning(optax.sgd(0.1), 1.0, 0, 1, **k),
}
RULES = [("a", tk.Sparse(forward_density=0.1)), ("b", tk.Sparse())]


def params(rows=20, columns=10):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=(rows, columns)), jnp.float32) for name in "ab"}


@dataclasses.dataclass(frozen=True)
class FirstRows(Method):
    """A method of a user's own, which makes B no larger than A."""

    def choose(self, layer, leaf, counts):
        mask = jnp.zeros(leaf.grid, bool).at[: leaf.grid[0] // 4].set(True)
        return Sets(mask, mask), ()


@pytest.mark.parametrize("name", [*FORWARD_ONLY, "own"])
def test_entries_outside_the_backward_set_never_move(name):
    if name == "own":
        tx = tk.sparsify(
            optax.sgd(0.1), FirstRows(), forward_density=0.25, backward_density=1.0, rules=RULES[1:]
        )
        theta = {"b": params()["b"]}
    else:
        tx, theta = FORWARD_ONLY[name](rules=RULES), params()
    state = tx.init(theta)
    grads = jax.tree.map(jnp.ones_like, theta)
    for _ in range(2):
        _, backward = tk.keep_masks(theta, state)
        updates, state = tx.update(grads, state, theta)
        moved = jax.tree.map(lambda u: u != 0, updates)
        assert all(not jnp.any(moved[k] & ~backward[k]) for k in theta)
        assert all(jnp.any(moved[k]) for k in theta)
        theta = optax.apply_updates(theta, updates)


@pytest.mark.parametrize("name", ["static", "set", "rigl"])
def test_what_is_planned_is_what_the_sets_hold(name):
    tx = FORWARD_ONLY[name](rules=RULES)
    counts, _ = planned_counts(tx.plan, params(), 10)
    assert counts["a"] == LeafCounts(200, 20, 20, True)
    assert counts["b"] == LeafCounts(200, 200, 200, True)


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_a_backward_density_that_would_be_ignored_is_refused(name):
    rules = [("a", tk.Sparse(forward_density=0.1, backward_density=0.2)), ("b", tk.Dense())]
    with pytest.raises(SparsityError, match=r"rule 'a': backward_density=0.2: the backward set of"):
        FORWARD_ONLY[name](rules=rules)
    same = [("a", tk.Sparse(forward_density=0.1, backward_density=0.1)), ("b", tk.Dense())]
    FORWARD_ONLY[name](rules=same).init(params())


@pytest.mark.parametrize(("pattern", "density"), [(tk.NOfM(2, 4), 0.5), (FanIn(), 0.1)])
@pytest.mark.parametrize("method", [methods.set_evolution, methods.rigl])
def test_groups_of_few_units_change_their_sets(method, pattern, density):
    """⌊0.3 · 2⌋ is 0: a set that drops nothing would be a fixed random mask."""
    theta = {"w": params(32, 16)["a"]}
    tx = method(optax.sgd(0.1), density, 1, last_choice_at=4, pattern=pattern)
    state, sets = tx.init(theta), []
    for step in range(7):
        grads = {"w": jnp.asarray(np.random.default_rng(step).normal(size=(32, 16)), jnp.float32)}
        updates, state = jax.jit(tx.update)(grads, state, theta)
        theta = optax.apply_updates(theta, updates)
        sets.append(np.asarray(tk.keep_masks(theta, state)[0]["w"]))
    kept = sets[0].reshape(8, 4, 16).sum(1) if density == 0.5 else sets[0].sum(0)
    assert len({*kept.ravel().tolist()}) == 1
    assert all((one != other).any() for one, other in itertools.pairwise(sets[:3]))
    assert all((one == sets[-1]).all() for one in sets[4:])
    assert all(each.sum() == sets[0].sum() for each in sets)


class Rows:
    """A pattern with no more than the contract names: whole rows."""

    unit_shape = (1, 10)

    def grid(self, shape):
        return shape[:1]

    def magnitudes(self, x):
        return jnp.sum(jnp.abs(x), axis=1)

    def expand(self, units, shape):
        return jnp.broadcast_to(units[:, None], shape)

    def count(self, shape, density):
        return max(1, math.floor(density * shape[0] + 0.5))

    def top(self, scores, counts, *, among=None, start=None):
        return tk.top_k_masks(scores, counts, among=among)[0], ()


@pytest.mark.parametrize("method", ["top_kast", "set_evolution", "pruning"])
def test_a_pattern_of_ones_own(method):
    make = {
        "top_kast": lambda **k: tk.top_kast(optax.sgd(0.1), 0.1, 0.2, **k),
        "set_evolution": lambda **k: methods.set_evolution(optax.sgd(0.1), 0.1, **k),
        "pruning": lambda **k: methods.pruning(optax.sgd(0.1), 0.1, 0, 1, **k),
    }
    theta = params()
    tx = make[method](pattern=Rows(), refresh_every=1)
    state = tx.init(theta)
    for _ in range(3):
        updates, state = tx.update(theta, state, theta)
        theta = optax.apply_updates(theta, updates)
    forward, _ = tk.keep_masks(theta, state)
    rows = np.asarray(forward["a"])
    assert (rows.all(1) == rows.any(1)).all()
    assert rows.any(1).sum() == 2
    if method == "top_kast":
        best = np.argsort(-np.abs(np.asarray(theta["a"])).sum(1))[:2]
        assert sorted(np.flatnonzero(rows.any(1))) == sorted(best)


def test_a_pattern_that_lacks_something_is_told_what():
    Incomplete = type("Incomplete", (), {"grid": Rows.grid, "top": Rows.top})
    with pytest.raises(SparsityError, match="has no unit_shape, magnitudes, expand, count"):
        tk.top_kast(optax.sgd(0.1), 0.1, 0.2, pattern=Incomplete())


def test_units_are_shared_out_without_any_weight():
    """Momentum may be zero everywhere: the budget is kept all the same."""
    room = jnp.array([100, 3, 40], jnp.int32)
    shares = share_out(jnp.int32(90), jnp.zeros(3), room)
    assert int(shares.sum()) == 90
    assert (np.asarray(shares) <= np.asarray(room)).all()
    assert int(shares[1]) == 3


def test_a_group_in_which_nothing_is_sparse_can_be_donated():
    tx = optax.partition(
        {"s": tk.top_kast(optax.adam(0.1), 0.1, 0.2), "o": optax.adam(0.1)}, {"a": "o", "b": "o"}
    )
    theta = params()
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1)
    updates, _ = step(theta, tx.init(theta), theta)
    adam = optax.adam(0.1)
    expected, _ = adam.update(theta, adam.init(theta), theta)
    np.testing.assert_allclose(updates["a"], expected["a"], rtol=1e-6)


def test_snip_ranks_small_products_in_half_precision():
    """θ · g is about 4e-8 here, which float16 has no digits for."""
    rng = np.random.default_rng(1)
    theta = {"w": jnp.asarray(rng.normal(0, 0.02, (64, 64)), jnp.float16)}
    grads = {"w": jnp.asarray(rng.normal(0, 2e-6, (64, 64)), jnp.float16)}
    tx = methods.snip(optax.sgd(0.1), 0.1)
    _, state = tx.update(grads, tx.init(theta), theta)
    forward, _ = tk.keep_masks(theta, state)
    product = np.abs(np.float64(theta["w"]) * np.float64(grads["w"])).ravel()
    best = np.zeros(64 * 64, bool)
    best[np.argsort(-product, kind="stable")[:410]] = True
    assert (np.asarray(forward["w"]).ravel() & best).sum() >= 409


def test_pruning_by_groups_follows_its_plan():
    theta = {"w": params(32, 16)["a"]}
    tx = methods.pruning(optax.sgd(0.0), 0.25, 0, 10, refresh_every=1, pattern=tk.NOfM(1, 4))
    state = tx.init(theta)
    for step in range(1, 12):
        planned, _ = planned_counts(tx.plan, theta, step)
        _, state = tx.update(jax.tree.map(jnp.zeros_like, theta), state, theta)
        forward, _ = tk.keep_masks(theta, state)
        if step < 11:
            continue_from, _ = planned_counts(tx.plan, theta, step + 1)
            assert int(forward["w"].sum()) == continue_from["w"].forward
    assert planned["w"].forward == 128


def test_flops_of_a_leaf_without_entries():
    counts = {"w": LeafCounts(16, 4, 8, True), "e": LeafCounts(0, 0, 0, False)}
    assert flops({"w": 32.0, "e": 0.0}, counts).inference_fraction == 0.25


def test_arrays_of_bools_stay_bools_in_a_method():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Masked(Method):
        mask: np.ndarray

        def choose(self, layer, leaf, counts):
            return Sets(~self.mask, ~self.mask), ()

    mask = np.arange(200).reshape(20, 10) % 4 != 0
    tx = tk.sparsify(optax.sgd(0.1), Masked(mask), forward_density=0.25)
    theta = {"b": params()["b"]}
    forward, _ = tk.keep_masks(theta, tx.init(theta))
    np.testing.assert_array_equal(np.asarray(forward["b"]), ~mask)


STOPS = {
    "resumed": lambda sgd: (
        tk.top_kast(sgd, 0.1, 0.2, refresh_every=2),
        tk.top_kast(sgd, 0.1, 0.2, refresh_every=2, stop_exploring_at=3),
        lambda state: state,
    ),
    "injected": lambda sgd: (
        tx := optax.inject_hyperparams(tk.top_kast)(sgd, 0.1, 0.2, stop_exploring_at=1000),
        tx,
        lambda state: state._replace(
            hyperparams=state.hyperparams | {"stop_exploring_at": jnp.int32(3)}
        ),
    ),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_that_has_passed_already_ends_exploration(stop):
    before, after, changed = STOPS[stop](optax.sgd(0.1, momentum=0.9))
    theta, grads = params(), jax.tree.map(jnp.ones_like, params())
    state = before.init(theta)
    for i in range(6):
        tx, state = (before, state) if i < 5 else (after, changed(state))
        updates, state = tx.update(grads, state, theta)
        theta = optax.apply_updates(theta, updates)
    forward, backward = tk.keep_masks(theta, state)
    for name in "ab":
        np.testing.assert_array_equal(forward[name], backward[name])
        assert forward[name].sum() == 20
