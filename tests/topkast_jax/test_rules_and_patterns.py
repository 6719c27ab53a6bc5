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
from topkast_jax.rules import erk_densities, resolve
from topkast_jax.selection import count_of

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
    traced = jax.jit(lambda d: count_of(n, d))(jnp.float32(parts / 1_000_000))
    assert int(traced) == exact


def test_two_leaves_of_one_name():
    twins = {"a/b": jnp.ones((2, 2)), "a": {"b": jnp.ones((2, 2))}}
    with pytest.raises(tk.SparsityError, match="2 leaves are named 'a/b'"):
        tk.top_kast(optax.sgd(0.1), 0.5, 0.5).init(twins)
    apart = {"value": jnp.ones((2, 2)), "raw_value": jnp.zeros((2, 2))}
    state = tk.top_kast(optax.sgd(0.1), 0.5, 0.5).init({"a": apart})
    assert set(state.memory) == {"a/value", "a/raw_value"}
