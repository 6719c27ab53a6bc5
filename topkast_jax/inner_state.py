"""Finds, in any optimizer's state, the arrays that hold one number for each parameter entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from topkast_jax.errors import SparsityError
from topkast_jax.trees import flatten


def map_parameter_shaped(
    function: Callable[..., Any],
    inner_state: Any,
    params: Any,
    *others: Any,
) -> Any:
    """Maps over the arrays of an optimizer state that are shaped like a parameter.

    An array belongs to a parameter when its path ends in the parameter's path (the longest such
    one) and it has the parameter's shape: true of the moments of every optax optimizer, whatever
    their type, and false of counters and of factored moments.

    Args:
      function: called with the array and the leaf of each of `others` at that parameter.
      inner_state: any optimizer's state.
      params: the tree of parameters that the optimizer sees.
      *others: trees of the structure of `params` (None leaves allowed: those are passed over).

    Returns:
      The state with those arrays replaced.

    Raises:
      SparsityError: an array holds the entries of all parameters in one row, as the moments of
        `optax.flatten` do, so that those of one parameter cannot be found. Inside `optax.masked`
        such an array holds those of some parameters, and is passed over.
    """
    by_path = {}
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    columns = [flatten(params)[1].flatten_up_to(other) for other in others]
    for i, (path, leaf) in enumerate(paths):
        by_path[tuple(map(str, path))] = (jnp.shape(leaf), [column[i] for column in columns])

    shapes = {shape for shape, _ in by_path.values()}
    entries = sum(math.prod(shape) for shape, _ in by_path.values())

    def replace(path: tuple[Any, ...], array: Any) -> Any:
        names = tuple(map(str, path))
        ends = (names[start:] for start in range(len(names) + 1))
        shape, arguments = next((by_path[end] for end in ends if end in by_path), (None, []))
        if jnp.shape(array) != shape:
            _refuse_flattened(path, array, shapes, entries)
            return array
        return array if any(a is None for a in arguments) else function(array, *arguments)

    return jax.tree_util.tree_map_with_path(replace, inner_state)


def _refuse_flattened(path: tuple[Any, ...], array: Any, shapes: set[Any], entries: int) -> None:
    """Raises SparsityError if an array is one row of the entries of all parameters."""
    shape = jnp.shape(array)
    floating = jnp.issubdtype(jnp.result_type(array), jnp.floating)
    if floating and entries > 1 and shape == (entries,) and shape not in shapes:
        raise SparsityError(
            f"the optimizer's state{jax.tree_util.keystr(path)} holds all {entries} parameter "
            "entries in one row, so that those of one parameter cannot be reset or moved: must be "
            "a tree like the parameters, as it is without optax.flatten"
        )
