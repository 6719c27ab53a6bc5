"""`top_kast` against the NumPy oracle written from the paper."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import topkast_jax as tk

STEPS = 300
INNER = {
    "sgd": (lambda: optax.sgd(0.05, momentum=0.9), lambda: oracle.Sgd(0.05, 0.9)),
    "adam": (lambda: optax.adam(0.003), lambda: oracle.Adam(0.003)),
}


def problem(seed, shape, ties):
    """An initial θ and a gradient g(α, t) = scale · (α − target_t), the same operations on both."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=shape).astype(np.float32)
    if ties:
        theta = np.round(theta).astype(np.float32)
    scale = rng.uniform(0.2, 1.0, shape).astype(np.float32)
    targets = rng.normal(size=(STEPS, *shape)).astype(np.float32)
    return theta, scale, targets


def follow(shape, seed=2, ties=False, inner="sgd", block=None, **options):
    theta, scale, targets = problem(seed, shape, ties)
    make, make_oracle = INNER[inner]
    reset = options.get("inner_state") == "reset"
    pattern = tk.Block(*block) if block else tk.Unstructured()
    tx = tk.top_kast(make(), rules=[(".*", tk.Sparse())], pattern=pattern, **options)
    params = {"w": jnp.asarray(theta)}
    state = tx.init(params)
    first = [np.asarray(mask["w"]) for mask in tk.keep_masks(params, state)] if ties else None
    for mask, density in zip(first or (), ("forward_density", "backward_density"), strict=False):
        assert mask.sum() == oracle.keep_count(mask.size, options[density])
        assert oracle.is_top(mask, theta)
    reference = oracle.TopKast(
        theta, make_oracle(), options["forward_density"], options["backward_density"],
        options.get("refresh_every", 100), options.get("exploration_weight", 1e-4),
        options.get("exploration_norm", "l2"), options.get("stop_exploring_at"), reset, block,
        first, options.get("exploration_decay", lambda steps: 0.0),
    )  # fmt: skip

    @jax.jit
    def step(params, state, target):
        alpha = tk.forward_params(params, state)
        grads = {"w": scale * (alpha["w"] - target)}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # Rounding errors are of the size of the largest entry so far: a leaf of one entry passes zero.
    largest = np.max(np.abs(theta))
    for t in range(STEPS):
        reference.step(scale * (reference.alpha - targets[t]))
        params, state = step(params, state, targets[t])
        forward, backward = tk.keep_masks(params, state)
        np.testing.assert_array_equal(forward["w"], reference.a, err_msg=f"A after step {t + 1}")
        np.testing.assert_array_equal(backward["w"], reference.b, err_msg=f"B after step {t + 1}")
        largest = max(largest, np.max(np.abs(reference.theta)))
        error = np.max(np.abs(params["w"] - reference.theta)) / largest
        assert error <= 1e-6, f"parameters differ by {error} after step {t + 1}"
    return reference


QUICK = (("keep", "sgd"), ("reset", "adam"))


@pytest.mark.parametrize(
    ("refresh", "norm", "stop", "kept", "inner"),
    [
        pytest.param(*case, marks=[] if case[3:] in QUICK else pytest.mark.slow)
        for case in itertools.product(
            [1, 7], ["l2", "l1"], [None, 100], ["keep", "reset"], ["sgd", "adam"]
        )
    ],
)
def test_follows_the_oracle(refresh, norm, stop, kept, inner):
    reference = follow(
        (12, 10), inner=inner, forward_density=0.1, backward_density=0.3, refresh_every=refresh,
        exploration_weight=1e-3, exploration_norm=norm, stop_exploring_at=stop, inner_state=kept,
    )  # fmt: skip
    assert reference.steps == STEPS


@pytest.mark.parametrize("inner", ["sgd", "adam"])
@pytest.mark.parametrize("refresh", [1, 7])
def test_blocks_follow_the_oracle(refresh, inner):
    follow(
        (3, 8, 12), inner=inner, block=(2, 4), forward_density=0.25, backward_density=0.5,
        refresh_every=refresh, exploration_weight=1e-2,
    )  # fmt: skip


@pytest.mark.parametrize("refresh", [1, 7])
def test_ties_and_zeros_follow_the_oracle(refresh):
    follow((9, 11), ties=True, forward_density=0.2, backward_density=0.4, refresh_every=refresh)


@pytest.mark.parametrize(("forward", "backward"), [(0.2, 0.4), (1.0, 1.0)])
def test_a_leaf_of_one_entry_follows_the_oracle(forward, backward):
    follow((1,), forward_density=forward, backward_density=backward, refresh_every=1)


def test_stopping_at_the_start_and_on_a_refresh_step():
    follow((8, 9), forward_density=0.2, backward_density=0.6, refresh_every=5, stop_exploring_at=0)
    follow((8, 9), forward_density=0.2, backward_density=0.6, refresh_every=5, stop_exploring_at=50)


@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_a_decoupled_penalty_follows_the_oracle(inner):
    """A schedule by the finished steps, which the moments of the inner optimizer do not see."""
    follow(
        (12, 10), inner=inner, forward_density=0.1, backward_density=0.3, refresh_every=7,
        exploration_weight=0.0, exploration_decay=lambda steps: 0.02 / (1 + steps),
    )  # fmt: skip


def test_a_decoupled_penalty_may_be_traced_or_injected_and_spares_dense_leaves():
    params = {"w": jnp.array([[4.0, -3.0], [2.0, 1.0]]), "bias": jnp.ones(2)}
    rules = [("w", tk.Sparse()), (".*", tk.Dense())]
    zeros = jax.tree.map(jnp.zeros_like, params)

    def transform(decay):
        return tk.top_kast(optax.adam(0.1), 0.25, 0.5, rules=rules, exploration_weight=0.0,
                           exploration_decay=decay)  # fmt: skip

    @jax.jit
    def traced(decay):
        tx = transform(decay)
        return tx.update(zeros, tx.init(params), params)[0]

    injected = optax.inject_hyperparams(transform)(decay=optax.constant_schedule(0.5))
    found = traced(0.5), injected.update(zeros, injected.init(params), params)[0]
    for updates in found:
        np.testing.assert_array_equal(updates["w"], [[-0.5 * 4.0, 0.5 / 0.25 * 3.0], [0.0, 0.0]])
        np.testing.assert_array_equal(updates["bias"], 0)


@pytest.mark.parametrize("weight", [-1e-3, float("inf"), float("nan"), True, "0.1", None])
@pytest.mark.parametrize("name", ["exploration_weight", "exploration_decay"])
def test_a_weight_that_is_none_is_one_line(name, weight):
    with pytest.raises(tk.SparsityError, match=f"^{name}=.*: must be a finite number of at least"):
        tk.top_kast(optax.sgd(0.1), 0.1, 0.2, **{name: weight})
