"""Which leaves are sparse, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from topkast_jax.errors import SparsityError
from topkast_jax.method import Leaf
from topkast_jax.sparsify import observing_leaves
from topkast_jax.trees import flatten_with_names


def describe(params: Any, tx: optax.GradientTransformation) -> str:
    """Which leaves are sparse, at which densities.

    Args:
      params: tree of parameters, or of their shapes.
      tx: a sparsity method's transformation, or any that holds one. Nothing is computed.

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
    found: dict[str, Leaf] = {}
    seen: list[Mapping[str, Leaf | None]] = []
    with observing_leaves(seen.append):
        jax.eval_shape(tx.init, params)
    if not seen:
        raise SparsityError("describe: this transformation holds no sparsity method")
    for leaves in seen:
        found.update({path: leaf for path, leaf in leaves.items() if leaf is not None})
    return table(params, found)


def table(params: Any, leaves: Mapping[str, Leaf | None]) -> str:
    """The table of `describe`.

    Args:
      params: tree of parameters, or of their shapes.
      leaves: how each leaf is sparse, by its path; None, or no entry, where it is dense.
    """
    names, arrays, _ = flatten_with_names(params)
    rows = [
        _row(name, jax.numpy.shape(x), leaves.get(name))
        for name, x in zip(names, arrays, strict=True)
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
