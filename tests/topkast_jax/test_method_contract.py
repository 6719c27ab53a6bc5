"""The method contract carries what the literature needs: each by a short method and by NumPy."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import topkast_jax as tk
from docs.examples.set_method import SET, set_method
from docs.examples.zero_start import zero_start
from topkast_jax import testing
from topkast_jax.always_sparse import AlwaysSparse

SHAPES = {"a": (12, 10), "b": (8, 6)}


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()
    }


def gradients(steps, seed=1):
    rng = np.random.default_rng(seed)
    return [
        {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
        for _ in range(steps)
    ]


def run(tx, params, grads):
    """(θ, forward set, θ of the step) after the first choice and after each step, NumPy by leaf."""
    state = tx.init(params)
    update = jax.jit(tx.update)
    look = jax.jit(lambda p, s: (tk.keep_masks(p, s), tk.forward_params(p, s)))
    records = []
    for g in [*grads, None]:
        (forward, backward), view = jax.device_get(look(params, state))
        records.append((jax.device_get(params), forward, backward, view))
        if g is not None:
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
    return records


def kept(entries, density):
    return oracle.keep_count(entries, density)


def largest(scores, count, among):
    """Mask of the `count` largest scores among some, ties to the lower index."""
    ranked = np.where(among.ravel(), np.abs(scores.ravel()), -1.0)
    mask = np.zeros(ranked.size, bool)
    mask[np.lexsort((np.arange(ranked.size), -ranked))[:count]] = True
    return mask.reshape(scores.shape)


def test_set_drops_the_smallest_and_grows_zeros_at_random():
    tx = set_method(optax.sgd(0.1, momentum=0.9), 0.3, refresh_every=2, drop_fraction=0.4)
    records = run(tx, start(), gradients(6))
    moved = 0
    for t in range(1, len(records)):
        theta, now, backward, view = records[t]
        before = records[t - 1][1]
        for name, x in theta.items():
            count = kept(x.size, 0.3)
            assert now[name].sum() == count
            np.testing.assert_array_equal(now[name], backward[name])
            if t % 2:
                np.testing.assert_array_equal(now[name], before[name])
                continue
            stays = largest(x, count - int(np.floor(np.float32(0.4) * count)), before[name])
            assert np.all(now[name][stays])
            fresh = now[name] & ~before[name]
            assert np.all(view[name][fresh] == 0)
            np.testing.assert_array_equal(view[name][stays], x[stays])
            moved += fresh.sum()
    assert moved > 10
    # After the step the grown entries have moved away from zero, not from the reservoir's value.
    theta, now = records[3][0], records[2][1]
    fresh = now["a"] & ~records[1][1]["a"]
    assert np.all(np.abs(theta["a"][fresh]) < 0.5)
    assert np.any(np.abs(records[1][0]["a"][fresh]) > 0.5)


def test_set_always_sparse_follows_the_masked_path():
    from topkast_jax.always_sparse import values_of

    tx = set_method(optax.sgd(0.1, momentum=0.9), 0.3, refresh_every=2)
    params, grads = start(), gradients(6)
    records = run(tx, params, grads)
    sparse = AlwaysSparse(tx, params)
    values, state, reservoir = sparse.start(params)
    for t, g in enumerate(grads, start=1):

        def at_units(kernel, g):
            return jnp.asarray(g).ravel()[kernel.index]

        kernels = tk.forward_params(values, state)
        compact = {name: at_units(kernels[name], g[name]) for name in SHAPES}
        updates, state = sparse.transform.update(compact, state, values_of(kernels))
        values = optax.apply_updates(values, updates)
        values, state, reservoir = sparse.refresh(t, values, state, reservoir)
        forward, _ = tk.keep_masks(*sparse.masks(reservoir))
        view = tk.forward_params(values, state)
        for name in SHAPES:
            np.testing.assert_array_equal(forward[name], records[t][1][name], err_msg=f"{name} {t}")
            dense = np.zeros(SHAPES[name], np.float32).ravel()
            dense[view[name].index] = view[name].values
            np.testing.assert_allclose(dense.reshape(SHAPES[name]), records[t][3][name], atol=1e-5)


class RigL(SET):
    """Grows where the dense gradient is largest (Evci et al., 2020)."""

    needs_gradient = True

    def choose(self, layer, leaf, counts):
        if layer.sets is None:
            return super().choose(layer, leaf, counts)
        dropped = jnp.floor(self.drop_fraction * counts.forward).astype(jnp.int32)
        magnitudes = leaf.pattern.magnitudes(layer.theta)
        (stays,), _ = leaf.pattern.top(
            magnitudes, [counts.forward - dropped], among=layer.sets.forward
        )
        (grown,), _ = leaf.pattern.top(leaf.pattern.magnitudes(layer.grad), [dropped], among=~stays)
        return tk.Sets(stays | grown, stays | grown), ()


def test_zero_growth_by_the_dense_gradient():
    tx = tk.sparsify(optax.sgd(0.1), RigL(0.3), forward_density=0.25, refresh_every=3)
    grads = gradients(9)
    records = run(tx, start(), grads)
    for t in range(3, len(records), 3):
        theta, now, _, view = records[t]
        for name, x in theta.items():
            before, count = records[t - 1][1][name], kept(x.size, 0.25)
            dropped = int(np.floor(np.float32(0.3) * count))
            stays = largest(x, count - dropped, before)
            grown = largest(np.asarray(grads[t - 1][name]), dropped, ~stays)
            np.testing.assert_array_equal(now[name], stays | grown)
            assert np.all(view[name][grown & ~before] == 0)


class Pruning(tk.Method):
    """Counts that fall from all to the target between two steps; what is pruned may come back."""

    def __init__(self, begin, end):
        self.begin, self.end = begin, end

    def allocate(self, layers, leaves, step):
        share = jnp.clip((step - self.begin) / (self.end - self.begin), 0.0, 1.0)
        found = {}
        for path, leaf in leaves.items():
            units = int(np.prod(leaf.grid))
            falling = (units - leaf.counts.forward) * (1 - share) ** 3
            count = leaf.counts.forward + jnp.round(falling).astype(jnp.int32)
            found[path] = tk.Counts(count, units)
        return found

    def choose(self, layer, leaf, counts):
        (forward,), _ = leaf.pattern.top(leaf.pattern.magnitudes(layer.theta), [counts.forward])
        return tk.Sets(forward, jnp.ones_like(forward)), ()


def test_counts_that_follow_a_schedule():
    tx = tk.sparsify(optax.sgd(0.1), Pruning(2, 8), forward_density=0.1, refresh_every=2)
    records = run(tx, start(), gradients(10))
    for t in range(0, len(records), 2):
        share = np.clip((t - 2) / 6, 0, 1)
        for name, x in records[t][0].items():
            target = kept(x.size, 0.1)
            count = target + round((x.size - target) * (1 - share) ** 3)
            np.testing.assert_array_equal(records[t][1][name], oracle.top(x, count))
            assert records[t][2][name].all()


class SNFS(RigL):
    """Momentum of the dense gradient, observed in every step, decides where units go."""

    observes_gradient = True
    needs_gradient = False

    def allocate(self, layers, leaves, step):
        own = {path: leaf.counts.forward for path, leaf in leaves.items()}
        if any(layer.memory is None for layer in layers.values()):
            return {path: tk.Counts(count, count) for path, count in own.items()}
        counts = tk.counts_of_global_top_k(
            {path: layer.memory for path, layer in layers.items()}, sum(own.values())
        )
        return {path: tk.Counts(count, count) for path, count in counts.items()}

    def choose(self, layer, leaf, counts):
        scores = layer.theta if layer.sets is None else layer.memory
        (now,), _ = leaf.pattern.top(leaf.pattern.magnitudes(scores), [counts.forward])
        memory = jnp.zeros_like(layer.theta) if layer.memory is None else layer.memory
        return tk.Sets(now, now), memory

    def observe(self, grad, theta, memory, leaf):
        return 0.9 * memory + grad


def test_counts_that_move_between_leaves_with_a_memory_of_every_step():
    tx = tk.sparsify(optax.sgd(0.1), SNFS(), forward_density=0.2, refresh_every=3)
    grads = gradients(6)
    for g in grads:
        g["b"] = 3 * g["b"]
    records = run(tx, start(), grads)
    total = sum(kept(np.prod(shape), 0.2) for shape in SHAPES.values())
    for t in (3, 6):
        momentum = dict.fromkeys(SHAPES, np.float32(0))
        for g in grads[:t]:
            momentum = {n: np.float32(0.9) * momentum[n] + np.asarray(g[n]) for n in SHAPES}
        flat = np.concatenate([np.abs(m).ravel() for m in momentum.values()])
        threshold = np.sort(flat)[-total]
        for name, m in momentum.items():
            np.testing.assert_array_equal(records[t][1][name], np.abs(m) >= threshold)
        assert records[t][1]["b"].sum() > kept(48, 0.2)
        assert sum(mask.sum() for mask in records[t][1].values()) == total


class SNIP(tk.Method):
    """One choice, from the first gradient, by one ranking over all leaves (Lee et al., 2019)."""

    first_choice = "first_update"

    def allocate(self, layers, leaves, step):
        total = sum(leaf.counts.forward for leaf in leaves.values())
        scores = {path: layer.theta * layer.grad for path, layer in layers.items()}
        counts = tk.counts_of_global_top_k(scores, total)
        return {path: tk.Counts(count, count) for path, count in counts.items()}

    def choose(self, layer, leaf, counts):
        scores = leaf.pattern.magnitudes(layer.theta * layer.grad)
        (kept,), _ = leaf.pattern.top(scores, [counts.forward])
        return tk.Sets(kept, kept), ()


def test_the_first_sets_from_the_first_gradient_by_one_ranking():
    tx = tk.sparsify(optax.sgd(0.1, momentum=0.9), SNIP(), forward_density=0.2, refresh_every=None)
    params, grads = start(), gradients(4)
    records = run(tx, params, grads)
    assert all(mask.all() for mask in records[0][1].values())
    scores = {n: np.abs(np.asarray(params[n] * grads[0][n])) for n in SHAPES}
    total = sum(kept(np.prod(shape), 0.2) for shape in SHAPES.values())
    threshold = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[-total]
    for theta, forward, _, view in records[1:]:
        for name in SHAPES:
            mask = scores[name] >= threshold
            np.testing.assert_array_equal(forward[name], mask)
            # The first update is already restricted, and the rest keeps its initial value.
            np.testing.assert_array_equal(theta[name][~mask], np.asarray(params[name])[~mask])
            assert np.all(view[name][~mask] == 0)


class RandomExtra(tk.Method):
    """A by magnitude, the rest of B at random (the paper's table 1)."""

    def choose(self, layer, leaf, counts):
        scores = leaf.pattern.magnitudes(layer.theta)
        (forward,), _ = leaf.pattern.top(scores, [counts.forward])
        chance = jax.random.uniform(layer.key, leaf.grid)
        (extra,), _ = leaf.pattern.top(chance, [counts.backward - counts.forward], among=~forward)
        return tk.Sets(forward, forward | extra), ()


@pytest.mark.slow  # test_methods_oracle.py has it as an option of top_kast
def test_a_backward_set_at_random():
    tx = tk.sparsify(
        optax.sgd(0.1), RandomExtra(), forward_density=0.1, backward_density=0.4, refresh_every=1
    )
    records = run(tx, start(), gradients(5))
    extras = []
    for theta, forward, backward, _ in records:
        for name, x in theta.items():
            np.testing.assert_array_equal(forward[name], oracle.select(x, 0.1))
            assert backward[name].sum() == kept(x.size, 0.4)
        extras.append(backward["a"] & ~forward["a"])
    overlap = np.mean([np.mean(a[b]) for a, b in itertools.pairwise(extras)])
    assert 0.1 < overlap < 0.6


@dataclasses.dataclass(frozen=True)
class Broken(tk.Method):
    """Wrong in the way that `fault` names."""

    fault: str = ""

    def choose(self, layer, leaf, counts):
        count = counts.forward + (1 if self.fault == "count" else 0)
        (kept,), _ = leaf.pattern.top(leaf.pattern.magnitudes(layer.theta), [count])
        if self.fault == "outside":
            return tk.Sets(kept, jnp.roll(kept, 1)), ()
        if self.fault == "shape":
            return tk.Sets(kept.ravel(), kept.ravel()), ()
        return tk.Sets(kept, kept), ()


@pytest.mark.parametrize(
    ("fault", "message"),
    [("count", "inner_optimizers: around momentum: in/kernel, step 0: A has 39"),
     ("outside", "in/kernel, step 0: B has 72 of")],
)  # fmt: skip
def test_the_suite_finds_what_is_broken(fault, message):
    def factory(inner):
        return tk.sparsify(inner, Broken(fault), forward_density=0.1, refresh_every=1)

    with pytest.raises(AssertionError, match=message):
        testing.check_method(factory, checks=["inner_optimizers"])


def test_a_set_of_another_shape_is_named():
    tx = tk.sparsify(optax.sgd(0.1), Broken("shape"), forward_density=0.1)
    with pytest.raises(tk.SparsityError, match=r"Broken.choose returned a set .* shape \(12, 10\)"):
        tx.init({"a": start()["a"]})


@dataclasses.dataclass(frozen=True)
class Returns(tk.Method):
    """A method whose `choose` returns what a function makes of two nested sets."""

    made: object
    explores = True

    def choose(self, layer, leaf, counts):
        masks, _ = leaf.pattern.top(layer.theta, tuple(counts))
        return self.made(tk.Sets(*masks), layer.memory)


WRONG_RETURNS = {
    r"returned Sets\(.*must return \(Sets, memory\)": lambda sets, memory: sets,
    r"returned None; must return \(Sets, memory\)": lambda sets, memory: None,
    r"shape \(12,\); must be bool by unit, shape \(12, 10\)": lambda sets, memory: (
        tk.Sets(sets.forward[:, 0], sets.backward), ()
    ),
    r"a memory of float32\[3\]; must be like that of the first choice, float32\[\]": lambda s, m: (
        s, jnp.zeros(() if m is None else 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_RETURNS)
def test_what_choose_returns_is_checked(message):
    method = Returns(WRONG_RETURNS[message])
    tx = tk.sparsify(optax.sgd(0.1), method, forward_density=0.1, backward_density=0.2)
    with pytest.raises(tk.SparsityError, match=message):
        tk.forward_params(start(), tx.init(start()))


def test_the_forward_set_lies_in_the_backward_set_whatever_a_method_returns():
    method = Returns(lambda sets, memory: (sets[::-1], ()))
    tx = tk.sparsify(optax.sgd(0.1), method, forward_density=0.1, backward_density=0.2)
    forward, backward = tk.keep_masks(start(), tx.init(start()))
    for name in SHAPES:
        assert not np.any(forward[name] & ~backward[name])


@dataclasses.dataclass(frozen=True, slots=True)
class Slots(tk.Method):
    """A method that keeps its number and its function in slots."""

    share: float
    made: object = None

    def choose(self, layer, leaf, counts):
        mask = jnp.zeros(leaf.grid, bool).at[: int(leaf.grid[0] * 0.5)].set(self.share > 0.2)
        return tk.Sets(mask, mask), ()


def test_a_method_may_have_slots():
    tx = tk.sparsify(optax.sgd(0.1), Slots(0.5), forward_density=0.5)
    forward, _ = tk.keep_masks(start(), tx.init(start()))
    assert forward["a"].sum() == 60


class Rows:
    """A pattern with the six members that a pattern needs, in a class that does not compare."""

    unit_shape = (10,)

    def __init__(self, fixed):
        self.fixed = fixed

    def grid(self, shape):
        return shape[:-1]

    def magnitudes(self, x):
        return jnp.abs(x).sum(-1)

    def expand(self, units, shape):
        return jnp.broadcast_to(units[..., None], shape)

    def count(self, shape, density):
        return shape[0] // 2 if self.fixed else tk.keep_count(shape[0], density)

    def top(self, scores, counts, *, among=None, start=None):
        return tk.top_k_masks(scores, counts, start, among=among)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_pattern_of_six_members_in_a_compiled_loop(fixed):
    """It compiles once, and its states have one structure, also where densities are arrays."""

    def make(inner, exploration_weight):
        return tk.top_kast(
            inner, jnp.float32(0.5), jnp.float32(0.5), exploration_weight=exploration_weight,
            refresh_every=2, rules=[("a", tk.Sparse()), ("b", tk.Dense())], pattern=Rows(fixed),
        )  # fmt: skip

    tx = optax.inject_hyperparams(make, static_args=("inner",))(optax.sgd(0.1), 1e-4)
    step = jax.jit(tx.update)
    params, state, (grads,) = start(), tx.init(start()), gradients(1)
    for _ in range(5):
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert step._cache_size() == 1
    forward, _ = tk.keep_masks(params, state)
    assert sorted(forward["a"].sum(1).tolist()) == [0] * 6 + [10] * 6


def test_patterns_that_differ_are_not_equal():
    one, same, other = (
        tk.top_kast(optax.sgd(0.1), 0.5, 0.5, pattern=Rows(fixed)).plan.leaves({"a": start()["a"]})
        for fixed in (False, False, True)
    )
    assert one["a"].pattern == same["a"].pattern
    assert one["a"].pattern != other["a"].pattern


@pytest.mark.parametrize("order", ["vmap of shard_map", "shard_map of vmap"])
def test_each_member_of_an_ensemble_over_devices_draws_by_its_own_seed(order):
    """Sets at random, chosen again in a later step, are those of members on one device."""
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("member",), types, devices=jax.devices()[:2])
    whole = jax.P("member")
    over_devices = functools.partial(jax.shard_map, mesh=mesh, in_specs=whole, out_specs=whole)
    params = {"w": jnp.ones((8, 8))}

    def transform(seed):
        return tk.methods.set_evolution(
            optax.sgd(0.1), 0.25, refresh_every=1, rules=[(".*", tk.Sparse())], seed=seed
        )

    def start(seed):
        own = jax.tree.map(lambda x: x + 0 * seed, params)
        return own, transform(seed).init(own)

    def step(run):
        params, state = run
        grads = tk.forward_params(params, state)
        updates, state = transform(0).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def one(function):
        def of_one(x):
            return jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda y: y[0], x)))

        return of_one

    def spread(function):
        if order == "vmap of shard_map":
            return jax.jit(jax.vmap(over_devices(one(function))))
        return jax.jit(over_devices(jax.vmap(function)))

    def sets(around, seeds):
        run = around(start)(seeds)
        for _ in range(2):
            run = around(step)(run)
        return around(lambda run: tk.keep_masks(*run)[0])(run)

    seeds = jnp.arange(4)
    shape = (2, 2) if order == "vmap of shard_map" else (4,)
    found = sets(spread, seeds.reshape(shape))
    alone = sets(lambda function: jax.jit(jax.vmap(function)), seeds)
    np.testing.assert_array_equal(found["w"].reshape(alone["w"].shape), alone["w"])
    assert len({mask.tobytes() for mask in np.asarray(alone["w"])}) == len(seeds)


def test_what_enters_starts_at_zero():
    """The gradient moves the second entry behind the third, which enters B at the next refresh."""
    params = {"w": jnp.array([[4.0, 3.0], [2.0, 1.0]])}
    tx = zero_start(optax.sgd(1.0), 0.25, 0.5, refresh_every=1, exploration_weight=0.0)
    state = tx.init(params)
    for gradient, expected in ((2.5, [[4.0, 0.5], [2.0, 1.0]]), (0.0, [[4.0, 0.5], [0.0, 1.0]])):
        grads = {"w": jnp.array([[0.0, gradient], [0.0, 0.0]])}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["w"], expected)
