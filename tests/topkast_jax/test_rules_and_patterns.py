"""Which leaves are sparse and how: rules, ERK densities, blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import topkast_jax as tk
from topkast_jax.methods.rigl import RigL
from topkast_jax.rules import erk_densities, resolve
from topkast_jax.selection import keep_count

PARAMS = {
    "stem": {"kernel": jnp.ones((3, 3, 4, 8))},
    "body": [{"kernel": jnp.ones((8, 8)), "scale": jnp.ones(8)} for _ in range(2)],
    "head": {"kernel": jnp.ones((8, 10)), "bias": jnp.ones(10)},
    "count": jnp.zeros((2, 2), jnp.int32),
}


def resolved(rules, forward=0.1, backward=0.2):
    return resolve(PARAMS, rules, forward, backward, tk.Unstructured())


def test_without_rules_floating_matrices_are_sparse():
    sparse = {name for name, leaf in resolved(None).items() if leaf}
    assert sparse == {"stem/kernel", "body/0/kernel", "body/1/kernel", "head/kernel"}


def test_the_first_rule_that_matches_wins():
    found = resolved([
        ("stem/kernel", tk.Dense()),
        ("head/.*kernel", tk.Sparse(forward_density=0.5)),
        (".*kernel", tk.Sparse(backward_density=0.4, pattern=tk.Block(2, 2))),
        (".*", tk.Dense()),
    ])  # fmt: skip
    assert found["stem/kernel"] is None
    assert found["body/0/scale"] is None
    head, body = found["head/kernel"], found["body/1/kernel"]
    assert (head.forward_density, head.backward_density) == (0.5, 0.5)
    assert (body.forward_density, body.backward_density) == (0.1, 0.4)
    assert body.pattern == tk.Block(2, 2)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([(".*kernel", tk.Sparse())], "no rule covers body/0/scale, body/1/scale, count"),
        ([("kernel", tk.Sparse()), (".*", tk.Dense())], "rule 'kernel' matches no parameter"),
        ([(".*", tk.Sparse())], "count has type int32: only floats can be sparse"),
        ([("(", tk.Sparse())], r"rule '\(' is no regular expression"),
        ([(".*", "dense")], r"rule \('.\*', 'dense'\): must be"),
        ([("stem.*", tk.Sparse(pattern=tk.Block(3, 3))), (".*", tk.Dense())],
         r"stem/kernel: Block\(3, 3\) does not divide"),
        ([("stem.*", tk.Sparse(stacked=4)), (".*", tk.Dense())],
         r"stem/kernel: stacked=4 must name different axes of \(3, 3, 4, 8\)"),
        ([("stem.*", tk.Sparse(forward_density=0.3, backward_density=0.2)), (".*", tk.Dense())],
         "stem/kernel: backward_density=0.2 is below forward_density=0.3"),
        ([(".*bias", tk.Sparse(pattern=tk.Block(1, 1))), (".*", tk.Dense())], "needs two axes"),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit_are_named(rules, message):
    with pytest.raises(tk.SparsityError, match=message) as caught:
        tk.top_kast(optax.sgd(0.1), 0.1, 0.2, rules=rules).init(PARAMS)
    assert "\n" not in str(caught.value)


def test_leaves_without_entries_are_dense_by_default():
    params = {"w": jnp.ones((4, 5)), "none": jnp.zeros((0, 4, 5))}
    found = resolve(params, None, 0.1, 0.2, tk.Unstructured())
    assert [name for name, leaf in found.items() if leaf] == ["w"]


injected = optax.inject_hyperparams


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_rounded_hyperparameter_is_no_other_density(density, dtype):
    """Hyperparameters have the parameters' type, other densities that of Python."""
    params = {"w": jnp.ones((8, 10), dtype)}
    rules = [("w", tk.Sparse(forward_density=density))]
    made = [
        injected(tk.top_kast, static_args=(name,))(optax.sgd(0.1), density, density)
        for name in ("forward_density", "backward_density")
    ]
    for tx in (*made, injected(tk.top_kast)(optax.sgd(0.1), 0.05, 0.05, rules=rules)):
        forward, backward = tk.keep_masks(params, tx.init(params))
        assert abs(int(forward["w"].sum()) - 80 * density) <= (0 if dtype == jnp.float32 else 1)
        assert backward["w"].sum() >= forward["w"].sum()


def test_a_backward_density_that_is_smaller_by_more_than_rounding():
    tx = injected(tk.top_kast, static_args=("backward_density",))(optax.sgd(0.1), 0.3, 0.2999)
    with pytest.raises(tk.SparsityError, match="backward_density=0.2999 is below .*density=0.3:"):
        tx.init({"w": jnp.ones((8, 10))})


@pytest.mark.parametrize(
    ("n", "m", "dtype"),
    [
        (1, 3, jnp.float32),
        (2, 4, jnp.bfloat16),
        (5, 6, jnp.float32),
        *(
            pytest.param(*numbers, marks=pytest.mark.slow)
            for numbers in ((1, 3, jnp.bfloat16), (2, 4, jnp.float32), (5, 6, jnp.bfloat16))
        ),
    ],
)
def test_n_of_m_holds_to_its_n_whatever_the_hyperparameters(n, m, dtype):
    params = {"w": jnp.ones((2 * m, 8), dtype)}

    def factory(density):
        return injected(tk.top_kast)(optax.sgd(0.1), density, 1.0, pattern=tk.NOfM(n, m))

    def kept(params):
        return tk.keep_masks(params, factory(n / m).init(params))[0]["w"].reshape(-1, m, 8).sum(1)

    assert np.all(kept(params) == n)
    assert np.all(jax.jit(kept)(params) == n)
    with pytest.raises(tk.SparsityError, match=rf"w: forward_density=0.2.* with NOfM\({n}, {m}\)"):
        factory(0.26).init(params)
    # A schedule's value inside a compiled function cannot be checked.
    state = jax.jit(factory(0.26).init)(params)
    assert tk.keep_masks(params, state)[0]["w"].sum() == 2 * n * 8


@pytest.mark.parametrize("traced", ["forward_density", "backward_density"])
def test_erk_needs_plain_densities(traced):
    plain = {"forward_density", "backward_density"} - {traced}
    tx = injected(tk.top_kast, static_args=plain)(
        optax.sgd(0.1), 0.1, 0.2, rules=[(".*", tk.Sparse(distribution="erk"))]
    )
    with pytest.raises(tk.SparsityError, match="'erk' needs plain numbers as densities"):
        tx.init({"w": jnp.ones((8, 8))})


def test_a_method_without_exploration_updates_what_it_keeps():
    """Also a leaf whose own density is below that of the transform."""
    rules = [("v", tk.Sparse(forward_density=0.05)), ("w", tk.Sparse())]
    tx = tk.sparsify(optax.sgd(0.1), RigL(), forward_density=0.1, backward_density=0.1, rules=rules)
    params = {"v": jnp.ones((10, 10)), "w": jnp.ones((10, 10))}
    assert {n: x.counts for n, x in tx.plan.leaves(params).items()} == {"v": (5, 5), "w": (10, 10)}


def test_pruning_keeps_all_of_a_large_leaf_before_it_begins():
    leaf = {"w": jax.ShapeDtypeStruct((50257, 768), jnp.float32)}
    plan = tk.methods.pruning(optax.sgd(0.1), 0.2, begin_at=5, end_at=9).plan
    (large,) = plan.sparse_leaves(leaf).values()
    for step, kept in ((0, 50257 * 768), (5, 50257 * 768), (9, large.counts.forward)):
        assert plan.method.scheduled(large, step).forward == kept


def test_erk_does_not_share_out_what_n_of_m_fixes():
    rules = [(".*", tk.Sparse(distribution="erk", pattern=tk.NOfM(1, 4)))]
    tx = tk.top_kast(optax.sgd(0.1), 0.25, 0.25, rules=rules)
    with pytest.raises(tk.SparsityError, match=r"v: distribution='erk' with NOfM\(1, 4\).*'unif"):
        tx.init({"w": jnp.ones((8, 8)), "v": jnp.ones((64, 64))})


def test_each_group_breaks_its_ties_by_itself():
    pattern, zeros = tk.NOfM(2, 4), {"w": jnp.zeros((8, 64))}
    tx = tk.top_kast(optax.sgd(0.1), 0.5, 0.75, pattern=pattern)
    forward, backward = (np.asarray(m["w"]) for m in tk.keep_masks(zeros, tx.init(zeros)))
    assert np.all(forward.reshape(2, 4, 64).sum(1) == 2)
    assert np.all(backward.reshape(2, 4, 64).sum(1) == 3)
    assert not np.any(forward & ~backward)
    groups = np.moveaxis(forward.reshape(2, 4, 64), 1, -1).reshape(-1, 4)
    found, times = np.unique(groups, axis=0, return_counts=True)
    assert len(found) == 6  # all pairs of four
    assert times.min() >= 8  # of 128 / 6 = 21
    (later,), _ = pattern.top(zeros["w"], [256])
    np.testing.assert_array_equal(later, np.tile([[True], [True], [False], [False]], (2, 64)))


@pytest.mark.parametrize("sizes", [(0, 2), (2, -1), (1.5, 2), (True, 1)])
def test_a_block_needs_whole_sizes(sizes):
    with pytest.raises(tk.SparsityError, match="must be an integer of at least 1"):
        tk.Block(*sizes)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 64), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6
    ),
    density=st.floats(0.01, 1.0),
)
def test_erk_keeps_the_budget_and_the_proportions(shapes, density):
    densities = erk_densities(shapes, density)
    sizes = np.array([np.prod(s) for s in shapes])
    raw = np.array([sum(s) / np.prod(s) for s in shapes])
    assert np.all(np.array(densities) <= 1 + 1e-12)
    np.testing.assert_allclose(np.dot(densities, sizes), density * sizes.sum(), rtol=1e-9)
    below = np.array(densities) < 1
    if below.any():
        ratio = np.array(densities)[below] / raw[below]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
        assert np.all(ratio[0] * raw[~below] >= 1 - 1e-9)


def test_erk_through_a_rule_shares_one_budget():
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((64, 64)), "c": jnp.ones((3, 32, 32))}
    rules = [
        ("a|b", tk.Sparse(distribution="erk")),
        ("c", tk.Sparse(distribution="erk", stacked=0)),
    ]
    tx = tk.top_kast(optax.sgd(0.1), 0.1, 0.3, rules=rules)
    counts = tk.statistics.leaf_counts(params, tx.init(params))
    expected = erk_densities([(8, 8), (64, 64), (32, 32)], 0.1, copies=[1, 1, 3])
    for leaf, density in zip(("a", "b"), expected[:2], strict=True):
        assert counts[leaf].forward == oracle.keep_count(counts[leaf].entries, density)
    assert counts["c"].forward == 3 * oracle.keep_count(32 * 32, expected[2])
    assert counts["a"].backward >= counts["a"].forward


def test_stacked_layers_are_selected_one_by_one():
    theta = (
        jax.random.normal(jax.random.key(0), (3, 6, 8))
        * jnp.array([1.0, 10.0, 100.0])[:, None, None]
    )
    tx = tk.top_kast(optax.sgd(0.1), 0.25, 0.5, rules=[(".*", tk.Sparse(stacked=0))])
    mask = np.asarray(tk.keep_masks(theta, tx.init(theta))[0])
    for layer in range(3):
        np.testing.assert_array_equal(mask[layer], oracle.select(np.asarray(theta[layer]), 0.25))


@settings(max_examples=15, deadline=None)
@given(
    grid=st.sampled_from([(1, 1, 1), (1, 5, 3), (3, 2, 4)]),
    block=st.sampled_from([(1, 1), (2, 3), (4, 1)]),
    density=st.sampled_from([0.3, 0.75]),
    seed=st.integers(0, 2**16),
)
def test_blocks_are_ranked_by_their_l1_norm(grid, block, density, seed):
    lead, rows, cols = grid
    shape = (lead, rows * block[0], cols * block[1])
    theta = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)
    rules = [(".*", tk.Sparse())]
    tx = tk.top_kast(optax.sgd(0.1), density, density, pattern=tk.Block(*block), rules=rules)
    mask = np.asarray(tk.keep_masks(theta, tx.init(theta))[0])
    norms, kept = oracle.block_norms(theta, *block), oracle.block_norms(mask, *block)
    assert set(np.unique(kept)) <= {0, block[0] * block[1]}
    assert np.sum(kept > 0) == oracle.keep_count(norms.size, density)
    assert oracle.is_top(kept > 0, norms)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 2_000_000_000), parts=st.integers(1, 1_000_000))
def test_a_traced_density_counts_like_a_plain_one(n, parts):
    exact = max(1, (2 * parts * n + 1_000_000) // 2_000_000)
    traced = jax.jit(lambda d: keep_count(n, d))(jnp.float32(parts / 1_000_000))
    assert int(traced) == exact


def test_two_leaves_of_one_name():
    twins = {"a/b": jnp.ones((2, 2)), "a": {"b": jnp.ones((2, 2))}}
    with pytest.raises(tk.SparsityError, match="2 leaves are named 'a/b'"):
        tk.top_kast(optax.sgd(0.1), 0.5, 0.5).init(twins)
    apart = {"value": jnp.ones((2, 2)), "raw_value": jnp.zeros((2, 2))}
    state = tk.top_kast(optax.sgd(0.1), 0.5, 0.5).init({"a": apart})
    assert set(state.memory) == {"a/value", "a/raw_value"}
