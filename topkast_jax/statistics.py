"""What the sets are doing: densities, churn, use of the reservoir, FLOPs. Always from masks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.errors import SparsityError
from topkast_jax.flags import (
    BACKWARD,
    EVER_FORWARD,
    FORWARD,
    LAST_FORWARD,
    START_BACKWARD,
    START_FORWARD,
    has,
)
from topkast_jax.flops import leaf_flops
from topkast_jax.selection import MOST_ENTRIES
from topkast_jax.sets import CompactState, SparsifyState, nodes_of, presents
from topkast_jax.trees import flatten_with_names

__all__ = [
    "Flops",
    "LeafCounts",
    "churn_since_last_refresh",
    "churn_since_start",
    "flops",
    "leaf_counts",
    "leaf_flops",
    "mask_statistics",
    "reservoir_ever_active",
]


class LeafCounts(NamedTuple):
    """Entries of one leaf, counted.

    Attributes:
      entries: all of them.
      forward: those in the forward set (all of a dense leaf).
      backward: those in the backward set (all of a dense leaf).
      sparse: whether a method governs the leaf.
    """

    entries: int
    forward: int
    backward: int
    sparse: bool


def _sparse_flags(params: Any, state: Any) -> list[jax.Array]:
    return list(presents(params, state).flags.values())


def _counted(condition: jax.Array) -> jax.Array:
    """int32 counts over as many of the last axes as hold fewer than 2**31 entries together."""
    shape, first = condition.shape, condition.ndim
    while first > 0 and math.prod(shape[first - 1 :]) <= MOST_ENTRIES:
        first -= 1
    return jnp.sum(condition, axis=tuple(range(first, condition.ndim)), dtype=jnp.int32)


def _count(condition: jax.Array) -> jax.Array:
    return jnp.sum(_counted(condition).astype(jnp.float32))


def _share(flags: list[jax.Array], of: Callable[..., Any], among: Callable[..., Any]) -> jax.Array:
    """Entries of which `of` holds, as a share of those of which `among` holds; 0 of none."""
    part = sum((_count(of(f) & among(f)) for f in flags), jnp.float32(0))
    whole = sum((_count(among(f)) for f in flags), jnp.float32(0))
    return part / jnp.maximum(whole, jnp.float32(1))


def _has(bit: int) -> Callable[[jax.Array], jax.Array]:
    return lambda flags: has(flags, bit)


def _lacks(bit: int) -> Callable[[jax.Array], jax.Array]:
    return lambda flags: ~has(flags, bit)


def _all(flags: jax.Array) -> jax.Array:
    return jnp.ones_like(flags, dtype=bool)


def churn_since_start(params: Any, state: Any) -> jax.Array:
    """Share of the present forward set that was not in the first one, over all sparse leaves."""
    return _share(_sparse_flags(params, state), _lacks(START_FORWARD), _has(FORWARD))


def churn_since_last_refresh(params: Any, state: Any) -> jax.Array:
    """Share of the present forward set that was not in the one before the last refresh."""
    return _share(_sparse_flags(params, state), _lacks(LAST_FORWARD), _has(FORWARD))


def reservoir_ever_active(params: Any, state: Any) -> jax.Array:
    """Share of the first reservoir (outside the first backward set) ever in the forward set."""
    return _share(_sparse_flags(params, state), _has(EVER_FORWARD), _lacks(START_BACKWARD))


def mask_statistics(params: Any, state: Any) -> dict[str, jax.Array]:
    """Float32 scalars over all sparse leaves, in one jittable call.

    Args:
      params: tree of parameters.
      state: the optimizer state they are trained with.

    Returns:
      forward_density, backward_density, churn_since_start, churn_since_last_refresh,
      reservoir_ever_active.

    Raises:
      SparsityError: `state` holds no sparsity state.
    """
    flags = _sparse_flags(params, state)
    return {
        "forward_density": _share(flags, _has(FORWARD), _all),
        "backward_density": _share(flags, _has(BACKWARD), _all),
        "churn_since_start": _share(flags, _lacks(START_FORWARD), _has(FORWARD)),
        "churn_since_last_refresh": _share(flags, _lacks(LAST_FORWARD), _has(FORWARD)),
        "reservoir_ever_active": _share(flags, _has(EVER_FORWARD), _lacks(START_BACKWARD)),
    }


def leaf_counts(params: Any, state: Any = None) -> dict[str, LeafCounts]:
    """Counts each leaf's sets on the device and brings the counts to the host.

    Args:
      params: tree of parameters.
      state: the optimizer state they are trained with; None counts every leaf as dense.

    Returns:
      Leaf path → counts.

    Raises:
      SparsityError: `params` is an optimizer state, or `state` holds no sparsity state.
    """
    if nodes_of(params, SparsifyState) or nodes_of(params, CompactState):
        raise SparsityError(
            "leaf_counts(params, state): found an optimizer state in place of the parameters"
        )
    names, leaves, _ = flatten_with_names(params)
    flags = {} if state is None else presents(params, state).flags
    counted = jax.device_get({name: _leaf_counts(f) for name, f in flags.items()})
    result = {}
    for name, leaf in zip(names, leaves, strict=True):
        entries = math.prod(jnp.shape(leaf))
        if name in counted:
            forward, backward = (int(c.astype(np.int64).sum()) for c in counted[name])
            result[name] = LeafCounts(entries, forward, backward, True)
        else:
            result[name] = LeafCounts(entries, entries, entries, False)
    return result


@jax.jit
def _leaf_counts(flags: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _counted(has(flags, FORWARD)), _counted(has(flags, BACKWARD))


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass and what sparsity leaves of them.

    Attributes:
      dense: FLOPs of the dense network.
      inference_fraction: f(A): share left when every leaf's products cost its forward density.
      backward_fraction: f(B): the same at the backward density.
    """

    dense: float
    inference_fraction: float
    backward_fraction: float

    @property
    def training_fraction(self) -> float:
        """(2 f(A) + f(B)) / 3: the forward pass and the activations' gradient over A, dW over B."""
        return (2.0 * self.inference_fraction + self.backward_fraction) / 3.0


def flops(by_leaf: Mapping[str, float], counts: Mapping[str, LeafCounts]) -> Flops:
    """FLOPs at the counted densities.

    Args:
      by_leaf: dense FLOPs of each leaf, from `leaf_flops`; what is no leaf's stays dense.
      counts: from `leaf_counts`.

    Returns:
      Totals and fractions.
    """
    dense = sum(by_leaf.values())

    def fraction(density: Callable[[LeafCounts], float]) -> float:
        left = [f * density(counts[n]) if n in counts else f for n, f in by_leaf.items()]
        return sum(left) / dense if dense else 1.0

    return Flops(
        dense,
        fraction(lambda leaf: leaf.forward / leaf.entries),
        fraction(lambda leaf: leaf.backward / leaf.entries),
    )
