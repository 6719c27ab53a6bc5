"""The same training state in its two representations, masked and always sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast_jax.always_sparse.host import HostLeaf, Reservoir, in_threads
from topkast_jax.always_sparse.kernel import values_of
from topkast_jax.always_sparse.layout import Layout, is_random_key, on_host, places_of
from topkast_jax.errors import SparsityError
from topkast_jax.inner_state import map_parameter_shaped
from topkast_jax.sets import NOT_DUE, CompactState, SparsifyState, presents
from topkast_jax.sparsify import Plan

Tree = Any
T = TypeVar("T")


def to_masked(
    layout: Layout,
    plan: Plan,
    params: Tree,
    state: T,
    reservoir: Reservoir,
    chooser: Any,
) -> tuple[Tree, T]:
    """Dense parameters and state; `AlwaysSparse.to_masked`, θ current in the reservoir."""
    theta = layout.unflatten(
        reservoir.theta[name] if leaf else on_host(array)
        for name, leaf, array in zip(
            layout.names, layout.leaves, layout.flatten(params), strict=True
        )
    )

    def scattered(array: jax.Array, leaf: HostLeaf) -> np.ndarray:
        dense = np.zeros((*leaf.leaf.stack, *leaf.leaf.shape), array.dtype)
        flags = reservoir.sets[leaf.path]
        in_threads(leaf.writes(dense, leaf.index(flags)[0], on_host(array)))
        return dense

    sets = layout.masks(reservoir)[1].sets

    def masked(compact: CompactState) -> SparsifyState:
        dense = layout.unflatten(layout.dense)
        _check("to_masked", compact.inner_state, plan.inner, dense)
        # No choice is due, so that the gradient of the last step is not read any more.
        unread = [
            optax.MaskedNode() if leaf is None else np.zeros(like.shape, like.dtype)
            for leaf, like in zip(layout.leaves, layout.dense, strict=True)
        ]
        return SparsifyState(
            compact.step, sets, dict(reservoir.memory), compact.inner_state,
            due=np.int8(NOT_DUE), chooser=chooser,
            gradient=layout.unflatten(unread) if plan.method.needs_gradient else (),
        )  # fmt: skip

    bare = replace_nodes(state, CompactState, lambda c: c._replace(kernels=None))
    moments = map_parameter_shaped(scattered, bare, params, layout.unflatten(layout.leaves))
    return theta, replace_nodes(jax.tree.map(_off_device, moments), CompactState, masked)


def _off_device(array: Any) -> Any:
    """The same, where a step that donates its arrays does not delete it."""
    if is_random_key(array):
        return jnp.copy(array)
    return on_host(array) if isinstance(array, jax.Array) else array


def sets_of(
    params: Tree, state: Any
) -> tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, Any]]]:
    """The sets of each sparse leaf of a masked run, on the host, by name.

    Returns:
      The flags before the choice that is due, and flags and memory after it; the flags are equal
      where none is due.
    """
    now = presents(params, state)
    was = {name: np.array(flags, order="C") for name, flags in now.was.items()}
    chosen = {
        name: (np.array(flags, order="C"), jax.device_get(now.memory[name]))
        for name, flags in now.flags.items()
    }
    return was, chosen


def from_masked(
    layout: Layout,
    inner: optax.GradientTransformation,
    params: Tree,
    state: T,
    reservoir: Reservoir,
    kernels: Tree,
    put: Callable[[Any], jax.Array],
) -> T:
    """The always-sparse state; `AlwaysSparse.from_masked`, with the kernels that it holds then."""

    def gather(array: jax.Array, leaf: HostLeaf) -> np.ndarray:
        index, _ = leaf.index(reservoir.sets[leaf.path])
        found = leaf.gather(np.asarray(array), index)
        return found.reshape(*leaf.leaf.stack, *found.shape[1:])

    def compact(masked: SparsifyState) -> CompactState:
        _check("from_masked", masked.inner_state, inner, values_of(kernels))
        return CompactState(masked.step, None, masked.inner_state)

    moments = map_parameter_shaped(gather, state, params, layout.unflatten(layout.leaves))
    bare = replace_nodes(moments, SparsifyState, compact)
    arrays = jax.Array | np.ndarray | np.generic
    placed = jax.tree.map(lambda x: put(x) if isinstance(x, arrays) else x, bare)
    return replace_nodes(placed, CompactState, lambda c: c._replace(kernels=places_of(kernels)))


def _check(what: str, found: Any, inner: optax.GradientTransformation, params: Tree) -> None:
    """Raises SparsityError unless an inner state is one that these parameters could have."""
    expected = jax.tree_util.tree_leaves_with_path(jax.eval_shape(inner.init, params))
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    held = dict(jax.tree_util.tree_leaves_with_path(found, is_leaf=is_masked))
    shapes = {path: np.shape(x) for path, x in held.items() if not is_masked(x)}
    for path, like in expected:
        if path in held and is_masked(held[path]):
            continue  # of a parameter that optax.partition or optax.masked gives to others
        if shapes.get(path) != like.shape:
            raise SparsityError(
                f"{what}: the inner optimizer's state{jax.tree_util.keystr(path)} would have "
                f"to turn from {shapes.get(path)} into {like.shape}: it has no such form"
            )


def replace_nodes(state: T, kind: type, function: Callable[[Any], Any]) -> T:
    """The optimizer state with each node of a kind replaced."""
    is_node = lambda node: isinstance(node, kind)  # noqa: E731
    return jax.tree.map(lambda n: function(n) if is_node(n) else n, state, is_leaf=is_node)
