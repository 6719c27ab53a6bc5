"""Each method against plain NumPy over a recorded sequence of parameters and gradients."""

import jax
import jax.numpy as jnp
import methods_oracle as o
import numpy as np
import optax
import oracle
import pytest

import topkast_jax as tk
from topkast_jax.methods import dnw, pruning, rigl, set_evolution, snfs, snip, srigl
from topkast_jax.methods.snfs import share_out

SHAPES = {"a": (12, 10), "b": (6, 8), "c": (3, 2, 4, 5)}
STEPS = 12


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}


def recorded_gradients(seed=1, scale=None):
    rng = np.random.default_rng(seed)
    scale = scale or dict.fromkeys(SHAPES, 1.0)
    return [
        {n: jnp.asarray(scale[n] * rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}
        for _ in range(STEPS)
    ]


def follow(tx, gradients, params=None):
    """Per step: parameters, sets and forward view as NumPy, before it; one more after the last."""
    params = start() if params is None else params
    state = tx.init(params)
    update = jax.jit(tx.update)
    look = jax.jit(lambda p, s: (p, *tk.keep_masks(p, s), tk.forward_params(p, s)))
    records = [jax.device_get(look(params, state))]
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        records.append(jax.device_get(look(params, state)))
    return records


def check_drop_and_grow(records, gradients, density, every, fraction, end, scores, top=o.largest):
    moved = 0
    for t, (theta, forward, backward, view) in enumerate(records):
        for name, x in theta.items():
            np.testing.assert_array_equal(forward[name], backward[name])
            if t == 0:
                count = density(name, x)
                assert forward[name].sum() == count
                continue
            held = records[t - 1][1][name]
            if t % every:
                np.testing.assert_array_equal(forward[name], held)
                continue
            share = o.cosine(fraction, t, end)
            expected, fresh = o.drop_and_grow(x, held, scores(t, name), share, top=top)
            np.testing.assert_array_equal(forward[name], expected, err_msg=f"{name} {t}")
            np.testing.assert_array_equal(view[name], np.where(fresh, 0, np.where(expected, x, 0)))
            moved += fresh.sum()
    assert moved > 5


@pytest.mark.parametrize(("every", "end"), [(1, None), (3, 8)])
def test_rigl(every, end):
    gradients = recorded_gradients()
    tx = rigl(optax.sgd(0.1, momentum=0.9), 0.25, every, 0.3, last_choice_at=end, seed=3)
    records = follow(tx, gradients)
    check_drop_and_grow(
        records, gradients, lambda n, x: o.kept(x.size, 0.25), every, 0.3, end,
        lambda t, n: np.asarray(gradients[t - 1][n]),
    )  # fmt: skip


def test_rigl_as_published_skips_the_step_whose_gradient_it_reads():
    gradients = recorded_gradients()
    tx = rigl(optax.sgd(0.1, momentum=0.9), 0.25, 3, skips_update=True)
    records = follow(tx, gradients)
    for t in range(3, STEPS, 3):
        for name in SHAPES:
            np.testing.assert_array_equal(records[t][0][name], records[t - 1][0][name])
            assert np.any(records[t][0][name] != records[t - 2][0][name])
    check_drop_and_grow(
        records, gradients, lambda n, x: o.kept(x.size, 0.25), 3, 0.3, None,
        lambda t, n: np.asarray(gradients[t - 1][n]),
    )  # fmt: skip


def test_a_skipped_step_moves_no_inner_state():
    tx, params = rigl(optax.adam(0.1), 0.25, 2, skips_update=True), {"a": start()["a"]}
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for g in recorded_gradients()[:2]:
        updates, state = update({"a": g["a"]}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(state.inner_state)
    jax.tree.map(np.testing.assert_array_equal, *seen)
    assert np.any(seen[0][0].mu["a"])


@pytest.mark.parametrize("make", [set_evolution, snfs])
def test_what_grows_again_starts_with_new_moments(make):
    tx, params = make(optax.sgd(0.1, 0.9), 0.3, 1, 0.5), {"a": start()["a"]}
    state, update = tx.init(params), jax.jit(tx.update)
    was = np.zeros((10, *SHAPES["a"]), bool)
    again = 0
    for step, g in enumerate(recorded_gradients()[:10]):
        now = was[step] = np.asarray(tk.keep_masks(params, state)[1]["a"])
        updates, state = update({"a": g["a"]}, state, params)
        params = optax.apply_updates(params, updates)
        grown = now & ~was[max(0, step - 1)] & was[:step].any(0)
        trace = np.asarray(state.inner_state[0].trace["a"])
        np.testing.assert_allclose(trace[grown], np.asarray(g["a"])[grown], rtol=1e-6)
        again += grown.sum()
    assert again > 10


def test_srigl_keeps_the_fan_in_of_every_output():
    gradients = recorded_gradients()
    records = follow(srigl(optax.sgd(0.1), 0.25, 2, 0.5), gradients)
    for _, forward, _, _ in records:
        for name, mask in forward.items():
            inputs = int(np.prod(SHAPES[name][:-1]))
            fan_in = mask.reshape(inputs, -1).sum(axis=0)
            np.testing.assert_array_equal(fan_in, o.kept(inputs, 0.25))

    for t in range(2, STEPS, 2):
        theta, forward, _, _ = records[t]
        for name, x in theta.items():
            outputs = x.shape[-1]
            fan_in = o.kept(x.size // outputs, 0.25)
            held = records[t - 1][1][name]
            staying = fan_in - int(np.floor(np.float32(0.5) * fan_in))
            stays = o.fan_in_top(x, staying * outputs, held)
            gradient = np.asarray(gradients[t - 1][name])
            grown = o.fan_in_top(gradient, (fan_in - staying) * outputs, ~stays)
            np.testing.assert_array_equal(forward[name], stays | grown)


def test_set_grows_what_was_not_kept_at_random():
    gradients = recorded_gradients()
    records = follow(set_evolution(optax.sgd(0.1), 0.25, 2, 0.4, seed=5), gradients)
    grown = []
    for t in range(2, STEPS, 2):
        theta, forward, _, view = records[t]
        for name, x in theta.items():
            held = records[t - 1][1][name]
            k = int(held.sum())
            stays = o.largest(x, k - int(np.floor(np.float32(0.4) * k)), held)
            assert np.all(forward[name][stays])
            assert forward[name].sum() == o.kept(x.size, 0.25) == k
            fresh = forward[name] & ~held
            assert np.all(view[name][fresh] == 0)
            if name == "a":
                grown.append(forward[name] & ~stays)
    assert len({mask.tobytes() for mask in grown}) == len(grown)


def test_snfs_moves_units_to_the_layers_with_momentum():
    gradients = recorded_gradients(scale={"a": 1.0, "b": 3.0, "c": 0.3})
    records = follow(snfs(optax.sgd(0.1), 0.25, 3, 0.4, momentum=0.8, seed=2), gradients)
    momentum = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
    total = sum(o.kept(np.prod(s), 0.25) for s in SHAPES.values())
    for t in range(1, STEPS + 1):
        theta, forward, _, view = records[t]
        seen = gradients[t - 1]
        momentum = {
            n: np.float32(0.8) * m + (1 - np.float32(0.8)) * np.asarray(seen[n])
            for n, m in momentum.items()
        }
        held = records[t - 1][1]
        if t % 3:
            continue
        k = {n: int(mask.sum()) for n, mask in held.items()}
        dropped = {n: int(np.floor(np.float32(0.4) * np.float32(c))) for n, c in k.items()}
        strength = [np.abs(momentum[n])[held[n]].mean() for n in SHAPES]
        room = [np.prod(SHAPES[n]) - k[n] + dropped[n] for n in SHAPES]
        grown = dict(zip(SHAPES, o.shares(sum(dropped.values()), strength, room), strict=True))
        for name, x in theta.items():
            count = k[name] - dropped[name] + grown[name]
            expected, fresh = o.drop_and_grow(x, held[name], momentum[name], 0.4, count)
            np.testing.assert_array_equal(forward[name], expected, err_msg=f"{name} {t}")
            assert np.all(view[name][fresh] == 0)
        assert sum(mask.sum() for mask in forward.values()) == total
    assert records[-1][1]["b"].sum() > o.kept(48, 0.25)


@pytest.mark.parametrize("seed", range(8))
def test_shares_are_whole_and_within_their_room(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 7))
    room = rng.integers(0, 40, n)
    weights = rng.uniform(0, 1, n) ** 3 + 1e-3
    total = int(rng.integers(0, room.sum() + 1))
    found = share_out(
        jnp.int32(total), jnp.asarray(weights, jnp.float32), jnp.asarray(room, jnp.int32)
    )
    assert found.sum() == total
    assert np.all((np.asarray(found) >= 0) & (np.asarray(found) <= room))
    assert np.max(np.abs(np.asarray(found) - o.shares(total, weights, room))) <= 1


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_pruning_follows_the_cubic_schedule(ranking):
    gradients = recorded_gradients()
    tx = pruning(optax.sgd(0.1, momentum=0.9), 0.1, 2, 9, refresh_every=2, ranking=ranking)
    records = follow(tx, gradients)
    for t, (theta, forward, backward, _) in enumerate(records):
        if t % 2:
            continue
        counts = {n: o.cubic(x.size, o.kept(x.size, 0.1), t, 2, 9) for n, x in theta.items()}
        if ranking == "layer":
            expected = {n: oracle.top(x, counts[n]) for n, x in theta.items()}
        else:
            expected = o.global_masks(theta, sum(counts.values()))
        for name, mask in expected.items():
            np.testing.assert_array_equal(forward[name], mask, err_msg=f"{name} {t}")
            np.testing.assert_array_equal(backward[name], mask)
    assert sum(m.sum() for m in records[-1][1].values()) == sum(
        o.kept(np.prod(s), 0.1) for s in SHAPES.values()
    )


def test_snip_ranks_the_first_saliency_over_the_network():
    gradients = recorded_gradients(scale={"a": 1.0, "b": 3.0, "c": 0.3})
    params = start()
    records = follow(snip(optax.sgd(0.1, momentum=0.9), 0.2), gradients)
    assert all(mask.all() for mask in records[0][1].values())
    saliency = {n: np.asarray(params[n] * gradients[0][n]) for n in SHAPES}
    total = sum(o.kept(np.prod(s), 0.2) for s in SHAPES.values())
    for theta, forward, _, view in records[1:]:
        for name, mask in o.global_masks(saliency, total).items():
            np.testing.assert_array_equal(forward[name], mask)
            np.testing.assert_array_equal(theta[name][~mask], np.asarray(params[name])[~mask])
            assert np.all(view[name][~mask] == 0)


def test_dnw_updates_everything_straight_through():
    records = follow(dnw(optax.sgd(0.1), 0.2), gradients := recorded_gradients())
    for t, (theta, forward, backward, _) in enumerate(records):
        for name, x in theta.items():
            np.testing.assert_array_equal(forward[name], oracle.select(x, 0.2))
            assert backward[name].all()
            if t:
                step = records[t - 1][0][name] - 0.1 * np.asarray(gradients[t - 1][name])
                np.testing.assert_allclose(x, step, atol=1e-6)


def test_a_random_exploration_set():
    tx = tk.top_kast(optax.sgd(0.1), 0.1, 0.4, refresh_every=2, exploration_set="random", seed=4)
    records = follow(tx, recorded_gradients())
    extras = []
    for t, (theta, forward, backward, _) in enumerate(records):
        for name, x in theta.items():
            if t % 2 == 0:
                np.testing.assert_array_equal(forward[name], oracle.select(x, 0.1))
            assert backward[name].sum() == o.kept(x.size, 0.4)
        extras.append(backward["a"] & ~forward["a"])
    np.testing.assert_array_equal(extras[2], extras[3])
    assert 0.1 < np.mean(extras[2][extras[4]]) < 0.7


@pytest.mark.parametrize(
    ("pattern", "density", "units"),
    [
        (tk.NOfM(2, 4), 0.5, None),
        (tk.NOfM(1, 4), 0.25, None),
        (tk.Channel(), 0.25, None),
        (tk.FanIn(), 0.25, None),
    ],
)  # fmt: skip
def test_patterns_keep_the_largest_of_each_group(pattern, density, units):
    rng = np.random.default_rng(0)
    for shape in ((12, 8), (3, 4, 8)):
        theta = rng.normal(size=shape).astype(np.float32)
        tx = tk.top_kast(optax.sgd(0.1), density, density, pattern=pattern)
        mask = np.asarray(tk.keep_masks({"w": theta}, tx.init({"w": theta}))[0]["w"])
        x = np.abs(theta)
        if isinstance(pattern, tk.NOfM):
            m, n = pattern.m, pattern.n
            groups = np.moveaxis(x.reshape(*shape[:-2], -1, m, shape[-1]), -2, -1).reshape(-1, m)
            kept = np.stack([o.largest(g, n) for g in groups])
            found = np.moveaxis(mask.reshape(*shape[:-2], -1, m, shape[-1]), -2, -1).reshape(-1, m)
        elif isinstance(pattern, tk.Channel):
            norms = x.reshape(-1, shape[-1]).astype(np.float64).sum(axis=0)
            kept = np.broadcast_to(o.largest(norms, o.kept(shape[-1], density)), shape)
            found = mask
        else:
            inputs = int(np.prod(shape[:-1]))
            kept = o.fan_in_top(theta, o.kept(inputs, density) * shape[-1])
            found = mask
        np.testing.assert_array_equal(found, kept)


def test_numbers_of_numpy_are_numbers():
    """They make the states that Python's do."""
    inner, params = optax.sgd(0.1), {"a": start()["a"]}
    whole, part = np.int64, np.float32
    pairs = [
        (rigl(inner, 0.1, whole(5), part(0.3), whole(9)), rigl(inner, 0.1, 5, 0.3, 9)),
        (
            set_evolution(inner, 0.1, 5, np.array(0.3), np.array(9)),
            set_evolution(inner, 0.1, 5, 0.3, 9),
        ),
        (snfs(inner, 0.1, momentum=part(0.9)), snfs(inner, 0.1, momentum=0.9)),
        (pruning(inner, part(0.1), whole(0), whole(9)), pruning(inner, 0.1, 0, 9)),
    ]
    for numpy, python in pairs:
        found, expected = (jax.eval_shape(tx.init, params) for tx in (numpy, python))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        methods = (numpy.plan.method, python.plan.method)
        one, other = (
            [str(np.float32(x)) for x in vars(m).values() if x != "layer"] for m in methods
        )
        assert one == other


def test_snip_of_a_last_layer_of_zeros_keeps_a_part_of_every_layer():
    """All saliencies of the first step are zero, and tie."""
    keys = jax.random.split(jax.random.key(0), 2)
    hidden = {name: jax.random.normal(key, (8, 8)) for name, key in zip("ab", keys, strict=True)}
    params = {**hidden, "out": jnp.zeros((8, 4))}

    def loss(p):
        return jnp.sum((jnp.tanh(jnp.tanh(jnp.ones((2, 8)) @ p["a"]) @ p["b"]) @ p["out"] - 1) ** 2)

    tx = snip(optax.sgd(0.1), 0.25)
    state = tx.init(params)
    grads = jax.grad(loss)(tk.forward_params(params, state))
    masks = tk.keep_masks(params, tx.update(grads, state, params)[1])[0]
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 16, "b": 16, "out": 8}
    assert len({row.tobytes() for row in np.asarray(masks["a"])}) > 2  # not the first rows


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rigl(optax.sgd(0.1), 0.1, drop_fraction=1.0), "drop_fraction=1.0: must be"),
        (lambda: set_evolution(optax.sgd(0.1), 0.1, drop_fraction="x"), "drop_fraction='x'"),
        (lambda: rigl(optax.sgd(0.1), 0.1, 100, last_choice_at=50), "last_choice_at=50 must be"),
        (lambda: snfs(optax.sgd(0.1), 0.1, momentum=1.0), r"momentum=1.0: must be .* \[0, 1\)"),
        (lambda: snfs(optax.sgd(0.1), 0.1, momentum="x"), r"momentum='x': must be a number"),
        (lambda: rigl(optax.sgd(0.1), 0.1, drop_fraction=jnp.float32(2)), "drop_fraction=Array"),
        (lambda: rigl(optax.sgd(0.1), 0.1, last_choice_at=9.5), "last_choice_at=9.5: .* integer"),
        (lambda: rigl(optax.sgd(0.1), 0.1, last_choice_at=np.int64(50)), "must be above refresh"),
        (lambda: pruning(optax.sgd(0.1), 0.1, np.int64(-1), 5), "begin_at=.*at least 0"),
        (lambda: pruning(optax.sgd(0.1), 0.1, 1, 5, ranking=["layer"]), r"ranking=\['layer'\]"),
        (lambda: pruning(optax.sgd(0.1), 0.1, 5, 5), "end_at=5 must be above begin_at=5"),
        (lambda: pruning(optax.sgd(0.1), 0.1, -1, 5), "begin_at=-1"),
        (lambda: pruning(optax.sgd(0.1), 0.1, 1, 5, ranking="all"), "ranking='all'"),
        (lambda: tk.NOfM(5, 4), r"NOfM\(5, 4\)"),
        (lambda: tk.top_kast(optax.sgd(0.1), 0.1, 0.2, exploration_set="x"), "exploration_set='x'"),
        (
            lambda: snfs(optax.sgd(0.1), 0.5, pattern=tk.FanIn()).init(start()),
            r"a: snfs moves units between layers, and FanIn\(\) fixes",
        ),
        (
            lambda: snip(optax.sgd(0.1), 0.5, pattern=tk.NOfM(2, 4)).init({"a": start()["a"]}),
            "a: snip moves units between layers",
        ),
        (
            lambda: tk.top_kast(optax.sgd(0.1), 0.1, 0.5, pattern=tk.NOfM(2, 4)).init(start()),
            r"a: forward_density=0.1 with NOfM\(2, 4\): must be 0.5",
        ),
        (
            lambda: tk.top_kast(optax.sgd(0.1), 0.5, 0.6, pattern=tk.NOfM(2, 4)).init(start()),
            "a: backward_density=0.6 .* multiple of 0.25",
        ),
        (
            lambda: tk.top_kast(optax.sgd(0.1), 0.5, 0.5, pattern=tk.NOfM(2, 4)).init(
                {"w": jnp.ones((6, 4))}
            ),
            "w: NOfM.* does not divide",
        ),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(tk.SparsityError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
