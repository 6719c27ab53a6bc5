"""Selection against a stable argsort in NumPy."""

import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from processes import one_device

import topkast_jax as tk
from topkast_jax import reductions, selection
from topkast_jax.errors import SparsityError
from topkast_jax.selection import (
    Thresholds,
    counts_of_global_top_k,
    keep,
    keep_count,
    thresholds,
    top_k_masks,
)

DTYPES = ("float32", "bfloat16", "float16")


def oracle(x, count):
    """The keep-mask by the definition: larger |x| first, a NaN before all, then row-major order."""
    flat = np.asarray(x).astype(np.float64).ravel()
    order = np.lexsort((np.arange(flat.size), -np.abs(flat), ~np.isnan(flat)))
    mask = np.zeros(flat.size, bool)
    mask[order[:count]] = True
    return mask.reshape(np.shape(x))


def smallest_kept(x, mask):
    """The key that thresholds should report, from the mask."""
    x = np.asarray(x)
    bits = np.abs(x[mask]).view(f"i{x.dtype.itemsize}").astype(np.int64)
    above_infinity = np.array(np.inf, x.dtype).view(f"i{x.dtype.itemsize}").astype(np.int64) + 1
    return np.minimum(bits, above_infinity).min()


@partial(jax.jit, static_argnums=(2, 3))
def select(x, counts, warm, small, start):
    """`small`: the number of entries up to which bisection is used in place of the search."""
    with mock.patch.object(selection, "SMALL", small):
        counts, start = (counts[0], counts[1]), start if warm else None
        masks, separating = top_k_masks(x, counts, start)
        return masks, thresholds(x, counts, start), separating


def check(x, counts, start=None):
    warm = start is not None
    start = start or Thresholds(jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))
    bisected = select(x, jnp.asarray(counts, jnp.int32), False, 2**14, start)
    masks, found, separating = select(x, jnp.asarray(counts, jnp.int32), warm, 0, start)
    for one, other in zip(
        jax.tree.leaves((masks, found.key)), jax.tree.leaves(bisected), strict=False
    ):
        np.testing.assert_array_equal(one, other)
    for i, count in enumerate(counts):
        expected = oracle(x, count)
        assert np.asarray(masks[i]).sum() == count
        np.testing.assert_array_equal(np.asarray(masks[i]), expected)
        for kept in (keep(x, found)[i], keep(x, separating)[i]):
            np.testing.assert_array_equal(kept, expected)
        assert separating.key[i] <= found.key[i]
        assert int(found.key[i]) == smallest_kept(x, expected)
    return masks, found


def entries(kind, rng, shape):
    """Arrays that are hard in one way each."""
    normal = rng.normal(size=shape)
    special = rng.choice([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1.0, -1.0], size=shape)
    return {
        "normal": normal,
        "small": normal * 1e-3,
        "ties": np.round(normal * 2),
        "equal": np.full(shape, -3.0),
        "zeros": np.where(rng.random(shape) < 0.7, 0.0, normal),
        "special": np.where(rng.random(shape) < 0.5, special, normal),
        "nan": np.full(shape, np.nan),
        "denormal": rng.integers(-9, 9, size=shape) * 1e-45,
        "exponents": normal * 2.0 ** rng.integers(-140, 120, size=shape),
        "sorted": np.sort(normal.ravel()).reshape(shape),
        "clustered ties": np.repeat(normal.ravel()[:1], normal.size).reshape(shape)
        * (np.arange(normal.size).reshape(shape) > normal.size * 0.9),
    }[kind]


KINDS = (
    *("normal", "small", "ties", "equal", "zeros", "special", "nan", "denormal", "exponents"),
    *("sorted", "clustered ties"),
)
LEAVES = (
    *(((1,), "float32"), ((7, 9), "float32"), ((300,), "float32"), ((3, 3, 4, 8), "float32")),
    *(((1, 1), "bfloat16"), ((7, 9), "bfloat16"), ((32, 33), "float16"), ((2,), "float16")),
)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(data=st.data())
def test_sets_equal_the_oracle(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    shape, dtype = data.draw(st.sampled_from(LEAVES), label="leaf")
    kind = data.draw(st.sampled_from(KINDS), label="kind")
    with np.errstate(over="ignore"):
        x = jnp.asarray(np.asarray(entries(kind, rng, shape), np.float32)).astype(dtype)
    counts = sorted(data.draw(st.tuples(*[st.integers(1, x.size)] * 2), label="counts"))
    masks, _ = check(x, counts)
    assert not np.any(np.asarray(masks[0]) & ~np.asarray(masks[1]))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data())
def test_start_never_changes_the_answer(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    kind = data.draw(st.sampled_from(KINDS), label="kind")
    x = jnp.asarray(np.asarray(entries(kind, rng, (7, 9)), np.float32))
    keys = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=2)
    start = Thresholds(
        jnp.asarray(data.draw(keys, label="key"), jnp.int32),
        jnp.asarray(data.draw(keys, label="index"), jnp.int32),
    )
    check(x, data.draw(st.sampled_from([(1, 63), (6, 13), (31, 32)]), label="counts"), start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_warm_start_after_a_small_change(dtype):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(50, 41)), dtype)
    _, found = check(x, (205, 410))
    moved = (x + 1e-3 * jnp.asarray(rng.normal(size=x.shape), dtype)).astype(dtype)
    _, warm = check(moved, (205, 410), found)
    _, cold = check(moved, (205, 410))
    assert [a.tolist() for a in warm] == [a.tolist() for a in cold]


@pytest.mark.parametrize(
    ("entry_count", "density", "expected"),
    [(1, 0.0, 1), (10, 0.25, 3), (10, 0.24, 2), (10, 1.0, 10), (1000, 1e-9, 1), (3, 0.5, 2)],
)
def test_keep_count(entry_count, density, expected):
    assert keep_count(entry_count, density) == expected


def test_any_number_of_counts_and_eager_calls():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(6, 7)), jnp.float32)
    for run, counts in ((top_k_masks, (5,)), (jax.jit(top_k_masks, static_argnums=1), (1, 20, 42))):
        masks, _ = run(x, counts)
        for mask, count in zip(masks, counts, strict=True):
            np.testing.assert_array_equal(np.asarray(mask), oracle(x, count))


def test_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(5).normal(size=(9, 8)))
        masks, _ = top_k_masks(x, (7, 14))
        for mask, count in zip(masks, (7, 14), strict=True):
            np.testing.assert_array_equal(np.asarray(mask), oracle(x, count))


def test_vmap_scan_and_cond():
    stacked = jnp.asarray(np.random.default_rng(6).normal(size=(4, 6, 7)), jnp.float32)
    expected = np.stack([oracle(x, 9) for x in stacked])

    mapped = jax.jit(jax.vmap(lambda x: top_k_masks(x, (9, 20))[0][0]))(stacked)
    np.testing.assert_array_equal(np.asarray(mapped), expected)

    def step(start, x):
        (mask, _), found = top_k_masks(x, (9, 20), start)
        return found, mask

    start = thresholds(stacked[0], (9, 20))
    _, scanned = jax.jit(partial(jax.lax.scan, step))(start, stacked)
    np.testing.assert_array_equal(np.asarray(scanned), expected)

    def maybe(now, x, start):
        return jax.lax.cond(now, lambda: thresholds(x, (9, 20), start), lambda: start)

    new = jax.jit(maybe)(True, stacked[1], start)
    np.testing.assert_array_equal(np.asarray(keep(stacked[1], new)[0]), expected[1])
    assert jax.tree.all(
        jax.tree.map(jnp.array_equal, jax.jit(maybe)(False, stacked[1], start), start)
    )


def test_nothing_to_differentiate():
    x = jnp.asarray([3.0, -1.0, 2.0])
    grad = jax.grad(lambda x: jnp.sum(jnp.where(top_k_masks(x, (1, 2))[0][1], x, 0.0)))(x)
    np.testing.assert_array_equal(np.asarray(grad), [1.0, 0.0, 1.0])


SHARDINGS = (
    ((64, 48), PartitionSpec("a", None)),
    ((64, 48), PartitionSpec(None, "a")),
    ((64, 48), PartitionSpec("b", "a")),
    ((48, 64), PartitionSpec(None, ("a", "b"))),
    ((1024,), PartitionSpec(("a", "b"))),
    ((3, 3, 16, 32), PartitionSpec(None, None, "b", "a")),
    ((3, 3, 16, 32), PartitionSpec(None, None, None, ("b", "a"))),
)


def collectives(compiled):
    """(kind, result type) of every collective in the compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text())


@pytest.mark.parametrize(("shape", "spec"), SHARDINGS)
@pytest.mark.parametrize("integers", [False, True])
def test_sharded_leaf_all_reduces_scalars_only(shape, spec, integers):
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    sharding = NamedSharding(mesh, spec)
    x = np.random.default_rng(7).normal(size=shape).astype(np.float32)
    x = jax.device_put(np.round(x) if integers else x, sharding)
    counts = (x.size // 10, x.size // 5)

    compiled = jax.jit(lambda x: top_k_masks(x, counts)).lower(x).compile()
    found = collectives(compiled)
    assert {kind for _, kind in found} == {"all-reduce"}
    for result, _ in found:
        sizes = [np.prod([int(d) for d in dims.split(",") if d], dtype=int)
                 for dims in re.findall(r"\w\d+\[([\d,]*)\]", result)]  # fmt: skip
        assert sum(sizes) <= 16, result

    masks, where = compiled(x)
    for mask, count in zip(masks, counts, strict=True):
        assert mask.sharding.is_equivalent_to(sharding, len(shape))
        np.testing.assert_array_equal(np.asarray(mask), oracle(x, count))
    assert [int(key) for key in where.key] == [
        smallest_kept(x, oracle(x, count)) for count in counts
    ]


def test_a_large_sharded_leaf_is_not_gathered():
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("a",))
    x = np.random.default_rng(7).normal(size=(256, 128)).astype(np.float32)
    cut = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "a")))
    compiled = jax.jit(lambda x: top_k_masks(x, (3277, 6554))[0]).lower(cut).compile()
    assert {kind for _, kind in collectives(compiled)} == {"all-reduce"}
    for mask, count in zip(compiled(cut), (3277, 6554), strict=True):
        np.testing.assert_array_equal(np.asarray(mask), oracle(x, count))


def test_salted_ties_are_searched_as_they_are_bisected(monkeypatch):
    monkeypatch.setattr(selection, "_LARGE", 1)
    x = jnp.asarray(entries("ties", np.random.default_rng(12), (9, 10)), jnp.float32)

    @partial(jax.jit, static_argnums=2)
    def masks(x, salt, small):
        with mock.patch.object(selection, "SMALL", small):
            return top_k_masks(x, (17, 44), salt=salt)[0]

    for salt in (0, 1, 2**31 + 5):
        bisected, searched = (masks(x, jnp.uint32(salt), small) for small in (2**14, 0))
        for count, one, other in zip((17, 44), bisected, searched, strict=True):
            assert int(other.sum()) == count
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("path", ["_reduce_flat", "_reduce_by_element"])
@pytest.mark.parametrize("kind", ["normal", "special"])
def test_every_way_of_reducing(monkeypatch, path, kind):
    monkeypatch.setattr(selection, "SMALL", 0)
    monkeypatch.setattr(reductions, "_reduce_at_once", getattr(reductions, path))
    x = jnp.asarray(entries(kind, np.random.default_rng(8), (45, 51)), jnp.float32)
    masks, _ = jax.jit(lambda x: top_k_masks(x, (230, 459)))(x)
    for mask, count in zip(masks, (230, 459), strict=True):
        np.testing.assert_array_equal(np.asarray(mask), oracle(x, count))


@pytest.mark.parametrize(("shape", "count"), [((4, 4), 8), ((5,), 2), ((8, 8), 6)])
def test_every_tie_and_every_pair_of_ties_is_kept_as_often(shape, count):
    """Within five standard deviations of the probabilities of a uniform choice."""
    keys, size = 4000, math.prod(shape)
    one = lambda key: tk.Unstructured().top(jnp.zeros(shape), [count], ties=key)[0][0]  # noqa: E731
    kept = np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(0), keys)))
    kept = kept.reshape(keys, size).astype(np.float64)
    assert np.all(kept.sum(1) == count)
    alone = count / size
    deviation = np.sqrt(alone * (1 - alone) / keys)
    np.testing.assert_allclose(kept.mean(0), alone, atol=5 * deviation)
    together = (kept.T @ kept / keys)[~np.eye(size, dtype=bool)]
    # The order is a cheap hash: pairs are less even, but none is excluded or twice as frequent.
    pair = alone * (count - 1) / (size - 1)
    assert 0.2 * pair < together.min() <= together.max() < 2.5 * pair


@pytest.mark.parametrize("kind", ["ties", "nan"])
def test_large_leaves_look_at_one_tie_first(monkeypatch, kind):
    monkeypatch.setattr(selection, "SMALL", 0)
    monkeypatch.setattr(selection, "_LARGE", 1)
    x = jnp.asarray(entries(kind, np.random.default_rng(11), (9, 10)), jnp.float32)
    select = jax.jit(lambda x, a, b: top_k_masks(x, (a, b))[0])
    twice = x.at[4, 5].set(x[2, 2]).at[8, 1].set(-x[2, 2])
    for leaf in (x, twice):
        for low in (1, 2, 8, 44, 45, 46, 88):
            for mask, count in zip(select(leaf, low, low + 1), (low, low + 1), strict=True):
                np.testing.assert_array_equal(np.asarray(mask), oracle(leaf, count))


def test_one_device_takes_the_fast_path():
    code = """
import jax, numpy as np
import topkast_jax as tk
from topkast_jax import reductions, selection
flat, calls = reductions._reduce_flat, []
reductions._reduce_flat = lambda *a, **k: (calls.append(1), flat(*a, **k))[1]
x = np.random.default_rng(9).normal(size=(200, 211)).astype(np.float32)
(mask,), _ = jax.jit(lambda x: selection.top_k_masks(x, (4220,)))(x)
best = np.argsort(-np.abs(x).ravel(), kind="stable")[:4220]
assert calls and np.array_equal(np.flatnonzero(mask), np.sort(best))
"""
    root = Path(selection.__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=one_device(), cwd=root, timeout=120
    )


def test_few_passes_whatever_the_data(monkeypatch):
    monkeypatch.setattr(selection, "SMALL", 0)
    passes = []
    shrink = selection._shrink

    def counted(*args):
        jax.debug.callback(lambda: passes.append(1))
        return shrink(*args)

    monkeypatch.setattr(selection, "_shrink", counted)
    select = jax.jit(lambda x: thresholds(x, (410, 819)))
    for kind in KINDS:
        x = jnp.asarray(entries(kind, np.random.default_rng(10), (64, 64)), jnp.float32)
        passes.clear()
        jax.block_until_ready(select(x))
        jax.effects_barrier()
        assert 0 < len(passes) <= 32 + 13, (
            kind
        )  # one halving a pass of the keys, then of the indices


@settings(max_examples=30, deadline=None)
@given(
    ties=st.lists(st.integers(0, 300), min_size=4, max_size=4),
    above=st.integers(0, 5),
    share=st.floats(0, 1),
)
def test_ties_over_all_leaves_are_shared_out_in_proportion(ties, above, share):
    leaves = {str(i): np.zeros(301, np.float32) for i in range(4)}
    for number, x in zip(ties, leaves.values(), strict=True):
        x[:number] = 1
    leaves["2"][-above:] += 2 * (above > 0) * (leaves["2"][-above:] == 0)
    above = int(np.sum(leaves["2"] == 2))
    left = round(share * sum(ties))
    if above + left == 0:
        return
    found = global_counts(leaves, jnp.int32(above + left))
    parts = np.array([int(found[name]) for name in leaves]) - [0, 0, above, 0]
    assert parts.sum() == left
    assert np.all((parts >= 0) & (parts <= ties))
    np.testing.assert_allclose(parts, np.array(ties) * left / max(sum(ties), 1), atol=1.001)


global_counts = jax.jit(selection.counts_of_global_top_k)


def test_one_ranking_in_each_member_of_a_shard_map():
    members = {"a": jnp.arange(12.0).reshape(2, 6), "b": jnp.ones((2, 5))}

    def counts(leaves):
        found = selection.counts_of_global_top_k({n: x[0] for n, x in leaves.items()}, 4)
        return jnp.stack(list(found.values()))[None]

    mesh = jax.make_mesh(
        (2,), ("member",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    spec = PartitionSpec("member")
    found = jax.jit(jax.shard_map(counts, mesh=mesh, in_specs=spec, out_specs=spec))(members)
    np.testing.assert_array_equal(found, [[4, 0], [4, 0]])


def test_as_many_ties_as_there_can_be():
    """Where float32 rounds the numbers of entries."""
    parts = jnp.array([2**30, 0, 2**30 - 2, 1], jnp.int32)
    for wanted in (0, 1, 2**30 + 1, 2**31 - 1):
        found = np.asarray(jax.jit(selection._in_proportion)(jnp.int32(wanted), parts))
        assert found.astype(np.int64).sum() == wanted
        assert np.all((found >= 0) & (found <= parts))
        assert abs(int(found[0]) - wanted / 2) < 2**8


@pytest.mark.parametrize(
    ("x", "count", "message"),
    [
        (jnp.zeros(3, jnp.int32), 1, "dtype int32"),
        (jnp.zeros(3), 0, "count 0"),
        (jnp.zeros(3), 4, "count 4"),
        (jnp.zeros(3), np.int64(4), "count np.int64.4.; allowed: integers, 1 to 3"),
        (jnp.zeros(3), 1.5, "count 1.5"),
        (jnp.zeros(3), jnp.float32(1), "count Array"),
        (jnp.zeros((0, 3)), 1, "0 entries"),
    ],
)
def test_mistakes_are_named(x, count, message):
    with pytest.raises(SparsityError, match=message):
        thresholds(x, (count,))


def test_counts_that_are_none():
    with pytest.raises(SparsityError, match="no counts; must be at least one"):
        top_k_masks(jnp.zeros(3), ())


@pytest.mark.parametrize("count", [7, -1])
def test_a_concrete_array_is_a_count_within_the_leaf(count):
    with pytest.raises(SparsityError, match=f"count Array.{count}.*integers, 1 to 6"):
        top_k_masks(jnp.ones(6), (jnp.int32(count),))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.float8_e4m3fn])
def test_leaves_that_no_ranking_takes(dtype):
    with pytest.raises(SparsityError, match="selection: dtype .*; allowed: float32, bfloat16"):
        counts_of_global_top_k({"a": jnp.ones(4, dtype), "b": jnp.ones(2, dtype)}, 1)


@pytest.mark.parametrize("count", [0, 7, np.int64(7), 1.5])
def test_a_count_over_all_leaves_is_checked(count):
    with pytest.raises(SparsityError, match="count .*; allowed: integers, 1 to 6"):
        counts_of_global_top_k({"a": jnp.ones(4), "b": jnp.ones(2)}, count)


def test_a_leaf_too_large_for_its_indices_is_refused():
    with pytest.raises(SparsityError, match="4294967296 entries"):
        jax.eval_shape(lambda x: thresholds(x, (1,)), jax.ShapeDtypeStruct((2**16, 2**16), "f4"))
