"""RigL always sparse against RigL on dense arrays, over a loss with a gradient everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk
from topkast_jax.always_sparse import AlwaysSparse, matmul, values_of
from topkast_jax.always_sparse.gradients import groups

STEPS = 9
RULES = ((".*/bias", tk.Dense()), ("layers/.*", tk.Sparse(stacked=0)), (".*", tk.Sparse()))
OPTIMIZERS = {"momentum": optax.sgd(0.05, momentum=0.9), "adam": optax.adam(1e-2)}


def start():
    rng = np.random.default_rng(0)
    shapes = {
        "in": {"kernel": (12, 16)},
        "layers": {"kernel": (3, 16, 16)},
        "out": {"bias": (8,), "kernel": (16, 8)},
    }
    return jax.tree.map(
        lambda s: rng.normal(0, s[-2] ** -0.5 if len(s) > 1 else 1, s).astype(np.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def batches():
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        yield rng.normal(size=(20, 12)).astype(np.float32), rng.normal(size=(20, 8)).astype("f4")


def loss(params, x, y):
    h = jnp.tanh(matmul(x, params["in"]["kernel"]))
    h, _ = jax.lax.scan(lambda h, k: (jnp.tanh(matmul(h, k)), None), h, params["layers"]["kernel"])
    return jnp.mean((matmul(h, params["out"]["kernel"]) + params["out"]["bias"][None] - y) ** 2)


def masked(tx):
    params = start()
    state = tx.init(params)
    update = jax.jit(tx.update)
    gradient = jax.jit(jax.grad(loss))
    for batch in batches():
        grads = gradient(tk.forward_params(params, state), *batch)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        yield tk.keep_masks(params, state)[0], tk.forward_params(params, state)


def compact(tx, delay=0):
    params = start()
    sparse = AlwaysSparse(tx, params, delay=delay)
    values, state, reservoir = sparse.start(params)
    gradient = jax.jit(jax.grad(loss, allow_int=True))
    update = jax.jit(sparse.transform.update)
    for step, batch in enumerate(batches(), start=1):
        dense = None
        if sparse.needs_gradients(step):
            dense = sparse.gradients(loss, values, state, *batch)
        grads = gradient(tk.forward_params(values, state), *batch)
        updates, state = update(values_of(grads), state, values)
        values = optax.apply_updates(values, updates)
        values, state, reservoir = sparse.refresh(step, values, state, reservoir, dense)
        yield tk.keep_masks(*sparse.masks(reservoir))[0], sparse.to_masked(values, state, reservoir)


def rigl(optimizer="momentum", **options):
    settings = {"refresh_every": 3, "drop_fraction": 0.4, "rules": RULES} | options
    return tk.methods.rigl(OPTIMIZERS[optimizer], 0.25, **settings)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"optimizer": "adam", "pattern": tk.Block(4, 2)},
        pytest.param({"pattern": tk.FanIn(), "skips_update": True}, marks=pytest.mark.slow),
        pytest.param(
            {"last_choice_at": 7, "optimizer": "adam", "skips_update": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_follows_the_masked_path(options):
    tx = rigl(**options)
    moved = 0
    before = None
    for (sets, view), (own, (params, state)) in zip(masked(tx), compact(tx), strict=True):
        jax.tree.map(np.testing.assert_array_equal, own, sets)
        found = tk.forward_params(params, state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, view)
        sets = jax.tree.map(np.array, sets)
        if before is not None:
            moved += sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.sum(a != b), before, sets)))
        before = sets
    assert moved > 40


def test_gradients_are_those_of_the_dense_loss_and_exist_a_group_at_a_time():
    sparse = AlwaysSparse(rigl(), start())
    values, state, reservoir = sparse.start(start())
    batch = next(batches())
    seen = []

    def watched(view, *args):
        leaves = (view["in"], view["layers"], view["out"])
        seen.append([isinstance(leaf["kernel"], jax.Array) for leaf in leaves])
        return loss(view, *args), "more"

    found = sparse.gradients(watched, values, state, *batch, has_aux=True)
    params, masks = sparse.to_masked(values, state, reservoir)
    expected = jax.grad(loss)(tk.forward_params(params, masks), *batch)
    for name, gradient in found.items():
        first, second = name.split("/")
        np.testing.assert_allclose(gradient, expected[first][second], atol=1e-6)
        assert np.count_nonzero(gradient) > 0.9 * gradient.size
    assert set(found) == {"in/kernel", "layers/kernel", "out/kernel"}
    assert sorted(seen) == [[False, True, False], [True, False, True]]


def test_groups_are_no_larger_than_the_largest_leaf():
    sparse = AlwaysSparse(rigl(), start())
    assert groups(sparse._layout.sparse) == [("layers/kernel",), ("in/kernel", "out/kernel")]
    assert groups({}) == []


def test_a_delayed_choice_reads_the_gradient_of_its_own_step():
    tx = rigl(refresh_every=4)
    plain = [jax.tree.map(np.array, sets) for sets, _ in compact(tx)]
    late = [jax.tree.map(np.array, sets) for sets, _ in compact(tx, delay=2)]
    jax.tree.map(np.testing.assert_array_equal, plain[3], late[5])
    jax.tree.map(np.testing.assert_array_equal, plain[0], late[4])


def test_mistakes_are_one_line():
    sparse = AlwaysSparse(rigl(), start())
    values, state, reservoir = sparse.start(start())
    assert [sparse.needs_gradients(step) for step in range(1, 7)] == [False, False, True] * 2
    batch = next(batches())
    update = sparse.transform.update
    grads = jax.grad(loss, allow_int=True)
    for step in (1, 2, 3):
        dense = sparse.gradients(loss, values, state, *batch)
        updates, state = update(
            values_of(grads(tk.forward_params(values, state), *batch)), state, values
        )
        values = optax.apply_updates(values, updates)
        if step < 3:
            values, state, reservoir = sparse.refresh(step, values, state, reservoir)
    with pytest.raises(tk.SparsityError, match="RigL chooses by the dense gradient: where needs_g"):
        sparse.refresh(3, values, state, reservoir)
    with pytest.raises(tk.SparsityError, match="gradients: found a list, must be a dict of arrays"):
        sparse.refresh(3, values, state, reservoir, list(dense.values()))
    wrong = dense | {"in/kernel": dense["in/kernel"].T}
    with pytest.raises(
        tk.SparsityError, match=r"in/kernel must be of shape \(12, 16\), found \(16"
    ):
        sparse.refresh(3, values, state, reservoir, wrong)
    with pytest.raises(tk.SparsityError, match=r"out/kernel must be .* found nothing"):
        sparse.refresh(3, values, state, reservoir, {k: dense[k] for k in dense if "out" not in k})
    with pytest.raises(tk.SparsityError, match="gradients: in/kernel must be an array"):
        sparse.gradients(loss, start(), state, *batch)
    sparse.refresh(3, values, state, reservoir, dense)
