"""Finds, in any optimizer's state, the arrays that hold one number for each parameter entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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
    """
    by_path = {}
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    columns = [flatten(params)[1].flatten_up_to(other) for other in others]
    for i, (path, leaf) in enumerate(paths):
        by_path[tuple(map(str, path))] = (jnp.shape(leaf), [column[i] for column in columns])

    def replace(path: tuple[Any, ...], array: Any) -> Any:
        names = tuple(map(str, path))
        for start in range(len(names) + 1):
            if names[start:] in by_path:
                shape, arguments = by_path[names[start:]]
                if any(a is None for a in arguments):
                    return array
                return function(array, *arguments) if jnp.shape(array) == shape else array
        return array

    return jax.tree_util.tree_map_with_path(replace, inner_state)
