"""Small dense models: as many parameters as a sparse model of the full width runs on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

import topkast_jax as tk
from experiments.errors import UserError
from experiments.training.methods import read_rules
from topkast_jax import rules as tk_rules
from topkast_jax.trees import flatten_with_names

Tree = Any


def full_width(config: ConfigDict) -> ConfigDict | None:
    """The config of the dense network of full width; None if the config's own is not narrower."""
    small = config.model.get("small_dense")
    if small is None or small.forward_density == 1:
        return None
    full = config.copy_and_resolve_references()
    full.model.small_dense.forward_density = 1.0
    return full


def parameters(params: Tree) -> int:
    """The number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in flatten_with_names(params)[1])


def active_parameters(params: Tree, rules: Any, density: float) -> int:
    """The number of parameters in the forward set, if rules and density make them sparse.

    Args:
        params: the abstract parameters.
        rules: rules as in a config.
        density: the forward density, in (0, 1].
    """
    names, leaves, _ = flatten_with_names(params)
    tree = dict(zip(names, leaves, strict=True))
    chosen = read_rules(rules) if rules else None
    found = tk_rules.resolve(tree, chosen, density, 1.0, tk.Unstructured())
    return sum(
        math.prod(tree[name].shape) if leaf is None else leaf.entries_in(int(leaf.counts.forward))
        for name, leaf in found.items()
    )


def widest(parameters_at: Callable[[int], int], full: int, budget: int) -> int:
    """The largest width below `full` at which a model has at most `budget` parameters.

    Args:
        parameters_at: the number of parameters at a width, which grows with the width.
        full: the width of the full model.
        budget: the number of parameters allowed.

    Raises:
        UserError: there is none.
    """
    low, high = 0, full
    while high - low > 1:
        half = (low + high) // 2
        low, high = (half, high) if parameters_at(half) <= budget else (low, half)
    if low == 0:
        raise UserError(f"config.model.small_dense: no model is as small as {budget} parameters")
    return low
