"""The wrapper every sparsity method shares: its order of update, and what a method must say."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from topkast_jax.errors import SparsityError
from topkast_jax.inner_state import map_parameter_shaped
from topkast_jax.patterns import Pattern, Unstructured
from topkast_jax.rules import Density, Leaf, Rules, check_densities, logger, resolve
from topkast_jax.sets import (
    Sets,
    SparsifyState,
    first_flags,
    forward_params,
    frozen_flags,
    is_dense,
    keep_masks,
    next_flags,
    unpack,
)
from topkast_jax.trees import flatten

__all__ = [
    "Method",
    "Plan",
    "Sets",
    "SparseTransform",
    "SparsifyState",
    "forward_params",
    "keep_masks",
    "sparsify",
]


class Method:
    """How the sets of one leaf start and how they change; subclass it to make a new method.

    Every function is called for one layer of one leaf, traced, and must be pure. `memory` is what
    the method wants to remember about the leaf: any tree of scalars and arrays of the leaf's shape.

    Attributes:
      needs_gradient: whether `change` reads the gradient; without it, `grad` is None there, and
        the gradient's memory is free by then.
    """

    needs_gradient: bool = False

    def start(self, theta: jax.Array, leaf: Leaf, key: jax.Array) -> tuple[Sets, Any]:
        """The first sets and the first memory, from the initial parameters."""
        raise TypeError(f"{type(self).__name__} must define start(theta, leaf, key)")

    def gradient(self, grad: jax.Array, theta: jax.Array, sets: Sets, leaf: Leaf) -> jax.Array:
        """The gradient the inner optimizer gets; it is zeroed outside the backward set after.

        Must work entry by entry: always sparse, the arrays hold the backward set alone, `[b]` or
        `[b, rows, cols]`, in place of the layer.
        """
        del theta, sets, leaf
        return grad

    def change(
        self,
        theta: jax.Array,
        grad: jax.Array | None,
        sets: Sets,
        memory: Any,
        leaf: Leaf,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[Sets, Any]:
        """The next sets and memory, from the updated parameters and the gradient at the view."""
        del theta, grad, leaf, key, step
        return sets, memory


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything `sparsify` was asked for, checked; arguments as there."""

    inner: optax.GradientTransformationExtraArgs
    method: Method
    forward_density: Density
    backward_density: Density
    refresh_every: int | jax.Array | None
    stop_exploring_at: int | jax.Array | None
    inner_state: Literal["keep", "reset"]
    rules: Rules | None
    pattern: Pattern
    seed: int

    def leaves(self, params: Any, log: Callable[[str], None] | None = None) -> list[Leaf | None]:
        """How each leaf of `params` is sparse, in flattening order; None where it is dense."""
        return resolve(
            params, self.rules, self.forward_density, self.backward_density, self.pattern, log
        )

    def keys(self, leaf: Leaf, step: Any) -> jax.Array:
        """A random key for each layer of a leaf, the same wherever the leaf stands in the tree."""
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(leaf.path.encode()))
        key = jax.random.fold_in(key, step)
        return jax.random.split(key, leaf.stack) if leaf.stack else key

    def start(self, leaf: Leaf, keys: jax.Array, theta: jax.Array) -> tuple[jax.Array, Any]:
        """Flags and memory of the first sets of a leaf."""
        start = _for_each_layer(lambda key, theta: self.method.start(theta, leaf, key), leaf)
        sets, memory = start(keys, theta)
        return first_flags(sets), memory

    def change(
        self, leaf: Leaf, keys: jax.Array, step: Any, theta: Any, grad: Any, flags: Any, memory: Any
    ) -> tuple[jax.Array, Any]:
        """Flags and memory of a leaf after `step` finished steps, from its present θ."""
        change = _for_each_layer(
            lambda key, theta, grad, sets, memory: self.method.change(
                theta, grad, sets, memory, leaf, key, step
            ),
            leaf,
        )
        new, memory = change(keys, theta, grad, unpack(flags), memory)
        return next_flags(flags, new), memory

    def shape_gradient(
        self, leaf: Leaf, grad: Any, theta: Any, sets: Sets, step: jax.Array
    ) -> jax.Array:
        """What the inner optimizer gets in place of the gradient of a leaf, on its backward set."""
        shape = _for_each_layer(
            lambda grad, theta, sets: self.method.gradient(grad, theta, sets, leaf), leaf
        )
        return rounded(shape(grad, theta, sets), step)


class SparseTransform(optax.GradientTransformationExtraArgs):
    """What `sparsify` returns: a gradient transformation that carries its plan.

    Attributes:
      plan: what `topkast_jax.always_sparse.AlwaysSparse` makes the compact form from.
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
    seed: int = 0,
) -> SparseTransform:
    r"""Makes `inner` train a network that is sparse in every step (Top-KAST, section 2).

    With forward set A and backward set B of the parameters θ, a step takes the gradient g at
    ``forward_params(params, state)`` (θ on A, 0 elsewhere) and does, on sparse leaves,

    .. math::
      u = \text{inner}(\text{method.gradient}(g) \cdot 1_B), \quad θ ← θ + u \cdot 1_B

    and every `refresh_every` steps lets the method choose A and B anew from the new θ. The new θ is
    taken to be ``optax.apply_updates(params, updates)``, so in an `optax.chain` nothing that alters
    the updates may come after.

    Args:
      inner: any optax optimizer.
      method: how the sets start and change.
      forward_density: share of a leaf's units in A, in (0, 1].
      backward_density: share in B, forward_density to 1; forward_density if None.
      refresh_every: steps between two choices of the sets, at least 1; None: never.
      stop_exploring_at: when so many steps are finished, B becomes the A in use and neither changes
        again; 0 means from the start, None never.
      inner_state: "keep" or "reset" the inner state of entries that leave B, to what `inner.init`
        gives them: moments to zero. With "reset", what enters B starts from there as well.
      rules: see `topkast_jax.rules.resolve`.
      pattern: what is kept together, `Unstructured()` if None.
      seed: of the random numbers a method draws.

    Returns:
      A gradient transformation whose update needs `params`.

    Raises:
      SparsityError: an argument outside its range; from `init`, rules that do not fit the
        parameters.
    """
    backward = forward_density if backward_density is None else backward_density
    shape = Unstructured() if pattern is None else pattern
    _check(forward_density, backward, refresh_every, stop_exploring_at, inner_state, shape)
    inner = optax.with_extra_args_support(inner)
    plan = Plan(
        inner, method, forward_density, backward, refresh_every, stop_exploring_at, inner_state,
        rules, shape, seed,
    )  # fmt: skip
    log_once = _once(logger.info)
    first_sets = jax.jit(functools.partial(_first_sets, plan))

    def init_fn(params: Any) -> SparsifyState:
        plan.leaves(params, log_once)
        sets, memory = first_sets(params)
        return SparsifyState(jnp.zeros([], jnp.int32), sets, memory, inner.init(params))

    def update_fn(
        grads: Any, state: SparsifyState, params: Any = None, **extra: Any
    ) -> tuple[Any, SparsifyState]:
        if params is None:
            raise SparsityError("update needs the parameters: tx.update(grads, state, params)")
        shaped = _restricted(plan, grads, params, state)
        updates, inner_new = inner.update(shaped, state.inner_state, params, **extra)
        _, treedef = flatten(params)
        columns = treedef.flatten_up_to(state.sets), treedef.flatten_up_to(updates)
        zero_outside = functools.partial(_zero_outside, state.step)
        updates = treedef.unflatten(_rows(zero_outside, *columns))
        step = optax.safe_increment(state.step)
        theta = optax.apply_updates(params, updates)
        seen = grads if method.needs_gradient else None
        sets, memory, inner_new = _evolved(plan, step, theta, seen, state, inner_new)
        return updates, SparsifyState(step, sets, memory, inner_new)

    transform = SparseTransform(init_fn, update_fn)
    transform.plan = plan
    return transform


def _first_sets(plan: Plan, params: Any) -> tuple[Any, dict[str, Any]]:
    memory: dict[str, Any] = {}

    def start(leaf: Leaf | None, theta: jax.Array) -> Any:
        if leaf is None:
            return optax.MaskedNode()
        flags, memory[leaf.path] = plan.start(leaf, plan.keys(leaf, 0), theta)
        return flags

    thetas, treedef = flatten(params)
    sets = treedef.unflatten(_rows(start, plan.leaves(params), thetas))
    if plan.stop_exploring_at is not None:
        at_once = jnp.asarray(plan.stop_exploring_at) == 0
        sets = jax.tree.map(lambda f: jnp.where(at_once, frozen_flags(f), f), sets)
    return sets, memory


def _restricted(plan: Plan, grads: Any, params: Any, state: SparsifyState) -> Any:
    """The gradients as the method shapes them, zero outside B."""

    def restrict(leaf: Leaf | None, grad: jax.Array, theta: jax.Array, flags: Any) -> Any:
        if leaf is None:
            return grad
        sets = unpack(flags)
        shaped = plan.shape_gradient(leaf, grad, theta, sets, state.step)
        return jnp.where(sets.backward, shaped, jnp.zeros_like(shaped))

    thetas, treedef = flatten(params)
    columns = treedef.flatten_up_to(grads), thetas, treedef.flatten_up_to(state.sets)
    return treedef.unflatten(_rows(restrict, plan.leaves(params), *columns))


def _evolved(
    plan: Plan, step: jax.Array, theta: Any, grads: Any, old: SparsifyState, inner_new: Any
) -> Any:
    """Sets, memory and inner state after `step` finished steps."""
    every, stop = plan.refresh_every, plan.stop_exploring_at

    def finish(sets: Any, memory: Any) -> Any:
        if plan.inner_state == "reset":
            return sets, memory, _reset_moved(plan, inner_new, theta, old.sets, sets)
        return sets, memory, inner_new

    def keep() -> Any:
        return old.sets, old.memory, inner_new

    def renew() -> Any:
        return finish(*_refreshed(plan, step, theta, grads, old.sets, old.memory))

    def freeze() -> Any:
        return finish(jax.tree.map(frozen_flags, old.sets), old.memory)

    if stop is None and every is None:
        return keep()
    if stop is None and isinstance(every, int) and every == 1:
        return renew()
    due = jnp.asarray(False) if every is None else step % every == 0
    if stop is None:
        return jax.lax.cond(due, renew, keep)
    choice = jnp.where(step < stop, due.astype(jnp.int32), 0)
    choice = jnp.where(step == stop, 2, choice)
    return jax.lax.switch(choice, [keep, renew, freeze])


def _refreshed(
    plan: Plan, step: jax.Array, theta: Any, grads: Any, sets: Any, memory: Any
) -> tuple[Any, dict[str, Any]]:
    """Sets and memory that the method chooses anew."""
    memory = dict(memory)

    def change(leaf: Leaf | None, theta: jax.Array, grad: Any, flags: Any) -> Any:
        if leaf is None:
            return flags
        flags, memory[leaf.path] = plan.change(
            leaf, plan.keys(leaf, step), step, theta, grad, flags, memory[leaf.path]
        )
        return flags

    thetas, treedef = flatten(theta)
    gradients = [None] * len(thetas) if grads is None else treedef.flatten_up_to(grads)
    flags = treedef.flatten_up_to(sets)
    changed = _rows(change, plan.leaves(theta), thetas, gradients, flags)
    return treedef.unflatten(changed), memory


def _check(
    forward: Density, backward: Density, refresh: Any, stop: Any, inner_state: str, pattern: Any
) -> None:
    check_densities(forward, backward)
    for name, value, least in (("refresh_every", refresh, 1), ("stop_exploring_at", stop, 0)):
        if value is None or isinstance(value, jax.core.Tracer):
            continue
        if isinstance(value, bool) or int(value) != value or value < least:
            raise SparsityError(f"{name}={value!r}: must be None or an integer of at least {least}")
    if inner_state not in ("keep", "reset"):
        raise SparsityError(f"inner_state={inner_state!r}: must be 'keep' or 'reset'")
    if not isinstance(pattern, Pattern):
        raise SparsityError(f"pattern={pattern!r}: must be Unstructured(), Block(rows, cols), …")


def _once(log: Callable[[str], None]) -> Callable[[str], None]:
    logged: set[str] = set()

    def log_once(line: str) -> None:
        if line not in logged:
            logged.add(line)
            log(line)

    return log_once


def _rows(function: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
    return [function(*row) for row in zip(*columns, strict=True)]


def _for_each_layer(function: Callable[..., Any], leaf: Leaf) -> Callable[..., Any]:
    for _ in leaf.stack:
        function = jax.vmap(function)
    return function


def _zero_outside(step: jax.Array, flags: Any, update: jax.Array) -> jax.Array:
    if is_dense(flags):
        return update
    # Adding -0.0 leaves every float as it is, bit for bit; adding 0.0 would turn -0.0 into 0.0.
    return jnp.where(unpack(flags).backward, rounded(update, step), jnp.full_like(update, -0.0))


def _reset_moved(plan: Plan, inner_state: Any, params: Any, old: Any, new: Any) -> Any:
    """The inner state as `init` makes it, moments zero, but for entries that stay in B.

    Also of entries that stay outside B: an optimizer may give those a state too.
    """

    def stays(old: Any, new: Any) -> Any:
        return None if is_dense(old) else unpack(old).backward & unpack(new).backward

    _, treedef = flatten(params)
    rows = _rows(stays, treedef.flatten_up_to(old), treedef.flatten_up_to(new))
    marked = map_parameter_shaped(
        lambda _, stays: _Kept(stays), inner_state, params, treedef.unflatten(rows)
    )
    return jax.tree.map(
        lambda mark, now, first: mark.of(now, first) if isinstance(mark, _Kept) else now,
        marked, inner_state, plan.inner.init(params),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Kept:
    mask: jax.Array

    def of(self, now: jax.Array, first: jax.Array) -> jax.Array:
        return jnp.where(self.mask, now, first.astype(now.dtype))


def rounded(update: jax.Array, step: jax.Array) -> jax.Array:
    """The same bits, in a way that no compiler sees through.

    It keeps one from making one instruction of a product and the sum that it goes into (the
    optimizer's last product and `apply_updates`), which would round once where another program
    rounds twice: on masks and always sparse, training is to be the same.
    """
    integer = jnp.dtype(f"i{update.dtype.itemsize}")
    nothing = (step >> 31).astype(integer)  # steps are not negative
    bits = jax.lax.bitcast_convert_type(update, integer)
    return jax.lax.bitcast_convert_type(bits ^ nothing, update.dtype)
