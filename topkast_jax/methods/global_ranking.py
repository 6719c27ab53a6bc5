"""Counts that come from one ranking over all layers of all leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.errors import SparsityError
from topkast_jax.method import Count, Leaf
from topkast_jax.selection import counts_of_global_top_k


def global_counts(
    values: Mapping[str, jax.Array], leaves: Mapping[str, Leaf], kept: Mapping[str, Count]
) -> dict[str, jax.Array]:
    """How many of the units of largest magnitude in the network lie in each layer.

    Args:
      values: what is ranked, by leaf, stacked axes in front.
      leaves: by leaf.
      kept: units that one layer of each leaf would keep on its own; together they are the budget.

    Returns:
      int32 counts by leaf, of the shape of its stacked axes.
    """
    scores: dict[tuple[str, int], jax.Array] = {}
    budget = jnp.int32(0)
    for path, leaf in leaves.items():
        layers = values[path].reshape(-1, *leaf.shape)
        for number in range(layers.shape[0]):
            unit = leaf.pattern.magnitudes(layers[number])
            scores[path, number] = unit.astype(jnp.float32)
        budget = budget + jnp.sum(
            jnp.broadcast_to(jnp.asarray(kept[path], jnp.int32), leaf.stack), dtype=jnp.int32
        )
    found = counts_of_global_top_k({f"{path}#{i}": s for (path, i), s in scores.items()}, budget)
    result = {}
    for path, leaf in leaves.items():
        own = [found[f"{path}#{i}"] for i in range(math.prod(np.array(leaf.stack, int)))]
        result[path] = jnp.stack(own).reshape(leaf.stack)
    return result


def refuse_groups(method: str, leaves: Mapping[str, Leaf]) -> None:
    """Raises SparsityError where a pattern fixes how many units each group of a layer keeps."""
    for path, leaf in leaves.items():
        if leaf.pattern.groups(leaf.shape) > 1:
            raise SparsityError(
                f"{path}: {method} moves units between layers, and {leaf.pattern} fixes how many "
                "each group keeps; allowed: Unstructured(), Block(rows, cols), Channel()"
            )
