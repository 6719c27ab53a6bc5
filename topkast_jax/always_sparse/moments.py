"""What an inner optimizer holds of the units of each leaf, wherever in its state that lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.always_sparse.layout import Layout, on_host
from topkast_jax.always_sparse.refresh import Mover
from topkast_jax.errors import SparsityError
from topkast_jax.method import Leaf
from topkast_jax.trees import flatten

Path = tuple[Any, ...]


class Moments:
    """The arrays of an inner optimizer's state that number the units of a leaf.

    A refresh moves them to the next backward set. Units that enter get what the optimizer's `init`
    makes of them.
    """

    def __init__(self, layout: Layout, init: Callable[[Any], Any], values: Any):
        """Looks for the arrays in abstract states.

        Args:
          layout: the leaves.
          init: of the optimizer.
          values: abstract tree of values.

        Raises:
          SparsityError: an array depends on the units in a way that a refresh cannot follow.
        """
        leaves = {
            name: None if host is None else host.leaf
            for name, host in zip(layout.names, layout.leaves, strict=True)
        }
        self._axes = _unit_axes(init, values, leaves)
        self._first = [
            _first_arrays(init, mine, number, values, len(leaf.stack) if leaf else 0)
            for number, (leaf, mine) in enumerate(zip(leaves.values(), self._axes, strict=True))
        ]

    def moved(self, number: int, mover: Mover, state: dict[Path, Any]) -> dict[Path, jax.Array]:
        """What is held of a leaf's units after a refresh.

        Args:
          number: of the leaf.
          mover: moves it.
          state: the optimizer's state by path.
        """
        axes = self._axes[number]
        if not axes:
            return {}
        first = self._first[number](mover.fresh)
        return {
            path: mover.moment(state[path], first.pop(jax.tree_util.keystr(path)), axis)
            for path, axis in axes.items()
        }

    def begun(
        self, number: int, entered: np.ndarray, values: jax.Array, state: dict[Path, Any]
    ) -> dict[Path, np.ndarray]:
        """What is held of a leaf's units when some of them have entered and begin anew.

        Args:
          number: of the leaf.
          entered: which ones, bool `[*stack, units]`.
          values: of all of them.
          state: the optimizer's state by path.
        """
        first = self._first[number](values)

        def begun(array: Any, fresh: jax.Array, axis: int) -> np.ndarray:
            fits = entered.reshape(*entered.shape, *(1,) * (fresh.ndim - axis - 1))
            return np.where(fits, on_host(fresh), on_host(array))

        return {
            path: begun(state[path], first[jax.tree_util.keystr(path)], axis)
            for path, axis in self._axes[number].items()
        }


def _unit_axes(
    init: Callable[[Any], Any], values: Any, leaves: Mapping[str, Leaf | None]
) -> list[dict[Path, int]]:
    """Which axis of which array of an optimizer's state numbers the units of each leaf.

    An array does if with one unit fewer it would be shorter by one along one axis. Nothing asks
    which optimizer it is, nor where in its state the array lies.

    Args:
      init: of the optimizer.
      values: abstract tree of values.
      leaves: by path, in flattening order; None where a leaf is dense.

    Returns:
      Path in the state → axis, for each leaf.

    Raises:
      SparsityError: an array depends on the units in a way that a refresh cannot follow.
    """
    shapes = _shapes_of(init, values)
    arrays, treedef = flatten(values)
    axes: list[dict[Path, int]] = [{} for _ in leaves]
    for number, (name, leaf) in enumerate(leaves.items()):
        if leaf is None:
            continue
        fewer = list(arrays)
        fewer[number] = _without_one_unit(arrays[number], len(leaf.stack))
        others = _shapes_of(init, treedef.unflatten(fewer))
        for path, shape in shapes.items():
            if others.get(path) != shape:
                units = arrays[number].shape[len(leaf.stack)]
                axis = _unit_axis(shape, others.get(path), leaf.stack, units)
                if axis is None:
                    raise SparsityError(
                        f"the inner optimizer's state{jax.tree_util.keystr(path)} {shape} depends "
                        f"on the units of {name} in a way that a refresh cannot follow: take "
                        "another optimizer, or pattern"
                    )
                axes[number][path] = axis
    return axes


def _shapes_of(init: Callable[[Any], Any], values: Any) -> dict[Path, tuple[int, ...]]:
    state = jax.eval_shape(init, values)
    return {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(state)}


def _without_one_unit(values: jax.ShapeDtypeStruct, stack: int) -> jax.ShapeDtypeStruct:
    *layers, units = values.shape[: stack + 1]
    return jax.ShapeDtypeStruct((*layers, units - 1, *values.shape[stack + 1 :]), values.dtype)


def _unit_axis(
    shape: tuple[int, ...], fewer: tuple[int, ...] | None, stack: tuple[int, ...], units: int
) -> int | None:
    """The axis that is shorter by one with one unit fewer; None if that is not all that differs."""
    if fewer is None or len(fewer) != len(shape):
        return None
    differ = [i for i, pair in enumerate(zip(shape, fewer, strict=True)) if len({*pair}) > 1]
    if len(differ) != 1:
        return None
    (axis,) = differ
    first = axis - len(stack)
    numbers_units = shape[axis] == units == fewer[axis] + 1
    return axis if first >= 0 and shape[first:axis] == stack and numbers_units else None


def _first_arrays(
    init: Callable[[Any], Any],
    axes: dict[Path, int],
    number: int,
    values: Any,
    stack: int,
) -> Callable[[jax.Array | np.ndarray], dict[str, jax.Array]]:
    """What an optimizer's `init` makes of some units of one leaf: arrays by `keystr` of their path.

    The units are `[*stack, m, …]`. Compiled for this leaf alone, so that no others take memory: of
    `values`, the abstract tree, all others are zeros there.
    """
    others, treedef = flatten(values)

    def first(units: jax.Array) -> dict[str, jax.Array]:
        m, arrays = units.shape[stack], [jnp.zeros(x.shape, x.dtype) for x in others]
        # `init` sees as many units as the leaf has: what it makes may depend on their number.
        missing = [(0, all_ - n) for all_, n in zip(arrays[number].shape, units.shape, strict=True)]
        arrays[number] = jnp.pad(units, missing)
        state = dict(jax.tree_util.tree_leaves_with_path(init(treedef.unflatten(arrays))))
        return {
            jax.tree_util.keystr(path): jax.lax.slice_in_dim(state[path], 0, m, axis=axis)
            for path, axis in axes.items()
        }

    return jax.jit(first)
