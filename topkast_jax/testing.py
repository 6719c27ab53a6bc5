"""The conformance suite of sparsity methods, as a function to call in your own tests.

    def test_my_method():
        tk.testing.check_method(lambda inner: my_method(inner, forward_density=0.1))

It holds a method to what optax's own tests hold an optimizer to, and to what `topkast_jax.sparsify`
promises about sets. Flax, Equinox and Orbax are tried where they are installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast_jax.description import decided_leaves
from topkast_jax.method import Leaf, allocates
from topkast_jax.sets import NOT_DUE, SparsifyState, find_states, forward_params, keep_masks
from topkast_jax.sparsify import SparseTransform
from topkast_jax.trees import flatten_with_names

Factory = Callable[[optax.GradientTransformation], optax.GradientTransformation]
Params = Any

_STEPS = 5

INNERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "lamb": lambda: optax.lamb(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "scheduled": lambda: optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.1, 0.01, 10)),
    "noisy": lambda: optax.noisy_sgd(0.1, key=0),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(0.1),
}


def check_method(factory: Factory, *, params: Params = None, checks: Sequence[str] = ()) -> None:
    """Raises AssertionError unless a sparsity method keeps what every method must keep.

    The checks: exact counts, A ⊆ B, whole units, and a reservoir that keeps its bits around every
    kind of inner optimizer and inside every wrapper; no second compilation; jit, scan, cond, vmap
    over an ensemble, shard_map and explicit and automatic meshes (over the devices there are);
    stable types, shapes and shardings of the state; low precision; extra arguments; derivatives
    through the update; `optax.tree.map_params`; checkpoints; trees of dicts, Flax NNX, Flax linen
    and Equinox.

    Args:
      factory: `factory(inner)` returns the transformation around an optax optimizer.
      params: a dict of floating leaves to train, for a method whose rules or pattern do not fit the
        default: kernels of shapes (16, 24) and (24, 8) and a bias.
      checks: names of the checks to run, without the "check_" of their functions here; all if
        empty.

    Raises:
      AssertionError: a check failed; the message names it.
      ValueError: an unknown check.
    """
    unknown = set(checks) - set(CHECKS)
    if unknown:
        raise ValueError(f"checks: unknown {sorted(unknown)}; there are: {', '.join(CHECKS)}")
    start = example() if params is None else params
    for name in checks or CHECKS:
        try:
            CHECKS[name](factory, start)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def example(dtype: Any = jnp.float32) -> Params:
    """Parameters that most patterns divide: two kernels and a bias."""
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "in": {"kernel": jax.random.normal(keys[0], (16, 24), dtype), "bias": jnp.zeros(24, dtype)},
        "out": {"kernel": jax.random.normal(keys[1], (24, 8), dtype)},
    }


def gradient(view: Params) -> Params:
    """A gradient that differs from entry to entry and is not zero where an entry is."""

    def one(x: jax.Array) -> jax.Array:
        weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
        return (jnp.sin(3 * x.astype(jnp.float32)) + 0.3 * weights).astype(x.dtype)

    return jax.tree.map(one, view)


def step_of(tx: optax.GradientTransformation) -> Callable[[Params, Any], tuple[Params, Any]]:
    """One step of training on `gradient`, not compiled."""

    def step(params: Params, state: Any) -> tuple[Params, Any]:
        grads = gradient(forward_params(params, state))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx: optax.GradientTransformation, params: Params, steps: int = _STEPS) -> list[Any]:
    """(parameters, state) before the first step and after each, compiled once."""
    step: Any = jax.jit(step_of(tx))
    history = [(params, tx.init(params))]
    for _ in range(steps):
        history.append(step(*history[-1]))
    assert step._cache_size() == 1, "the step compiled again"
    return history


def leaves_of(tx: optax.GradientTransformation, params: Params) -> dict[str, Leaf]:
    """The sparse leaves that a transformation decides on, wherever in it the method sits."""
    decided = decided_leaves(params, tx)
    return {name: leaf for leaves in decided for name, leaf in leaves.items() if leaf is not None}


def check_history(
    tx: optax.GradientTransformation, history: list[Any], *, exact: bool = True, kept: bool = True
) -> None:
    """Exact counts, A ⊆ B, whole units, dense leaves whole, a reservoir that keeps its bits.

    Args:
      tx: what made the history.
      history: what `train` returns.
      exact: whether each set must have the size that the densities say.
      kept: whether entries outside B must keep their bits; False where a member of a chain outside
        the wrapper moves them.
    """
    leaves = leaves_of(tx, history[0][0])
    assert leaves, "no leaf is sparse"
    for t, ((old, state), (new, _)) in enumerate(itertools.pairwise(history)):
        forward, backward = (_by_name(mask) for mask in _masks(old, _alone(state)))
        before, after = _by_name(old), _by_name(new)
        settled = all(int(s.due) == NOT_DUE for s in find_states(state)) or t > 0
        for name, theta in before.items():
            a, b = np.asarray(forward[name]), np.asarray(backward[name])
            assert not np.any(a & ~b), f"{name}, step {t}: A is not inside B"
            if name not in leaves:
                assert a.all(), f"{name}, step {t}: a dense leaf is not whole"
                continue
            leaf = leaves[name]
            for which, mask, count in zip(("A", "B"), (a, b), leaf.counts, strict=True):
                _check_units(leaf, mask, f"{name}, step {t}: {which}")
                wanted = leaf.entries_in(int(count))
                sizes = {wanted} if which == "A" else {wanted, int(a.sum())}  # B := A in the end
                if exact and settled:
                    found = int(mask.sum())
                    assert found in sizes, f"{name}, step {t}: {which} has {found} of {sizes}"
            if kept and settled:
                later = np.asarray(after[name])
                same = np.asarray(theta)[~b].tobytes() == later[~b].tobytes()
                assert same, f"{name}, step {t}: entries outside B have moved"
    first, last = (_by_name(params) for params in (history[0][0], history[-1][0]))
    for name in leaves:
        assert np.all(np.isfinite(np.asarray(last[name], np.float32))), f"{name} is not finite"
        assert np.any(np.asarray(first[name]) != np.asarray(last[name])), f"{name} does not train"


_masks = jax.jit(keep_masks)


def _alone(state: Any) -> list[SparsifyState]:
    """The sparsity states in an optimizer's, without inner states: of equal types in all checks."""
    return [found._replace(inner_state=()) for found in find_states(state)]


def _check_units(leaf: Leaf, mask: np.ndarray, where: str) -> None:
    layers = np.moveaxis(mask, leaf.axes, range(len(leaf.axes))).reshape(-1, *leaf.shape)
    for layer in layers:
        x = jnp.asarray(layer, jnp.float32)
        units = leaf.pattern.magnitudes(x) > 0
        whole = np.asarray(leaf.pattern.expand(units, leaf.shape))
        assert np.array_equal(whole, layer), f"{where} keeps a part of a unit"


def _by_name(tree: Params) -> dict[str, Any]:
    names, leaves, _ = flatten_with_names(tree)
    return dict(zip(names, leaves, strict=True))


def _has_fixed_counts(tx: Any, params: Params) -> bool:
    """Whether the sets keep the sizes that the densities give at every choice."""
    if isinstance(tx, SparseTransform):
        return not allocates(tx.plan.method)
    states = find_states(jax.eval_shape(tx.init, params))
    return not any(allocates(state.chooser.method) for state in states)


def check_inner_optimizers(factory: Factory, params: Params) -> None:
    """Around every kind of inner optimizer."""
    for name, make in INNERS.items():
        tx = factory(make())
        try:
            check_history(tx, train(tx, params), exact=_has_fixed_counts(tx, params))
        except AssertionError as error:
            raise AssertionError(f"around {name}: {error}") from error


def check_wrappers(factory: Factory, params: Params) -> None:
    """Inside every kind of wrapper, and with members of a chain before and after it."""
    tx = factory(optax.sgd(0.1, momentum=0.9))
    exact = _has_fixed_counts(tx, params)
    sparse = leaves_of(tx, params)
    label = {name: "a" if name in sparse else "b" for name in _by_name(params)}
    names, _, treedef = flatten_with_names(params)
    labels = treedef.unflatten([label[name] for name in names])
    is_sparse = jax.tree.map(lambda x: x == "a", labels)
    rest = jax.tree.map(lambda x: not x, is_sparse)
    wrappers: dict[str, tuple[Any, bool]] = {
        "a chain before": (optax.chain(optax.clip_by_global_norm(1.0), tx), True),
        "a scaling after": (
            optax.chain(factory(optax.scale_by_adam()), optax.scale(-1e-2)), True
        ),
        "a decay after": (
            optax.chain(
                factory(optax.scale_by_adam()),
                optax.add_decayed_weights(1e-2),
                optax.scale(-1e-2),
            ),
            False,
        ),
        "masked": (
            optax.chain(optax.masked(tx, is_sparse), optax.masked(optax.sgd(0.1), rest)), True
        ),
        "partition": (optax.partition({"a": tx, "b": optax.adam(1e-2)}, labels), True),
        "apply_if_finite": (optax.apply_if_finite(tx, 3), True),
        "MultiSteps": (optax.MultiSteps(tx, 2), True),
    }  # fmt: skip
    for name, (wrapped, kept) in wrappers.items():
        steps = 2 * _STEPS if name == "MultiSteps" else _STEPS
        try:
            check_history(wrapped, train(wrapped, params, steps), exact=exact, kept=kept)
        except AssertionError as error:
            raise AssertionError(f"inside {name}: {error}") from error


def check_types(factory: Factory, params: Params) -> None:
    """Types and shapes of the state: stable, and the parameters' or scalar; cond and scan."""
    tx = factory(optax.adam(1e-2))
    state = tx.init(params)
    abstract = jax.eval_shape(tx.init, params)
    assert _types(abstract) == _types(state), "abstract init has other types"
    allowed = {jnp.shape(x) for x in jax.tree.leaves(params)} | {()}
    for leaf in leaves_of(tx, params).values():
        allowed.add(leaf.stack)
    for shape in {jnp.shape(x) for x in jax.tree.leaves(state)}:
        assert shape in allowed, f"an array of the state has shape {shape}"
    history = train(tx, params)
    for _, later in history[1:]:
        assert _types(later) == _types(state), "an update changes types of the state"

    def body(carry: Any, flip: jax.Array) -> tuple[Any, None]:
        step = step_of(tx)
        return jax.lax.cond(flip, lambda c: step(*c), lambda c: c, carry), None

    flips = jnp.ones(_STEPS, bool)
    scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, flips))((params, state))
    _close(scanned[0], history[-1][0], "scan and cond")


def _types(tree: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


def _close(found: Any, expected: Any, where: str, rtol: float = 1e-4) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        largest = max(float(np.max(np.abs(b), initial=0.0)), 1e-3)
        error = float(np.max(np.abs(a - b), initial=0.0)) / largest
        assert error <= rtol, f"{where}: differs by {error:.2g} of the largest entry"


def check_precision(factory: Factory, params: Params) -> None:
    """bfloat16 and float16 parameters keep their type, counts and sets."""
    for dtype in (jnp.bfloat16, jnp.float16):
        low = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        tx = factory(optax.sgd(0.1, momentum=0.9))
        history = train(tx, low)
        check_history(tx, history, exact=_has_fixed_counts(tx, params))
        for x in jax.tree.leaves(history[-1][0]):
            assert x.dtype == dtype, f"parameters of {dtype} became {x.dtype}"


def check_extra_arguments(factory: Factory, params: Params) -> None:
    """Extra arguments reach the inner optimizer, and unknown ones do no harm."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params
        return jax.tree.map(lambda u: u * extra["scale"], updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = factory(inner)
    state = tx.init(params)
    grads = gradient(forward_params(params, state))
    run = functools.partial(tx.update, grads, state, params)
    once, _ = run(scale=1.0, unknown=None)
    twice, _ = run(scale=2.0, unknown=None)
    _close(twice, jax.tree.map(lambda x: 2 * x, once), "an extra argument")
    moved = sum(float(jnp.sum(jnp.abs(x))) for x in jax.tree.leaves(once))
    assert moved > 0, "nothing is updated"


def check_derivatives(factory: Factory, params: Params) -> None:
    """The update has the derivative by the learning rate that its inner optimizer has."""
    state = factory(optax.sgd(1.0)).init(params)
    for _ in range(2):
        params, state = jax.jit(step_of(factory(optax.sgd(0.1))))(params, state)
    grads = gradient(forward_params(params, state))

    def total(rate: jax.Array) -> jax.Array:
        updates, _ = factory(optax.sgd(rate)).update(grads, state, params)
        leaves = [jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(updates)]
        return functools.reduce(jnp.add, leaves)

    low, high = float(total(jnp.float32(0.5))), float(total(jnp.float32(1.5)))
    slope = float(jax.grad(total)(jnp.float32(1.0)))
    assert slope > 0, "the derivative by the learning rate is zero"
    error = abs(slope - (high - low)) / abs(high - low)
    assert error < 1e-2, f"the derivative by the learning rate is off by {error:.2g}"


def check_map_params(factory: Factory, params: Params) -> None:
    """`optax.tree.map_params` walks the state."""
    tx = factory(optax.adam(1e-2))
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    assert _structure(mapped) == _structure(state), "map_params changes the state"
    marked = optax.tree.map_params(tx, lambda x: x[None], state)
    raised = [
        x.shape
        for x, y in zip(jax.tree.leaves(marked), jax.tree.leaves(state), strict=True)
        if x.shape != y.shape
    ]
    assert len(raised) >= 3, "map_params does not reach sets and moments"


def check_ensemble(factory: Factory, params: Params) -> None:
    """Vmap over an ensemble, and shard_map over its members, do what each member does alone."""
    tx = factory(optax.sgd(0.1, momentum=0.9))
    members = [jax.tree.map(lambda x, i=i: x * (1 + 0.3 * i) + 0.01 * i, params) for i in range(2)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *members)

    def run(params: Params) -> Params:
        step = step_of(tx)
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
        return params, keep_masks(params, state)

    alone = jax.jit(run)
    expected = jax.tree.map(lambda *xs: np.stack(xs), *(alone(member) for member in members))
    found = jax.jit(jax.vmap(run))(stacked)
    _close(found, expected, "vmap")
    if jax.device_count() >= 2:
        kind = jax.sharding.AxisType.Auto
        mesh = jax.make_mesh((2,), ("member",), axis_types=(kind,), devices=jax.devices()[:2])
        spec = jax.sharding.PartitionSpec("member")
        one = lambda x: jax.tree.map(lambda y: y[None], run(jax.tree.map(lambda y: y[0], x)))  # noqa: E731
        mapped = jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec)
        _close(jax.jit(mapped)(stacked), expected, "shard_map")


def check_sharding(factory: Factory, params: Params) -> None:
    """Over several devices: the sets of one device, and a state that is sharded as parameters."""
    count = 1 << (jax.device_count().bit_length() - 1)
    tx = factory(optax.adam(1e-2))
    alone, state_alone = train(tx, params)[-1]
    kinds = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)
    for kind in kinds if count > 1 else ():
        mesh = jax.make_mesh((count,), ("x",), axis_types=(kind,))

        def place(x: jax.Array, mesh: Any = mesh) -> jax.Array:
            divides = x.ndim > 1 and x.shape[-1] % count == 0
            spec = (*(None,) * (x.ndim - 1), "x") if divides else ()
            return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

        with jax.set_mesh(mesh):
            sharded = jax.tree.map(place, params)
            state = jax.jit(tx.init)(sharded)
            step = jax.jit(step_of(tx))
            new, new_state = sharded, state
            for _ in range(_STEPS):
                new, new_state = step(new, new_state)
            if kind == jax.sharding.AxisType.Explicit:
                typeof = lambda x: str(jax.typeof(x))  # noqa: E731
                before, after = jax.tree.map(typeof, state), jax.tree.map(typeof, new_state)
                assert before == after, "an update changes types or shardings of the state"
            shapes = {x.shape: x.sharding for x in jax.tree.leaves(sharded)}
            for x in jax.tree.leaves(new_state):
                like = shapes.get(x.shape)
                same = like is None or x.ndim < 2 or x.sharding.is_equivalent_to(like, x.ndim)
                assert same, f"{kind}: an array of the state is sharded as {x.sharding}"
            masks = jax.device_get(jax.jit(keep_masks)(new, new_state))
        for a, b in zip(
            jax.tree.leaves(masks), jax.tree.leaves(keep_masks(alone, state_alone)), strict=True
        ):
            assert np.array_equal(a, b), f"{kind}: other sets than on one device"


def check_checkpoints(factory: Factory, params: Params) -> None:
    """A state that was written and read goes on as if nothing had happened."""
    tx = factory(optax.adam(1e-2))
    half, state = train(tx, params, 2)[-1]
    step = jax.jit(step_of(tx))
    expected = step(half, state)
    target = jax.eval_shape(tx.init, params)
    arrays = jax.tree.leaves(state)
    treedef: Any = _structure(state)
    assert _structure(target) == treedef, "init and update make other structures"
    readers: dict[str, Any] = {"arrays": treedef.unflatten(jax.device_get(arrays))}
    if _installed("flax"):
        serialization = importlib.import_module("flax.serialization")
        fresh = tx.init(params)
        readers["flax.serialization"] = serialization.from_bytes(
            fresh, serialization.to_bytes(state)
        )
    if _installed("orbax.checkpoint"):
        orbax = importlib.import_module("orbax.checkpoint")
        with tempfile.TemporaryDirectory() as folder, orbax.StandardCheckpointer() as saver:
            saver.save(f"{folder}/state", state)
            saver.wait_until_finished()
            readers["orbax"] = saver.restore(f"{folder}/state", target)
    for name, read in readers.items():
        found = step(half, read)
        assert _structure(found) == _structure(expected), f"{name}: structure"
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True), name


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def check_trees(factory: Factory, params: Params) -> None:
    """Trees of dicts, Flax NNX, Flax linen and Equinox, with leaves of the same shapes."""
    leaves = {name: x for name, x in _by_name(params).items() if jnp.ndim(x) == 2}
    if len(leaves) < 2 or any(len(name.split("/")) != 2 for name in leaves):
        return
    shapes = [jnp.shape(x) for x in leaves.values()]
    names = [name.split("/")[0] for name in leaves]
    for kind, make in _TREES.items():
        tree = make(names, shapes)
        if tree is None:
            continue
        tx = factory(optax.sgd(0.1, momentum=0.9))
        try:
            check_history(tx, train(tx, tree, 3), exact=_has_fixed_counts(tx, tree))
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from error


def _nnx_tree(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Any:
    if not _installed("flax"):
        return None
    nnx = importlib.import_module("flax.nnx")
    layers = {
        name: nnx.Linear(*shape, rngs=nnx.Rngs(i))
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    return nnx.state(nnx.Dict(**layers), nnx.Param)


def _linen_tree(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Any:
    if not _installed("flax"):
        return None
    linen = importlib.import_module("flax.linen")

    def variables(i: int, shape: tuple[int, ...]) -> Any:
        layer = linen.Dense(shape[1])
        return layer.init(jax.random.key(i), jnp.ones((1, shape[0])))["params"]

    return {
        name: variables(i, shape) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }


def _equinox_tree(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> Any:
    if not _installed("equinox"):
        return None
    equinox = importlib.import_module("equinox")
    keys = jax.random.split(jax.random.key(0), len(shapes))
    # Equinox keeps a kernel as (out, in); the transpose has the shape that the pattern divides.
    layers = [
        equinox.nn.Linear(shape[1], shape[0], key=key)
        for shape, key in zip(shapes, keys, strict=True)
    ]
    arrays, _ = equinox.partition(dict(zip(names, layers, strict=True)), equinox.is_inexact_array)
    return arrays


_TREES: dict[str, Callable[[Sequence[str], Sequence[tuple[int, ...]]], Any]] = {
    "Flax NNX": _nnx_tree,
    "Flax linen": _linen_tree,
    "Equinox": _equinox_tree,
}

CHECKS: dict[str, Callable[[Factory, Params], None]] = {
    "inner_optimizers": check_inner_optimizers,
    "wrappers": check_wrappers,
    "types": check_types,
    "precision": check_precision,
    "extra_arguments": check_extra_arguments,
    "derivatives": check_derivatives,
    "map_params": check_map_params,
    "ensemble": check_ensemble,
    "sharding": check_sharding,
    "checkpoints": check_checkpoints,
    "trees": check_trees,
}
