"""Which leaves are sparse, as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from topkast_jax.errors import SparsityError
from topkast_jax.method import Counts, Leaf
from topkast_jax.rules import check_arrays
from topkast_jax.sparsify import check_transformation, observing_leaves
from topkast_jax.trees import flatten_with_names


def describe(params: Any, tx: optax.GradientTransformation) -> str:
    """Which leaves are sparse, at which densities.

    Args:
      params: tree of parameters, or of their shapes.
      tx: a sparsity method's transformation, or any that holds one. Nothing is computed, but for
        the hyperparameters of `optax.inject_hyperparams` at the first step.

    Returns:
      A table with a line for each leaf: its path, shape, pattern, forward and backward density, and
      the active entries (in the forward set) and the updated ones (in the backward set) of all
      entries; then a line with the sums.

    Raises:
      SparsityError: `tx` holds no sparsity method, or its rules do not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import topkast_jax as tk
      >>> params = {"w": jnp.ones((8, 10)), "b": jnp.ones(10)}
      >>> print(tk.describe(params, tk.top_kast(optax.sgd(0.1), 0.1, 0.2)))
      leaf  shape   pattern       forward  backward  active  updated  entries
      b     (10,)   dense               1         1      10       10       10
      w     (8, 10) Unstructured()    0.1       0.2       8       16       80
      all                                                18       26       90
    """
    seen = decided_leaves(params, tx)
    if not seen:
        raise SparsityError("describe: this transformation holds no sparsity method")
    found: dict[str, Leaf] = {}
    for leaves in seen:
        found.update({path: leaf for path, leaf in leaves.items() if leaf is not None})
    return table(params, found)


def decided_leaves(params: Any, tx: optax.GradientTransformation) -> list[dict[str, Leaf | None]]:
    """How the leaves are sparse for each sparsity method inside a transformation.

    Args:
      params: tree of parameters, or of their shapes.
      tx: any transformation.

    Returns:
      For each method its leaves by path, None where they are dense. Their numbers are concrete,
      those too that come from hyperparameters of `optax.inject_hyperparams`.

    Raises:
      SparsityError: `tx` is no transformation, a leaf of `params` is no array, or the rules do not
        fit the parameters.
    """
    check_transformation("tx", tx)
    names, arrays, treedef = flatten_with_names(params)
    check_arrays(names, arrays)
    seen: list[dict[str, Leaf | None]] = []

    def decide(params: Any) -> list[dict[str, Any]]:
        seen.clear()
        with observing_leaves(seen.append):
            tx.init(params)
        return [{path: _numbers(leaf) for path, leaf in leaves.items()} for leaves in seen]

    def decide_by_shapes() -> list[dict[str, Any]]:
        zeros = [jnp.zeros(jnp.shape(x), jnp.result_type(x)) for x in arrays]
        return decide(treedef.unflatten(zeros))

    jax.eval_shape(decide, params)
    traced = [_numbers(leaf) for leaves in seen for leaf in leaves.values()]
    if not any(isinstance(number, jax.core.Tracer) for number in jax.tree.leaves(traced)):
        return seen
    # The numbers depend on no parameter, so that nothing else is left of the compiled function.
    concrete = jax.jit(decide_by_shapes)()
    return [
        {path: _with_numbers(leaf, numbers[path]) for path, leaf in leaves.items()}
        for leaves, numbers in zip(seen, concrete, strict=True)
    ]


def _numbers(leaf: Leaf | None) -> Any:
    return None if leaf is None else (leaf.forward_density, leaf.backward_density, leaf.counts)


def _with_numbers(leaf: Leaf | None, numbers: Any) -> Leaf | None:
    if leaf is None:
        return None
    forward, backward, counts = numbers
    return dataclasses.replace(
        leaf, forward_density=forward, backward_density=backward, counts=Counts(*counts)
    )


def table(params: Any, leaves: Mapping[str, Leaf | None]) -> str:
    """The table of `describe`.

    Args:
      params: tree of parameters, or of their shapes.
      leaves: how each leaf is sparse, by its path; None, or no entry, where it is dense.
    """
    names, arrays, _ = flatten_with_names(params)
    rows = [
        _row(name, jnp.shape(x), leaves.get(name)) for name, x in zip(names, arrays, strict=True)
    ]
    sums = [sum(row[i] for row in rows) for i in (5, 6, 7)]
    header = ["leaf", "shape", "pattern", "forward", "backward", "active", "updated", "entries"]
    return _aligned([header, *rows, ["all", "", "", "", "", *sums]])


def _row(name: str, shape: tuple[int, ...], leaf: Leaf | None) -> list[Any]:
    entries = math.prod(shape)
    if leaf is None:
        return [name, shape, "dense", 1, 1, entries, entries, entries]
    kept, updated = (leaf.entries_in(int(count)) for count in leaf.counts)
    densities = (f"{float(d):.4g}" for d in (leaf.forward_density, leaf.backward_density))
    return [name, shape, leaf.pattern, *densities, kept, updated, entries]


def _aligned(rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    is_text = [True, True, True, False, False, False, False, False]
    lines = [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, is_text, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)
