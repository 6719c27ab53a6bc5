"""FLOPs of a network by parameter leaf, read off its jaxpr."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from topkast_jax.trees import flatten_with_names

OTHER = "other"

# What moves or retypes a parameter without mixing it with anything else.
_LAYOUT = frozenset({
    "broadcast_in_dim", "convert_element_type", "copy", "dynamic_slice", "expand_dims", "pad",
    "reduce_precision", "reshape", "reshard", "rev", "sharding_constraint", "slice", "split",
    "squeeze", "stop_gradient", "transpose", "name", "unstack",
})  # fmt: skip


def leaf_flops(function: Callable[..., Any], params: Any, *args: Any) -> dict[str, float]:
    """FLOPs of one call, by the parameter leaf whose product they are; nothing is computed.

    Every matrix product and convolution counts 2 FLOPs for each multiply-add, padding included. It
    belongs to the leaf that is one of its operands, perhaps reshaped, cast or sliced; products of
    activations with each other belong to "other". The body of `lax.scan` counts once for each
    iteration and the body of `lax.while_loop` once. Of the branches of `lax.cond`, only the one
    with the most FLOPs counts. A lookup in an embedding table counts 0; where the table is also the
    kernel of the softmax, that product counts. Inside `jax.shard_map`, the FLOPs are those of one
    device.

    Args:
      function: called as `function(params, *args)`.
      params: tree of arrays or `jax.ShapeDtypeStruct`.
      *args: further arguments, likewise.

    Returns:
      Leaf path → FLOPs, with one more entry "other".
    """
    names, _, _ = flatten_with_names(params)
    closed = jax.make_jaxpr(function)(params, *args)
    total = dict.fromkeys([*names, OTHER], 0.0)
    labels: list[str | None] = [*names]
    labels += [None] * (len(closed.jaxpr.invars) - len(names))
    _walk(closed.jaxpr, labels, 1, total)
    return total


def _walk(jaxpr: Any, labels: Sequence[str | None], times: int, total: dict[str, float]) -> list:
    """Adds a jaxpr's FLOPs to `total`; returns the labels of its outputs."""
    known = dict(zip(jaxpr.invars, labels, strict=True))

    def label(atom: Any) -> str | None:
        return None if isinstance(atom, core.Literal) else known.get(atom)

    for eqn in jaxpr.eqns:
        operands = [label(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            owner = next((o for o in operands if o is not None), OTHER)
            total[owner] += times * _product_flops(eqn)
        elif name in _LAYOUT:
            known.update(dict.fromkeys(eqn.outvars, operands[0]))
        elif name == "optimization_barrier":
            known.update(zip(eqn.outvars, operands, strict=True))
        else:
            inner = _inner(eqn, operands)
            if inner is not None:
                outputs = _walk_inner(*inner, times, total)
                known.update(zip(eqn.outvars, outputs, strict=False))
    return [label(atom) for atom in jaxpr.outvars]


def _inner(eqn: Any, operands: list[str | None]) -> tuple[list[Any], list[str | None], int] | None:
    """The jaxprs an equation calls (alternatives), the labels of their inputs, and how often."""
    params: Mapping[str, Any] = eqn.params
    if "branches" in params:
        return [b.jaxpr for b in params["branches"]], operands[1:], 1
    if eqn.primitive.name == "while":
        skipped = params["cond_nconsts"]
        return [params["body_jaxpr"].jaxpr], operands[skipped:], 1
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        if key in params:
            jaxpr = getattr(params[key], "jaxpr", params[key])
            return [jaxpr], operands, int(params.get("length", 1))
    return None


def _walk_inner(
    jaxprs: list[Any], labels: list[str | None], length: int, times: int, total: dict[str, float]
) -> list[str | None]:
    """Walks the costliest of several alternatives."""
    results = []
    for jaxpr in jaxprs:
        if len(jaxpr.invars) != len(labels):
            labels = [None] * len(jaxpr.invars)
        counted = dict.fromkeys(total, 0.0)
        outputs = _walk(jaxpr, labels, times * length, counted)
        results.append((sum(counted.values()), counted, outputs))
    _, counted, outputs = max(results, key=lambda result: result[0])
    for name, flops in counted.items():
        total[name] += flops
    return outputs if length == 1 else [None] * len(outputs)


def _product_flops(eqn: Any) -> float:
    left, right = (atom.aval for atom in eqn.invars[:2])
    out = eqn.outvars[0].aval
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)
    numbers = eqn.params["dimension_numbers"]
    features = right.shape[numbers.rhs_spec[0]]
    return 2.0 * out.size * float(np.prod(right.shape)) / features
