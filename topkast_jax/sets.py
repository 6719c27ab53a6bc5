"""The state of a sparse leaf, and the views that are read from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from topkast_jax.errors import SparsityError
from topkast_jax.trees import flatten_with_names

FORWARD = 1
BACKWARD = 2
START_FORWARD = 4
START_BACKWARD = 8
LAST_FORWARD = 16
EVER_FORWARD = 32


class Sets(NamedTuple):
    """The sets of one leaf, named for what they keep; `forward` lies within `backward`.

    Attributes:
      forward: bool, the leaf's shape: entries the network runs on (the paper's A).
      backward: bool, the leaf's shape: entries that are updated (the paper's B).
    """

    forward: jax.Array
    backward: jax.Array


class SparsifyState(NamedTuple):
    """State of `sparsify`.

    Attributes:
      step: int32 scalar, finished steps.
      sets: tree of the parameters' structure; a sparse leaf holds uint8 of the parameter's shape,
        one bit for each set (`FORWARD`, `BACKWARD`, …) an entry is in; a dense leaf MaskedNode().
      memory: what the method remembers, by the name of each sparse leaf.
      inner_state: the inner optimizer's state.
    """

    step: jax.Array
    sets: Any
    memory: dict[str, Any]
    inner_state: Any


def is_dense(node: Any) -> bool:
    """Whether a node of `SparsifyState.sets` stands for a dense leaf."""
    return isinstance(node, optax.MaskedNode)


def unpack(flags: jax.Array) -> Sets:
    """The present sets of a leaf."""
    return Sets(flags & FORWARD != 0, flags & BACKWARD != 0)


def first_flags(sets: Sets) -> jax.Array:
    """Flags of sets that have just started."""
    forward = FORWARD | START_FORWARD | LAST_FORWARD | EVER_FORWARD
    backward = BACKWARD | START_BACKWARD
    return _pick(sets.forward, forward) | _pick(sets.backward, backward)


def next_flags(flags: jax.Array, sets: Sets) -> jax.Array:
    """Flags after a refresh: the new sets, and the history with the old forward set as the last."""
    history = flags & (START_FORWARD | START_BACKWARD | EVER_FORWARD)
    last = jnp.where(flags & FORWARD, jnp.uint8(LAST_FORWARD), jnp.uint8(0))
    new = _pick(sets.forward, FORWARD | EVER_FORWARD) | _pick(sets.backward, BACKWARD)
    return history | last | new


def frozen_flags(flags: jax.Array) -> jax.Array:
    """Flags with the forward set in use as the backward set too."""
    return jnp.where(flags & FORWARD, flags | BACKWARD, flags & ~jnp.uint8(BACKWARD))


def _pick(mask: jax.Array, bits: int) -> jax.Array:
    return jnp.where(mask, jnp.uint8(bits), jnp.uint8(0))


class CompactState(NamedTuple):
    """State of the always-sparse transform: what the device holds beside the values of B.

    Attributes:
      step: int32 scalar, finished steps.
      kernels: tree of the parameters' structure; a sparse leaf holds its compact kernel without
        values (where its units sit), a dense leaf MaskedNode().
      inner_state: the inner optimizer's state, over the tree of values.
    """

    step: jax.Array
    kernels: Any
    inner_state: Any


def find_compact(state: Any) -> CompactState | None:
    """The `CompactState` inside an optimizer state, wherever it sits, or None."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, CompactState))
    return next((node for node in nodes if isinstance(node, CompactState)), None)


def find_states(state: Any) -> list[SparsifyState]:
    """Every `SparsifyState` inside an optimizer state, wherever it sits.

    Raises:
      SparsityError: there is none, or an always-sparse one, whose sets are on the host.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, SparsifyState))
    found = [node for node in nodes if isinstance(node, SparsifyState)]
    if not found and find_compact(state) is not None:
        raise SparsityError(
            "this optimizer state is always sparse, and its sets are on the host: take "
            "AlwaysSparse.masks(reservoir), parameters and sets, in place of parameters and state"
        )
    if not found:
        raise SparsityError(
            "this optimizer state holds no sparsity state: make it with top_kast(...).init or "
            "another method's"
        )
    return found


def map_flags(function: Callable[[Any, jax.Array], Any], params: Any, state: Any) -> Any:
    """Maps `function(flags, parameter)` over the leaves; flags are None where a leaf is dense."""
    names, leaves, treedef = flatten_with_names(params)
    flags: dict[str, jax.Array] = {}
    for found in find_states(state):
        flags.update(zip(*flatten_with_names(found.sets)[:2], strict=True))
    strangers = [name for name in flags if name not in names]
    if strangers:
        raise SparsityError(f"the state is of other parameters: these lack {', '.join(strangers)}")
    rows = zip(names, leaves, strict=True)
    return treedef.unflatten([function(flags.get(name), leaf) for name, leaf in rows])


def forward_params(params: Any, state: Any) -> Any:
    """The parameters the network runs on: θ on the forward set, 0 elsewhere (the paper's α).

    Args:
      params: tree of parameters; always sparse, of values.
      state: the optimizer state they are trained with: `sparsify`'s, or any that holds it.

    Returns:
      A tree like `params`; dense leaves are the same arrays. Always sparse, sparse leaves are
      compact kernels, whose products run over the forward set.

    Raises:
      SparsityError: `state` holds no sparsity state, or `params` are not the values that an
        always-sparse one belongs to.
    """
    compact = find_compact(state)
    if compact is not None:
        return _with_kernels(params, compact.kernels)

    def view(flags: Any, theta: jax.Array) -> jax.Array:
        if flags is None:
            return theta
        return jnp.where(flags & FORWARD, theta, jnp.zeros_like(theta))

    return map_flags(view, params, state)


def _with_kernels(params: Any, kernels: Any) -> Any:
    names, values, treedef = flatten_with_names(params)
    rows = zip(names, values, treedef.flatten_up_to(kernels), strict=True)
    return treedef.unflatten(
        x if is_dense(kernel) else kernel.with_values(_fitting(name, x, kernel.index))
        for name, x, kernel in rows
    )


def _fitting(name: str, values: Any, index: Any) -> Any:
    if jnp.shape(values)[: index.ndim] != index.shape:
        raise SparsityError(
            f"{name} has shape {jnp.shape(values)} and this always-sparse state is of values "
            f"{index.shape}: take the tree of values that came with the state"
        )
    return values


def keep_masks(params: Any, state: Any) -> tuple[Any, Any]:
    """The forward and backward sets as trees of bool arrays, all True for dense leaves.

    Args:
      params: tree of parameters.
      state: the optimizer state they are trained with.

    Returns:
      (forward, backward), each a tree like `params`.

    Raises:
      SparsityError: `state` holds no sparsity state, or an always-sparse one: there it is
        ``keep_masks(*sparse.masks(reservoir))``.
    """

    def mask(bit: int) -> Any:
        return map_flags(
            lambda f, p: jnp.ones(jnp.shape(p), bool) if f is None else f & bit != 0, params, state
        )

    return mask(FORWARD), mask(BACKWARD)
