"""What once stopped with a raw error, and what a mistake is told in one line."""

import functools
import importlib.metadata
import inspect

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import topkast_jax as tk
from topkast_jax.always_sparse import AlwaysSparse
from topkast_jax.inner_state import map_parameter_shaped
from topkast_jax.methods.rigl import RigL
from topkast_jax.ranking import TieOrder
from topkast_jax.selection import MOST_ENTRIES

EVERYTHING = [(".*", tk.Sparse())]


def top_kast(inner, **options):
    return tk.top_kast(inner, 0.1, 0.2, **{"refresh_every": 1, "rules": EVERYTHING, **options})


def normal(shape=(8, 10), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


# 1. Programs do not grow by the leaf.


@pytest.mark.parametrize("of", ["init", "update"])
def test_leaves_of_one_shape_share_few_selections(of):
    tx = top_kast(optax.sgd(0.1))

    def selections(leaves):
        params = {f"layer_{i}": {"kernel": normal((4, 4))} for i in range(leaves)}
        if of == "init":
            jaxpr = jax.make_jaxpr(tx.init)(params)
        else:
            jaxpr = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params), params)
        return sum(str(jaxpr).count(f"{loop}[") for loop in ("while", "scan"))

    # Twelve leaves in three equal parts of four, which a compiler compiles once.
    assert 0 < selections(12) == 3 * selections(2)


# 2. Large leaves.


@pytest.mark.parametrize(
    "make",
    [
        top_kast,
        functools.partial(top_kast, pattern=tk.Block(128, 128)),
        lambda inner: tk.static_random(inner, 0.1, 0, rules=EVERYTHING),
    ],
)
@pytest.mark.parametrize("shape", [(262144, 5376), (3, 2**15, 2**15 + 2**14 + 128)])
def test_a_leaf_of_a_billion_entries(make, shape):
    """Gemma 3 27B's embedding, and more than 2**31 entries in three stacked layers."""
    params = {"embedding": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    options = {"rules": [(".*", tk.Sparse(stacked=0))]} if len(shape) == 3 else {}
    tx = functools.partial(tk.top_kast, forward_density=0.1, backward_density=0.2)
    tx = make(optax.sgd(0.1)) if not options else tx(optax.sgd(0.1), **options)

    def step(params):
        state = tx.init(params)
        updates, state = tx.update(tk.forward_params(params, state), state, params)
        return updates, tk.keep_masks(params, state), tk.statistics.mask_statistics(params, state)

    updates, masks, _ = jax.eval_shape(step, params)
    assert updates["embedding"].shape == masks[0]["embedding"].shape == shape


@pytest.mark.parametrize("pattern", [tk.Unstructured(), tk.Block(128, 128)])
def test_a_leaf_beyond_the_limit_is_named(pattern):
    params = {"embedding": jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)}
    message = rf"embedding: a layer of {2**31} entries; allowed: 1 to {MOST_ENTRIES}"
    with pytest.raises(tk.SparsityError, match=message):
        jax.eval_shape(top_kast(optax.sgd(0.1), pattern=pattern).init, params)


@pytest.mark.parametrize("size", [1, 2, 1000, 4097])
def test_the_random_order_of_ties_is_a_permutation(size):
    order = TieOrder(size, jnp.uint32(12345))
    places = np.asarray(order.position(jnp.arange(order.end, dtype=jnp.int32)))
    np.testing.assert_array_equal(np.sort(places), np.arange(order.end))


def test_the_random_order_of_ties_beyond_a_billion_entries():
    order = TieOrder(MOST_ENTRIES, jnp.uint32(12345))
    index = jnp.array([0, 2**30 - 1, 2**30, MOST_ENTRIES - 1], jnp.int32)
    places = np.asarray(order.position(index))
    assert np.all((places >= 0) & (places < order.end))
    np.testing.assert_array_equal(places[2:], index[2:])
    assert np.all(places[:2] < 2**30)


# 5. Strict promotion; the rank's is set for all tests in conftest.py.

STRICT = {
    "top_kast": top_kast,
    "l1": functools.partial(top_kast, exploration_norm="l1", refresh_every=2),
    "reset": functools.partial(top_kast, inner_state="reset", stop_exploring_at=2),
    "blocks": functools.partial(top_kast, pattern=tk.Block(4, 2)),
    "stacked": functools.partial(top_kast, rules=[(".*", tk.Sparse(stacked=1))]),
    "injected": lambda inner: optax.inject_hyperparams(tk.top_kast)(inner, 0.1, 0.2),
    "static_random": lambda inner: tk.static_random(inner, 0.1, 3),
    "set": lambda inner: tk.methods.set_evolution(inner, 0.1, 1, last_choice_at=9),
    "rigl": lambda inner: tk.methods.rigl(inner, 0.1, 2, last_choice_at=9, skips_update=True),
    "snfs": lambda inner: tk.methods.snfs(inner, 0.1, 1, last_choice_at=9),
    "srigl": lambda inner: tk.methods.srigl(inner, 0.1, 1, last_choice_at=9),
    "snip": lambda inner: tk.methods.snip(inner, 0.1),
    "dnw": lambda inner: tk.methods.dnw(inner, 0.1),
    "pruning": lambda inner: tk.methods.pruning(inner, 0.1, 1, 9, 1),
    "pruning_global": lambda inner: tk.methods.pruning(inner, 0.1, 1, 9, 1, ranking="global"),
}


@pytest.mark.parametrize("make", STRICT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_nothing_is_promoted(make, dtype):
    tx = STRICT[make](optax.sgd(0.1, momentum=0.9))

    def step(params):
        state = tx.init(params)
        loss, grads = tk.value_and_grad(lambda p: jnp.sum(p["w"]))(params, state)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return loss, tk.statistics.mask_statistics(params, state), tk.keep_masks(params, state)

    with (
        jax.enable_x64(dtype == "float64"),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        jax.eval_shape(step, {"w": jax.ShapeDtypeStruct((8, 12), dtype)})


def test_nothing_is_promoted_always_sparse_or_globally():
    with jax.numpy_dtype_promotion("strict"):
        params = {"w": normal()}
        sparse = AlwaysSparse(top_kast(optax.sgd(0.1, momentum=0.9)), params)
        values, state, reservoir = sparse.start(params)
        updates, state = sparse.transform.update(values, state, values)
        values = optax.apply_updates(values, updates)
        values, state, reservoir = sparse.refresh(1, values, state, reservoir)
        counts = tk.statistics.leaf_counts(*sparse.masks(reservoir))
        assert counts["w"].forward == 8
        jax.eval_shape(lambda x: tk.counts_of_global_top_k({"a": x, "b": x}, 5), params["w"])


# 6. Stacked axes.


@pytest.mark.parametrize(
    ("stacked", "axes", "static"),
    [
        (0, (0,), False),
        (1, (1,), False),
        (-1, (2,), False),
        ((-1, 0), (2, 0), False),
        (1, (1,), True),
    ],
)
def test_stacked_axes_number_separate_layers(stacked, axes, static):
    theta = normal((3, 4, 5)) * jnp.arange(1.0, 61).reshape(3, 4, 5)
    rules = [(".*", tk.Sparse(stacked=stacked))]
    tx = (
        tk.static_random(optax.sgd(0.1), 0.2, 0, rules=rules)
        if static
        else tk.top_kast(optax.sgd(0.1), 0.2, 0.4, rules=rules)
    )
    kept = np.asarray(tk.keep_masks(theta, tx.init(theta))[0])
    rest = [axis for axis in range(3) if axis not in axes]
    to_layers = lambda x: np.transpose(x, (*axes, *rest)).reshape(  # noqa: E731
        -1, *(theta.shape[axis] for axis in rest)
    )
    layers = list(zip(to_layers(np.asarray(theta)), to_layers(kept), strict=True))
    for layer, mask in layers:
        assert mask.sum() == oracle.keep_count(layer.size, 0.2)
        if not static:
            np.testing.assert_array_equal(mask, oracle.select(layer, 0.2))
    if static:
        assert any(np.any(mask != layers[0][1]) for _, mask in layers)


def test_a_leaf_that_is_not_stacked_is_one_layer():
    theta = normal((3, 4, 5)) * jnp.array([1.0, 10.0, 100.0]).reshape(3, 1, 1)
    for rules in (None, EVERYTHING, [(".*", tk.Sparse(stacked=None))]):
        tx = tk.top_kast(optax.sgd(0.1), 0.2, 0.4, rules=rules)
        kept = tk.keep_masks(theta, tx.init(theta))[0]
        np.testing.assert_array_equal(kept, oracle.select(np.asarray(theta), 0.2))


@pytest.mark.parametrize("stacked", [3, -4, (0, 0), (0, -3), (0, 1, 2)])
def test_stacked_axes_that_are_not_there(stacked):
    tx = top_kast(optax.sgd(0.1), rules=[(".*", tk.Sparse(stacked=stacked))])
    with pytest.raises(tk.SparsityError, match="w: stacked=.* must name different axes of"):
        tx.init({"w": jnp.ones((3, 4, 5))})


@pytest.mark.parametrize("stacked", [1.0, "0", True, [0], (0, None)])
def test_stacked_must_be_whole_numbers(stacked):
    with pytest.raises(tk.SparsityError, match="stacked=.*: must be an axis, several, or None"):
        tk.Sparse(stacked=stacked)


def test_whole_numbers_may_be_numpys():
    spec = tk.Sparse(stacked=np.int64(0), pattern=tk.Block(np.int64(4), np.int8(2)))
    assert spec == tk.Sparse(stacked=0, pattern=tk.Block(4, 2))
    assert repr(spec) == repr(tk.Sparse(stacked=0, pattern=tk.Block(4, 2)))
    assert repr(tk.NOfM(np.int32(1), np.int32(4))) == repr(tk.NOfM(1, 4))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tk.methods.pruning, {"begin_at": 1, "end_at": 5}),
        (tk.methods.rigl, {"last_choice_at": 5, "refresh_every": 2}),
    ],
)
def test_steps_that_are_hyperparameters(make, options):
    params = {"w": normal()}
    plain, injected = (
        made(optax.sgd(0.1), forward_density=0.2, **options).init(params)
        for made in (make, optax.inject_hyperparams(make))
    )
    wanted, found = (tk.keep_masks(params, state)[0] for state in (plain, injected))
    np.testing.assert_array_equal(found["w"], wanted["w"])
    name = next(iter(options))
    refused(lambda: make(optax.sgd(0.1), 0.2, **options | {name: jnp.int32(-1)}), f"{name}=.*-1")


# 7. Serialization, and seeds that are traced.


@pytest.mark.parametrize("make", [top_kast, lambda i: tk.static_random(i, 0.1, 3)])
def test_a_masked_state_through_flax_serialization(make):
    params = {"w": normal(), "x": normal(seed=1)}
    tx = make(optax.adam(1e-2))
    _, state = tx.update(params, tx.init(params), params)
    other = tx.init(jax.tree.map(lambda x: -x[::-1], params))
    read = flax.serialization.from_bytes(other, flax.serialization.to_bytes(state))
    assert jax.tree.structure(read) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, read, state)
    jax.tree.map(np.testing.assert_array_equal, tx.update(params, read, params)[0],
                 tx.update(params, state, params)[0])  # fmt: skip


def test_an_always_sparse_state_through_flax_serialization():
    params = {"w": np.asarray(normal()), "b": np.zeros(10, np.float32)}
    rules = [("w", tk.Sparse()), (".*", tk.Dense())]
    sparse = AlwaysSparse(top_kast(optax.adam(1e-2), rules=rules), params)
    values, state, _ = sparse.start(params)
    _, state = sparse.transform.update(values, state, values)
    _, other, _ = sparse.start({"w": params["w"][::-1].copy(), "b": params["b"]})
    read = flax.serialization.from_bytes(other, flax.serialization.to_bytes(state))
    assert jax.tree.structure(read) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, read, state)
    view = tk.forward_params(values, read)
    read_view = flax.serialization.from_bytes(view, flax.serialization.to_bytes(view))
    jax.tree.map(np.testing.assert_array_equal, read_view, view)


def test_members_of_an_ensemble_have_masks_of_their_own_seeds():
    theta = normal()

    def mask(seed):
        return tk.keep_masks(theta, tk.static_random(optax.sgd(0.1), 0.1, seed).init(theta))[0]

    masks = np.asarray(jax.jit(jax.vmap(mask))(jnp.arange(3)))
    for seed in range(3):
        np.testing.assert_array_equal(masks[seed], mask(seed))
        assert masks[seed].sum() == 8
        assert seed == 0 or np.any(masks[seed] != masks[0])


# 8. Messages.


def refused(make, message):
    with pytest.raises(tk.SparsityError, match=message) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 250, text


class FirstChoice(RigL):
    first_choice = "first"


SGD = optax.sgd(0.1)
AT_THE_CALL = {
    "an optimizer that is not called": (
        lambda: tk.top_kast(optax.adam, 0.1, 0.2),
        r"inner=adam: must be an optax optimizer; call it, as in optax.adam\(…\)"),
    "static_random around one": (
        lambda: tk.static_random(optax.adam, 0.1, 3), "inner=adam: .*call it"),
    "parameters in place of the optimizer": (
        lambda: tk.top_kast({"w": np.ones((99, 99))}, 0.1, 0.2), "inner={'w': array.*must be an"),
    "a pattern that is not made": (
        lambda: top_kast(SGD, pattern=tk.Block), "pattern=<class .*Block.*must be Unstructured"),
    "such a pattern in a rule": (
        lambda: tk.Sparse(pattern=tk.Block), "pattern=<class .*Block.*must be Unstructured"),
    "a pattern by name": (lambda: top_kast(SGD, pattern="block"), "pattern='block': must be"),
    "a callable density": (
        lambda: tk.top_kast(SGD, lambda step: 0.1, 0.2), r"forward_density=<function.*\(0, 1\]"),
    "a density as text": (lambda: tk.top_kast(SGD, "0.1", 0.2), "forward_density='0.1'"),
    "a backward density of a list": (
        lambda: tk.top_kast(SGD, 0.1, [0.2]), r"backward_density=\[0.2\]: must be a number"),
    "an array of densities": (
        lambda: tk.top_kast(SGD, jnp.ones(1000), 1.0), "forward_density=.*must be a number"),
    "percent": (lambda: tk.top_kast(SGD, 10, 20), r"forward_density=10: must be a number in"),
    "densities that are swapped": (
        lambda: tk.top_kast(SGD, 0.2, 0.1), "backward_density=0.1 is below forward_density=0.2"),
    "a callable period": (
        lambda: top_kast(SGD, refresh_every=lambda step: 10), "refresh_every=<function.*integer"),
    "a period beyond int32": (
        lambda: top_kast(SGD, refresh_every=2**31), "refresh_every=2147483648: .*below 2"),
    "an infinite weight": (
        lambda: top_kast(SGD, exploration_weight=float("inf")), "=inf: must be a finite number"),
    "a period as text": (lambda: top_kast(SGD, refresh_every="10"), "refresh_every='10'"),
    "a stop as text": (lambda: top_kast(SGD, stop_exploring_at="end"), "stop_exploring_at='end'"),
    "a callable weight": (
        lambda: top_kast(SGD, exploration_weight=lambda step: 1e-4),
        "exploration_weight=<function.*; a schedule goes through optax.inject_hyperparams"),
    "a weight as text": (
        lambda: top_kast(SGD, exploration_weight="1e-4"), "exploration_weight='1e-4'"),
    "rules as a dict": (
        lambda: top_kast(SGD, rules={".*": tk.Sparse()}), "rules={'.*must be a list of"),
    "rules as text": (lambda: top_kast(SGD, rules=".*"), r"rules='\.\*': must be a list of"),
    "rules as a spec": (lambda: top_kast(SGD, rules=tk.Sparse()), "rules=Sparse.*must be a list"),
    "rules of lists": (
        lambda: top_kast(SGD, rules=[[".*", tk.Sparse()]]), "rule .*must be a list of"),
    "a rule in place of rules": (
        lambda: top_kast(SGD, rules=(".*", tk.Sparse())), r"rule '\.\*': must be a list of"),
    "a spec that is not made": (
        lambda: top_kast(SGD, rules=[(".*", tk.Sparse)]), "rule .*must be a list of"),
    "a rule that is no expression": (
        lambda: top_kast(SGD, rules=[("(", tk.Sparse())]), "is no regular expression"),
    "a repetition beyond what Python counts": (
        lambda: top_kast(SGD, rules=[("a{99999999999999}", tk.Sparse())]), "no regular expression"),
    "a density that is complex": (
        lambda: tk.top_kast(SGD, np.complex64(0.1), 0.2), "forward_density=np.complex64.*a number"),
    "an array of text": (
        lambda: tk.top_kast(SGD, np.array("a"), 0.2), "forward_density=array.*must be a number"),
    "a density beyond every float": (
        lambda: tk.top_kast(SGD, 10**400, 1.0), "forward_density=1000.*must be a number"),
    "a block of a fraction": (lambda: tk.Block(np.float32(4), 4), "Block rows=np.*an integer"),
    "a switch as text": (
        lambda: tk.methods.rigl(SGD, 0.1, skips_update="no"), "skips_update='no': must be True or"),
    "steps that are all skipped": (
        lambda: tk.methods.rigl(SGD, 0.1, 1, skips_update=True), "refresh_every=1: .*at least 2"),
    "a backward density as text, in a rule of a method without one": (
        lambda: tk.static_random(SGD, 0.1, 0, rules=[(".*", tk.Sparse(backward_density="20%"))])
        .init({"w": np.ones((8, 8))}), "w: backward_density='20%': must be a number"),
    "a number of a method beyond what a state holds": (
        lambda: tk.sparsify(SGD, RigL(last_choice_at=2**40), forward_density=0.1)
        .init({"w": np.ones((8, 8))}), "RigL.last_choice_at=1099511627776: must be an int32"),
    "a first choice that is none": (
        lambda: tk.sparsify(SGD, FirstChoice(), forward_density=0.1), "first_choice='first': must"),
    "a table of an optimizer that is not called": (
        lambda: tk.describe({"w": np.ones((8, 8))}, optax.adam), "tx=adam: .*call it"),
    "a seed that is a density": (
        lambda: tk.static_random(SGD, 0.1, 0.2), "seed=0.2: must be an integer"),
    "a method that is not made": (
        lambda: tk.sparsify(SGD, tk.Method, forward_density=0.1), "method=<class.*must be a"),
    "always sparse around another optimizer": (
        lambda: AlwaysSparse(SGD, {"w": jnp.ones((8, 8))}), "always sparse needs what top_kast"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", AT_THE_CALL)
def test_a_mistake_is_told_at_the_call(mistake):
    refused(*AT_THE_CALL[mistake])


def test_swapped_arguments_of_update_and_views():
    tx = top_kast(SGD)
    params = {"w": jnp.ones((64, 64))}
    state = tx.init(params)
    wanted = r"update\(grads, state, params\): state is a dict, must be what init"
    refused(lambda: tx.update(params, params, state), wanted)
    refused(lambda: tx.update(state, params, params), wanted)
    refused(lambda: tx.update(state, state, params), "update: grads must have the structure of")
    refused(lambda: tx.update(params, state, state), "update: grads must have the structure of")
    refused(lambda: tx.update(params, state), r"update needs the parameters: tx.update\(grads,")
    refused(lambda: tx.update({"v": params["w"]}, state, params), "missing: w; unknown: v")
    refused(lambda: tk.forward_params(state, params), "holds no sparsity state")
    refused(lambda: tk.keep_masks(params, optax.adam(0.1).init(params)), "holds no sparsity state")
    refused(lambda: tk.statistics.leaf_counts(state), "found an optimizer state in place of")
    refused(lambda: tk.describe(params, SGD), "holds no sparsity method")
    wrong = {"w": jnp.ones((64, 63))}
    shapes = r"grads: w must have the shape \(64, 64\) of the parameter, found \(64, 63\)"
    refused(lambda: tx.update(wrong, state, params), shapes)


@pytest.mark.parametrize("leaf", ["relu", "float32", jnp.float32, jax.nn.relu, np.array("a")])
def test_a_leaf_that_is_no_array_is_named(leaf):
    params = {"w": jnp.ones((8, 8)), "layer": {"activation": leaf}}
    for rules in (None, EVERYTHING):
        tx = top_kast(SGD, rules=rules)
        refused(lambda tx=tx: tx.init(params), "layer/activation=.*must be an array; take the")
        refused(lambda tx=tx: tk.describe(params, tx), "layer/activation=.*must be an array")


def test_a_state_that_does_not_follow_the_parameters_is_not_reset():
    params = {"w": normal(), "b": jnp.zeros(10)}
    rules = [("w", tk.Sparse()), (".*", tk.Dense())]
    flat = optax.flatten(optax.adam(0.1))
    tx = top_kast(flat, rules=rules, inner_state="reset")
    refused(lambda: tx.init(params), r"state\[0\].mu holds all 90 parameter entries in one row")
    kept = top_kast(flat, rules=rules)
    jax.eval_shape(kept.update, params, kept.init(params), params)


@pytest.mark.parametrize("shape", [(8, 10), (10,), (10, 1)])
def test_other_states_that_hold_more_than_moments_are_not_refused(shape):
    params = {"w": jnp.ones(shape), "b": jnp.zeros(10)}
    factored = optax.adafactor(0.1, min_dim_size_to_factor=8)
    for inner in (factored, optax.noisy_sgd(0.1, key=0), optax.lbfgs(0.1), optax.sm3(0.1)):
        map_parameter_shaped(lambda x: x, inner.init(params), params)
    vector = {"w": jnp.ones(10)}  # its own entries in one row
    map_parameter_shaped(lambda x: x, optax.flatten(optax.adam(0.1)).init(vector), vector)


# 9. Descriptions.


def test_the_hyperparameters_at_the_first_step_are_described():
    """Without an array of the size of the parameters, which would not fit into memory."""
    params = {
        "w": jax.ShapeDtypeStruct((2**15, 2**15), jnp.float32),
        "stack": jax.ShapeDtypeStruct((3, 8, 10), jnp.float32),
        "b": jnp.zeros(10),
        "count": 0,
    }
    rules = [("w", tk.Sparse()), ("stack", tk.Sparse(stacked=0)), (".*", tk.Dense())]
    falling = optax.linear_schedule(0.5, 0.1, 10)
    tx = optax.inject_hyperparams(tk.top_kast)(SGD, 0.1, falling, rules=rules)
    plain = tk.describe(params, tk.top_kast(SGD, 0.1, 0.5, rules=rules))
    assert tk.describe(params, tx) == plain
    assert tk.describe(params, optax.chain(optax.clip(1.0), tx)) == plain
    assert "stack  (3, 8, 10)      Unstructured()      0.1       0.5         24" in plain


def test_the_version(monkeypatch):
    assert tk.__version__.split(".")[0].isdigit()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    # As where the project's folder is on the PYTHONPATH and nothing is installed.
    monkeypatch.setattr(importlib.metadata, "version", missing)
    source = inspect.getsource(tk)
    exec(compile(source, "topkast_jax", "exec"), found := {})
    assert found["__version__"] == "0+source"
