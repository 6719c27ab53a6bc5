"""The wrapper that every sparsity method shares: its state and its order of update."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast_jax.choosing import Chooser, over_stack
from topkast_jax.errors import SparsityError, shown
from topkast_jax.flags import explores, first_flags, frozen_flags, unpack
from topkast_jax.inner_state import map_parameter_shaped
from topkast_jax.method import Density, Leaf, Method, Sets, allocates, enters_anew
from topkast_jax.patterns import Pattern, Unstructured
from topkast_jax.rules import Rules, Sparse, check_densities, check_pattern, check_rules, resolve
from topkast_jax.sets import (
    DUE,
    DUE_WITH_GRADIENT,
    NOT_DUE,
    CompactState,
    Present,
    SparsifyState,
    nodes_of,
    present,
)
from topkast_jax.trees import columns_of, flatten_with_names
from topkast_jax.values import is_number

# Extra arguments of `update` with which an inner optimizer evaluates the loss at other parameters.
_LOSS_ARGUMENTS = ("value_fn", "obj_fn", "grad_fn")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything `sparsify` was asked for, checked; arguments as there.

    Attributes:
      l2: the weight of `with_l2`.
      exploration_decay: that of `with_exploration_decay`.
    """

    inner: optax.GradientTransformationExtraArgs
    method: Method
    forward_density: Density
    backward_density: Density | None
    refresh_every: int | jax.Array | None
    stop_exploring_at: int | jax.Array | None
    inner_state: Literal["keep", "reset"]
    rules: Rules | None
    pattern: Pattern
    seed: int | jax.Array
    l2: float = 0.0
    exploration_decay: float | jax.Array | optax.Schedule = 0.0

    def leaves(self, params: Any) -> dict[str, Leaf | None]:
        """How each leaf of `params` is sparse, by its path; None where it is dense."""
        return resolve(
            params, self.rules, self.forward_density, self.backward_density, self.pattern
        )

    def sparse_leaves(self, params: Any) -> dict[str, Leaf]:
        """The sparse leaves of `params`, by path."""
        return {path: leaf for path, leaf in self.leaves(params).items() if leaf is not None}

    def check(self, params: Any) -> None:
        """Raises SparsityError unless the method can choose the first sets of these parameters.

        It is quicker than tracing `init`: of the leaves of one pattern it takes the smallest alone.

        Args:
          params: the parameters, or their shapes and types.
        """
        _refuse_a_second_wrapper(jax.eval_shape(self.inner.init, params))
        tried: dict[Pattern, tuple[str, Leaf]] = {}
        for path, leaf in self.sparse_leaves(params).items():
            if leaf.pattern not in tried or leaf.size < tried[leaf.pattern][1].size:
                tried[leaf.pattern] = path, leaf
        leaves = dict(tried.values())
        theta = {n: jax.ShapeDtypeStruct(x.full_shape, x.dtype) for n, x in leaves.items()}
        chooser = Chooser.of(self.method, leaves, self.seed, self.refresh_every is not None)
        grads = theta if self.method.first_choice == "first_update" else None
        choose = functools.partial(chooser.choose, True)
        jax.eval_shape(choose, theta, grads, None, None, np.int32(0))

    @property
    def decays(self) -> bool:
        """Whether updates have a decoupled penalty."""
        weight = self.exploration_decay
        return not isinstance(weight, int | float) or weight != 0

    @property
    def ever_chooses(self) -> bool:
        """Whether sets are chosen after `init`."""
        return self.refresh_every is not None or self.method.first_choice == "first_update"

    def chooses_after(self, step: int) -> bool:
        """Whether sets are chosen anew when so many steps are finished; plain numbers only."""
        every, stop = self.refresh_every, self.stop_exploring_at
        return every is not None and step % int(every) == 0 and (stop is None or step < int(stop))

    def counts_change_after(self, step: int) -> bool:
        """Whether the steps after so many finished ones may have sets of other sizes than this."""
        first = step == 1 and self.method.first_choice == "first_update"
        stops = self.stop_exploring_at is not None and step == int(self.stop_exploring_at)
        return first or stops or (allocates(self.method) and self.chooses_after(step))

    def needs_dense_gradient(self, step: int) -> bool:
        """Whether choosing sets takes the gradient of whole leaves in a step; the first is 1."""
        return self.dense_gradients(step, step) > 0

    def dense_gradients(self, first: int, last: int) -> int:
        """In how many steps, from one to another, choosing sets takes the gradient of whole leaves.

        Args:
          first: the first of these steps; the first of all is 1.
          last: the last of them, not below `first`.
        """
        if self.method.observes_gradient:
            return last + 1 - first
        begins = first == 1 and self.method.first_choice == "first_update"
        if not self.method.needs_gradient or self.refresh_every is None:
            return int(begins)
        every, stop = int(self.refresh_every), self.stop_exploring_at
        end = last if stop is None else min(last, int(stop) - 1)
        refreshes = max(0, end // every - (first - 1) // every)
        return refreshes + (begins and not self.chooses_after(1))


class SparseTransform(optax.GradientTransformationExtraArgs):
    """What `sparsify` returns: a gradient transformation that carries its plan.

    Attributes:
      plan: what `topkast_jax.always_sparse.AlwaysSparse` and `topkast_jax.statistics` read.
    """

    plan: Plan


def sparsify(
    inner: optax.GradientTransformation,
    method: Method,
    *,
    forward_density: Density,
    backward_density: Density | None = None,
    refresh_every: int | jax.Array | None = 100,
    stop_exploring_at: int | jax.Array | None = None,
    inner_state: Literal["keep", "reset"] = "keep",
    rules: Rules | None = None,
    pattern: Pattern | None = None,
    seed: int | jax.Array = 0,
) -> SparseTransform:
    r"""Makes `inner` train a network that is sparse in every step (Top-KAST, section 2).

    With forward set A and backward set B of the parameters θ, a step takes the gradient g at
    ``forward_params(params, state)`` (θ on A, 0 elsewhere) and does, on sparse leaves,

    .. math::
      u = \text{inner}(\text{method.gradient}(g) \cdot 1_B), \quad θ ← θ + u \cdot 1_B

    After every `refresh_every` steps the method chooses A and B anew. It chooses from the θ that
    comes with the state next, in `forward_params` and in the following `update` alike, so the sets
    are those of the θ that the caller has, wherever the wrapper sits among other transformations.

    Args:
      inner: any optax optimizer. One that evaluates the loss itself (``value_fn``, ``obj_fn`` or
        ``grad_fn`` of a line search or SAM) evaluates it at the forward view.
      method: how the sets are chosen.
      forward_density: share of a leaf's units in A, in (0, 1].
      backward_density: share in B, forward_density to 1; None: that of A, in each leaf.
      refresh_every: steps between two refreshes of the sets, at least 1; None: no refresh.
      stop_exploring_at: when so many steps are finished, B becomes the A in use and neither changes
        again; 0 means from the start, None never.
      inner_state: "keep": entries that leave B keep their inner state. "reset": entries that leave
        or enter B get the inner state that `inner.init` gives them; moments become zero.
      rules: see `topkast_jax.rules.resolve`.
      pattern: what is kept together, `Unstructured()` if None.
      seed: of the random numbers a method draws; may be traced.

    Returns:
      A gradient transformation whose update needs `params`.

    Raises:
      SparsityError: an argument outside its range; from `init`, rules that do not fit the
        parameters; from `update`, gradients, state or parameters that do not fit each other.
    """
    shape = Unstructured() if pattern is None else pattern
    _check(inner, method, inner_state, shape, seed)
    check_densities(
        forward_density, forward_density if backward_density is None else backward_density
    )
    check_rules(rules)
    if not method.explores:
        _check_no_exploration(method, forward_density, backward_density, rules)
        backward_density = None  # A leaf's own forward density may be below it.
    plan = Plan(
        optax.with_extra_args_support(inner), method, forward_density, backward_density,
        _whole_number("refresh_every", refresh_every, 1),
        _whole_number("stop_exploring_at", stop_exploring_at, 0),
        inner_state, rules, shape, seed,
    )  # fmt: skip
    if method.skips_update and isinstance(plan.refresh_every, int) and plan.refresh_every == 1:
        raise SparsityError(
            "refresh_every=1: must be at least 2 with skips_update, or no step moves a parameter"
        )
    return _transform(plan)


def with_l2(tx: SparseTransform, weight: float) -> SparseTransform:
    """The same method with an L2 penalty on its sparse leaves of two or more axes.

    The inner optimizer gets g + `weight` · θ in place of the gradient g, on the backward set alone.
    What the method itself sees of the gradient stays that of the loss.

    Args:
      tx: what `sparsify` returned.
      weight: at least 0.
    """
    return _transform(dataclasses.replace(tx.plan, l2=weight))


def with_exploration_decay(
    tx: SparseTransform, weight: float | jax.Array | optax.Schedule
) -> SparseTransform:
    """The same method with a decoupled exploration penalty, which the paper does not have.

    From the updates of the inner optimizer it takes `weight` · θ on A and `weight` · θ / D on B∖A,
    with D the forward density of the leaf. Dense leaves have no such penalty.

    Args:
      tx: what `sparsify` returned.
      weight: a finite number of at least 0, which may be traced, or a schedule of such numbers by
        the number of finished steps.

    Raises:
      SparsityError: another weight.
    """
    if not callable(weight):
        check_weight("exploration_decay", weight, "a finite number of at least 0, or a schedule")
    return _transform(dataclasses.replace(tx.plan, exploration_decay=weight))


def check_weight(name: str, weight: Any, allowed: str = "a finite number of at least 0") -> None:
    """Raises SparsityError if an argument of this name is no weight; a traced one passes."""
    if isinstance(weight, jax.core.Tracer):
        return
    number = isinstance(weight, int | float | np.number) or getattr(weight, "ndim", None) == 0
    if isinstance(weight, bool) or not number or not 0 <= weight < math.inf:
        raise SparsityError(f"{name}={shown(weight)}: must be {allowed}")


def _transform(plan: Plan) -> SparseTransform:
    def init_fn(params: Any) -> SparsifyState:
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
            state: SparsifyState = jax.eval_shape(lambda x: _first_state(plan, x), params)
            return state
        return _first_state(plan, params)

    def update_fn(
        grads: Any, state: SparsifyState, params: Any = None, **extra: Any
    ) -> tuple[Any, SparsifyState]:
        return _update(plan, grads, state, params, extra)

    transform = SparseTransform(init_fn, update_fn)
    transform.plan = plan
    return transform


def _first_state(plan: Plan, params: Any) -> SparsifyState:
    leaves = plan.leaves(params)
    for note in _observers.get():
        note(leaves)
    inner_state = plan.inner.init(params)
    _refuse_a_second_wrapper(inner_state)
    names, arrays, treedef = flatten_with_names(params)
    step, due = jnp.zeros([], jnp.int32), jnp.asarray(NOT_DUE, jnp.int8)
    # Without leaves this is the placeholder with which `optax.tree.map_params` asks for the
    # structure: scalars stand for what is no tree of parameters.
    if not names:
        gradient = params if plan.method.needs_gradient else ()
        # One array in several places could not be donated.
        return SparsifyState(step, params, due + 0, inner_state, due, gradient, due + 0)
    if plan.inner_state == "reset":  # Raises if moments do not follow the parameters.
        map_parameter_shaped(lambda moments: moments, inner_state, params)
    sparse = {path: leaf for path, leaf in leaves.items() if leaf is not None}
    theta = {n: jnp.asarray(a) for n, a in zip(names, arrays, strict=True) if n in sparse}
    chooser = Chooser.of(plan.method, sparse, plan.seed, plan.refresh_every is not None)
    if plan.method.first_choice == "first_update":
        flags, memory = _everything(theta), chooser.first_memory(theta)
        due = jnp.asarray(DUE_WITH_GRADIENT, jnp.int8)
    else:
        flags, memory = _first_choice(chooser, theta, chooser.keys(np.int32(0)))
    if plan.stop_exploring_at is not None and plan.method.first_choice == "init":
        at_once = jnp.asarray(plan.stop_exploring_at) == 0
        flags = {path: jnp.where(at_once, frozen_flags(f), f) for path, f in flags.items()}

    def per_leaf(values: dict[str, Any]) -> Any:
        return treedef.unflatten([values.get(name, optax.MaskedNode()) for name in names])

    gradient = per_leaf(jax.tree.map(jnp.zeros_like, theta)) if plan.method.needs_gradient else ()
    kept = chooser if plan.ever_chooses else ()
    return SparsifyState(step, per_leaf(flags), memory, inner_state, due, gradient, kept)


@jax.jit
def _first_choice(chooser: Chooser, theta: dict[str, Any], keys: Any) -> tuple[Any, Any]:
    return chooser.choose(True, jax.lax.stop_gradient(theta), None, None, None, np.int32(0), keys)


def _everything(theta: dict[str, Any]) -> dict[str, Any]:
    """Flags of leaves that are kept whole."""
    masks = {path: jnp.ones_like(x, dtype=bool) for path, x in theta.items()}
    return {path: first_flags(Sets(mask, mask)) for path, mask in masks.items()}


def _update(
    plan: Plan, grads: Any, state: SparsifyState, params: Any, extra: dict[str, Any]
) -> tuple[Any, SparsifyState]:
    """One step, in the order of the paper's section 2; the docstring of `sparsify` says it."""
    if params is None:
        raise SparsityError("update needs the parameters: tx.update(grads, state, params)")
    if not isinstance(state, SparsifyState):
        raise SparsityError(
            f"update(grads, state, params): state is a {type(state).__name__}, must be what init "
            "returned"
        )
    names, arrays, treedef = flatten_with_names(params)
    if not names:
        updates, inner_new = plan.inner.update(grads, state.inner_state, params, **extra)
        return updates, state._replace(step=optax.safe_increment(state.step), inner_state=inner_new)
    gradients = columns_of("update: grads", grads, names, treedef)
    leaves = plan.sparse_leaves(params)
    _check_method(plan.method, state.chooser)
    check_sparse(leaves, names, columns_of("update: the state", state.sets, names, treedef))
    for path, leaf in leaves.items():
        if np.shape(gradients[path]) != leaf.full_shape:
            raise SparsityError(
                f"update: grads: {path} must have the shape {leaf.full_shape} of the parameter, "
                f"found {np.shape(gradients[path])}"
            )

    # 1. The sets in use, which belong to the parameters that came.
    now = present(dict(zip(names, arrays, strict=True)), state, gradients)
    theta = treedef.unflatten([now.theta.get(n, a) for n, a in zip(names, arrays, strict=True)])
    inner_state = state.inner_state
    if plan.inner_state == "reset" and plan.ever_chooses:
        # Operands, not a closure: only a traced array makes `init` shard moments explicitly.
        inner_state = jax.lax.cond(
            state.due != NOT_DUE,
            lambda *operands: _reset_moved(plan, *operands),
            lambda inner_state, *_: inner_state,
            inner_state, theta, now.was, now.flags,
        )  # fmt: skip

    # 2. The method's gradient, inside B; 3. the inner optimizer; 4. its updates, with a decoupled
    # penalty, inside B.
    shaped = _restricted(plan, leaves, gradients, now, state.step)
    updates, inner_state = plan.inner.update(
        treedef.unflatten([shaped[name] for name in names]),
        inner_state,
        theta,
        **at_forward_view(extra, _forward_view(now, treedef, names)),
    )
    columns = columns_of("update", updates, names, treedef)
    for path, leaf in leaves.items() if plan.decays else ():
        sets = unpack(now.flags[path])
        columns[path] = decay_update(plan, leaf, columns[path], now.theta[path], sets, state.step)
    updates = _inside(plan, columns, now, arrays)

    # 5. What is due after this step. The next choice is made from the parameters that come then.
    step = optax.safe_increment(state.step)
    memory = now.memory
    if plan.method.observes_gradient:
        memory = _observed(plan, leaves, gradients, now)
    updates, inner_state = held_where_skipped(plan, step, updates, inner_state, state.inner_state)
    flags, due, inner_state = _after(plan, step, now.flags, inner_state, theta)
    sets = treedef.unflatten([flags.get(name, optax.MaskedNode()) for name in names])
    gradient: Any = ()
    if plan.method.needs_gradient:
        seen = {n: jnp.asarray(gradients[n], leaf.dtype) for n, leaf in leaves.items()}
        gradient = treedef.unflatten([seen.get(n, optax.MaskedNode()) for n in names])
    chooser: Any = ()
    if plan.ever_chooses:
        chooser = Chooser.of(plan.method, leaves, plan.seed, plan.refresh_every is not None)
    state = SparsifyState(step, sets, memory, inner_state, due, gradient, chooser)
    return treedef.unflatten([updates[name] for name in names]), state


def _restricted(
    plan: Plan, leaves: dict[str, Leaf], gradients: dict[str, Any], now: Present, step: Any
) -> dict[str, Any]:
    """The gradients as the method shapes them, zero outside B."""
    shaped = dict(gradients)
    for path, leaf in leaves.items():
        sets = unpack(now.flags[path])
        of_leaf = shape_gradient(plan, leaf, gradients[path], now.theta[path], sets, step)
        shaped[path] = jnp.where(sets.backward, of_leaf, jnp.zeros_like(of_leaf))
    return shaped


def held_where_skipped(
    plan: Plan, step: jax.Array, updates: Any, inner_state: Any, before: Any
) -> tuple[Any, Any]:
    """Updates and inner state; no update, and the state before, where a method skips a step."""
    if not plan.method.skips_update or plan.refresh_every is None:
        return updates, inner_state
    chooses = _chooses_after(plan, step)
    if plan.method.last_choice_at is not None:
        chooses &= step <= jnp.asarray(plan.method.last_choice_at, jnp.int32)
    held = jax.tree.map(jnp.zeros_like, updates), before
    kept: tuple[Any, Any] = jax.lax.cond(chooses, lambda: held, lambda: (updates, inner_state))
    return kept


def shape_gradient(
    plan: Plan, leaf: Leaf, grad: Any, theta: Any, sets: Sets, step: jax.Array
) -> jax.Array:
    """What the inner optimizer gets in place of the gradient of a leaf, on its backward set."""
    if plan.l2 and len(leaf.shape) >= 2:
        grad = grad + jnp.asarray(plan.l2, theta.dtype) * theta
    shape = over_stack(lambda g, x, s: plan.method.gradient(g, x, s, leaf, step), leaf)
    shaped: jax.Array = shape(grad, theta, sets)
    return shaped


def decay_update(
    plan: Plan, leaf: Leaf, update: Any, theta: Any, sets: Sets, step: jax.Array
) -> Any:
    """The inner optimizer's update of a leaf, with the decoupled penalty on its backward set."""
    weight = plan.exploration_decay
    now = jnp.asarray(weight(step) if callable(weight) else weight, theta.dtype)
    density = jnp.asarray(leaf.forward_density, theta.dtype)
    decay = jnp.where(sets.forward, now, now / density) * theta
    return update - decay.astype(update.dtype)


def _inside(plan: Plan, updates: dict[str, Any], now: Present, arrays: list[Any]) -> dict[str, Any]:
    """Updates that leave what is outside B as it is, and bring in what has entered it."""
    result = dict(updates)
    before = dict(zip(updates, arrays, strict=True))
    for path, flags in now.flags.items():
        # Adding -0.0 leaves every float as it is, bit for bit; 0.0 would turn -0.0 into 0.0.
        inside = updates[path]
        inside = jnp.where(unpack(flags).backward, inside, jnp.full_like(inside, -0.0))
        if enters_anew(plan.method):
            inside = inside + (now.theta[path] - before[path]).astype(inside.dtype)
        result[path] = inside
    return result


@jax.custom_jvp
def _straight_through(theta: jax.Array, sets: Sets) -> jax.Array:
    """The forward view of a leaf, with a derivative of one on the backward set."""
    return jnp.where(sets.forward, theta, jnp.zeros_like(theta))


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (theta, sets), (tangent, _) = primals, tangents
    straight = jnp.where(sets.backward, tangent, jnp.zeros_like(tangent))
    return _straight_through(theta, sets), straight


def at_forward_view(
    extra: dict[str, Any],
    view: Callable[[Any], Any],
    of_result: Callable[[Any], Any] = lambda result: result,
) -> dict[str, Any]:
    """Extra arguments of `update` in which functions of the parameters see their forward view.

    Args:
      extra: the arguments, by name.
      view: the forward view of a tree of parameters.
      of_result: what the inner optimizer gets of what such a function returns.
    """

    def at_view(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tree, *args, **kwargs: of_result(function(view(tree), *args, **kwargs))

    return {
        key: at_view(value) if key in _LOSS_ARGUMENTS and callable(value) else value
        for key, value in extra.items()
    }


def _forward_view(now: Present, treedef: Any, names: list[str]) -> Callable[[Any], Any]:
    def view(tree: Any) -> Any:
        values = columns_of("a function of the parameters", tree, names, treedef)
        for path, flags in now.flags.items():
            values[path] = _straight_through(values[path], unpack(flags))
        return treedef.unflatten([values[name] for name in names])

    return view


def _observed(
    plan: Plan, leaves: dict[str, Leaf], gradients: dict[str, Any], now: Present
) -> dict[str, Any]:
    def one(path: str, leaf: Leaf) -> Any:
        observe = over_stack(lambda g, x, m: plan.method.observe(g, x, m, leaf), leaf)
        return observe(gradients[path], now.theta[path], now.memory[path])

    return {path: one(path, leaf) for path, leaf in leaves.items()}


def _after(
    plan: Plan, step: jax.Array, flags: dict[str, Any], inner_state: Any, theta: Any
) -> tuple[dict[str, Any], jax.Array, Any]:
    """Flags, what is due and inner state after `step` finished steps."""
    due, stop = _chooses_after(plan, step), _stop_of(plan)

    def keep(flags: Any, inner: Any, theta: Any) -> Any:
        del theta
        return flags, inner

    def freeze(flags: Any, inner: Any, theta: Any) -> Any:
        frozen = {path: frozen_flags(f) for path, f in flags.items()}
        resets = plan.inner_state == "reset"
        return frozen, _reset_moved(plan, inner, theta, flags, frozen) if resets else inner

    def stopped(*operands: Any) -> Any:  # The stop may be one that was set after it passed.
        return jax.lax.cond(_explores(operands[0]), freeze, keep, *operands)

    if stop is not None:  # No flag is read before the stop.
        flags, inner_state = jax.lax.cond(step >= stop, stopped, keep, flags, inner_state, theta)
    return flags, jnp.where(due, DUE, NOT_DUE).astype(jnp.int8), inner_state


def _explores(flags: dict[str, Any]) -> jax.Array:
    """Whether any entry is in B alone."""
    return functools.reduce(jnp.logical_or, map(explores, flags.values()), jnp.asarray(False))


def _chooses_after(plan: Plan, step: jax.Array) -> jax.Array:
    """Whether a refresh is due after `step` finished steps."""
    if plan.refresh_every is None:
        return jnp.asarray(False)
    due, stop = step % jnp.asarray(plan.refresh_every, jnp.int32) == 0, _stop_of(plan)
    return due if stop is None else due & (step < stop)


def _stop_of(plan: Plan) -> jax.Array | None:
    """The step after which exploration stops; the first choice is made before it."""
    if plan.stop_exploring_at is None:
        return None
    earliest = 0 if plan.method.first_choice == "init" else 1
    return jnp.maximum(jnp.asarray(plan.stop_exploring_at, jnp.int32), earliest)


def _reset_moved(
    plan: Plan, inner_state: Any, params: Any, old: dict[str, Any], new: dict[str, Any]
) -> Any:
    """The inner state as `init` makes it, moments zero, but for entries that stay in B."""
    names, _, treedef = flatten_with_names(params)
    stays = treedef.unflatten([
        unpack(old[name]).backward & unpack(new[name]).backward if name in old else None
        for name in names
    ])  # fmt: skip
    marked = map_parameter_shaped(lambda _, stays: _Kept(stays), inner_state, params, stays)
    return jax.tree.map(
        lambda mark, now, first: mark.of(now, first) if isinstance(mark, _Kept) else now,
        marked, inner_state, plan.inner.init(params),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Kept:
    mask: jax.Array

    def of(self, now: jax.Array, first: jax.Array) -> jax.Array:
        return jnp.where(self.mask, now, first.astype(now.dtype))


_observers: contextvars.ContextVar[tuple[Callable[[dict[str, Leaf | None]], None], ...]] = (
    contextvars.ContextVar("observers", default=())
)


@contextlib.contextmanager
def observing_leaves(note: Callable[[dict[str, Leaf | None]], None]) -> Iterator[None]:
    """Calls `note` with the leaves that each `init` of a sparsity method decides on meanwhile."""
    token = _observers.set((*_observers.get(), note))
    try:
        yield
    finally:
        _observers.reset(token)


def check_transformation(name: str, tx: Any) -> None:
    """Raises SparsityError unless an argument of this name is an optax optimizer."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        found = getattr(tx, "__name__", shown(tx))
        called = f"; call it, as in optax.{found}(…)" if callable(tx) else ""
        raise SparsityError(f"{name}={found}: must be an optax optimizer{called}")


def _check(inner: Any, method: Any, inner_state: Any, pattern: Any, seed: Any) -> None:
    check_transformation("inner", inner)
    if isinstance(inner, SparseTransform):
        raise SparsityError("inner is wrapped by a sparsity method already: wrap an optimizer once")
    if isinstance(method, type) or not isinstance(method, Method):
        raise SparsityError(f"method={shown(method)}: must be a topkast_jax.Method")
    for name in ("needs_gradient", "observes_gradient", "explores", "skips_update"):
        if not isinstance(flag := getattr(method, name), bool):
            raise SparsityError(f"{name}={shown(flag)}: must be True or False")
    if (first := method.first_choice) not in ("init", "first_update"):
        raise SparsityError(f"first_choice={shown(first)}: must be 'init' or 'first_update'")
    if inner_state not in ("keep", "reset"):
        raise SparsityError(f"inner_state={shown(inner_state)}: must be 'keep' or 'reset'")
    check_pattern(pattern)
    number = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jnp.integer)
    if not (number and seed.ndim == 0):
        try:
            operator.index(seed)
        except TypeError:
            raise SparsityError(f"seed={shown(seed)}: must be an integer") from None


def _check_no_exploration(
    method: Method, forward: Density, backward: Density | None, rules: Rules | None
) -> None:
    """Refuses a backward density that a method whose B is A would ignore."""
    named = [("", forward, backward)]
    named += [
        (f"rule {path!r}: ", forward if spec.forward_density is None else spec.forward_density,
         spec.backward_density)
        for path, spec in rules or () if isinstance(spec, Sparse)
    ]  # fmt: skip
    for where, of_a, of_b in named:
        plain = all(is_number(x) and not isinstance(x, jax.Array) for x in (of_a, of_b))
        if plain and of_b != of_a:
            raise SparsityError(
                f"{where}backward_density={shown(of_b)}: the backward set of "
                f"{type(method).__name__} is its forward set; leave it out"
            )


def _whole_number(name: str, value: Any, least: int) -> Any:
    if value is None or isinstance(value, jax.core.Tracer):
        return value
    try:
        whole = not isinstance(value, bool) and int(value) == value and least <= int(value) < 2**31
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise SparsityError(
            f"{name}={shown(value)}: must be None or an integer of at least {least} and below 2**31"
        )
    return value if isinstance(value, jax.Array) else int(value)


def _refuse_a_second_wrapper(inner_state: Any) -> None:
    for kind in (SparsifyState, CompactState):
        if nodes_of(inner_state, kind):
            raise SparsityError(
                "the inner optimizer holds a sparsity method already: wrap an optimizer once"
            )


def _check_method(method: Method, chooser: Any) -> None:
    """Raises SparsityError if a state's sets are chosen by a method of another class."""
    if isinstance(chooser, Chooser):
        held, wanted = type(chooser.method), type(method)
        # By name: a notebook may have defined the class again.
        if (held.__module__, held.__qualname__) != (wanted.__module__, wanted.__qualname__):
            raise SparsityError(
                f"update: the state is of {held.__name__}, and this transformation is "
                f"{wanted.__name__}: start anew with init"
            )


def check_sparse(leaves: dict[str, Leaf], names: list[str], held: dict[str, Any]) -> None:
    """Raises SparsityError unless the rules and the state agree on which leaves are sparse."""
    for name in names:
        in_state = not isinstance(held[name], optax.MaskedNode)
        if in_state != (name in leaves):
            now, then = ("sparse", "dense") if name in leaves else ("dense", "sparse")
            raise SparsityError(
                f"{name} is {now} under these rules and {then} in this state: the state was made "
                "under other rules"
            )
