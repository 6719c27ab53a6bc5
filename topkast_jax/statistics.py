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
from topkast_jax.method import Method
from topkast_jax.selection import MOST_ENTRIES
from topkast_jax.sets import (
    CompactState,
    SparsifyState,
    find_states,
    leaf_flags,
    nodes_of,
    presents,
)
from topkast_jax.sparsify import Plan
from topkast_jax.trees import flatten_with_names, without_variables

__all__ = [
    "CountsOverSteps",
    "Flops",
    "LeafCounts",
    "churn_since_last_refresh",
    "churn_since_start",
    "flops",
    "leaf_counts",
    "leaf_flops",
    "mask_statistics",
    "planned_counts",
    "reservoir_ever_active",
    "start_leaf_counts",
]


class LeafCounts(NamedTuple):
    """Entries of one leaf, counted; a mean over steps is no whole number.

    Attributes:
      entries: all of them.
      forward: those in the forward set (all of a dense leaf).
      backward: those in the backward set (all of a dense leaf); as a mean over steps, those whose
        gradient was computed.
      sparse: whether a method governs the leaf.
    """

    entries: int
    forward: float
    backward: float
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
    """Share of the present forward set that was not in the first one, over all sparse leaves.

    Args:
      params: tree of parameters.
      state: the optimizer state they are trained with.

    Returns:
      Float32 scalar in [0, 1].

    Raises:
      SparsityError: `state` holds no sparsity state, or one of other parameters.
    """
    return _share(_sparse_flags(params, state), _lacks(START_FORWARD), _has(FORWARD))


def churn_since_last_refresh(params: Any, state: Any) -> jax.Array:
    """Share of the present forward set that was not in the one before the last refresh.

    Args:
      params: tree of parameters.
      state: the optimizer state they are trained with.

    Returns:
      Float32 scalar in [0, 1], over all sparse leaves.

    Raises:
      SparsityError: `state` holds no sparsity state, or one of other parameters.
    """
    return _share(_sparse_flags(params, state), _lacks(LAST_FORWARD), _has(FORWARD))


def reservoir_ever_active(params: Any, state: Any) -> jax.Array:
    """Share of the entries outside the first backward set that were ever in the forward set.

    Args:
      params: tree of parameters.
      state: the optimizer state they are trained with.

    Returns:
      Float32 scalar in [0, 1], over all sparse leaves; 0 if the first backward set is everything.

    Raises:
      SparsityError: `state` holds no sparsity state, or one of other parameters.
    """
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
    return start_leaf_counts(params, state)()


def start_leaf_counts(
    params: Any, state: Any = None, *, of_last_step: bool = False
) -> Callable[[], dict[str, LeafCounts]]:
    """Counts like `leaf_counts`, and leaves the waiting for later.

    Args:
      params: tree of parameters.
      state: the optimizer state they are trained with; None counts every leaf as dense.
      of_last_step: whether the sets are those that the last update used; otherwise those of the
        next one, which are chosen for the count where a choice is due.

    Returns:
      A function that waits for the device and returns the counts by leaf path.

    Raises:
      SparsityError: as `leaf_counts`.
    """
    if nodes_of(params, SparsifyState) or nodes_of(params, CompactState):
        raise SparsityError(
            "leaf_counts(params, state): found an optimizer state in place of the parameters"
        )
    names, leaves, _ = flatten_with_names(params)
    entries = {n: math.prod(jnp.shape(x)) for n, x in zip(names, leaves, strict=True)}
    flags: dict[str, Any] = {}
    if state is not None and of_last_step:
        for one in map(without_variables, find_states(state)):
            flags |= leaf_flags(one)
    elif state is not None:
        flags = presents(params, state).flags
    counted = _leaf_counts(flags)

    def counts(name: str) -> LeafCounts:
        if name not in flags:
            return LeafCounts(entries[name], entries[name], entries[name], False)
        forward, backward = (int(c.astype(np.int64).sum()) for c in jax.device_get(counted[name]))
        return LeafCounts(entries[name], forward, backward, True)

    return lambda: {name: counts(name) for name in names}


@jax.jit
def _leaf_counts(flags: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {n: (_counted(has(f, FORWARD)), _counted(has(f, BACKWARD))) for n, f in flags.items()}


class CountsOverSteps:
    """The counts of leaves, added up over training steps.

    Attributes:
      steps: how many steps were added.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None):
        """Starts from nothing, or from what `saved` of another object returned."""
        self.steps: int = saved["steps"] if saved else 0
        self._sums: dict[str, list[Any]] = (
            {k: [*v] for k, v in saved["sums"].items()} if saved else {}
        )

    def add(self, counts: Mapping[str, LeafCounts], steps: int, dense_gradients: int = 0) -> None:
        """Adds steps.

        Args:
          counts: by leaf, the same in each of these steps.
          steps: how many there are.
          dense_gradients: in how many of them the method needs the gradient of whole leaves; see
            `topkast_jax.sparsify.Plan.dense_gradients`.
        """
        self.steps += steps
        for name, leaf in counts.items():
            # Python's integers, which do not overflow whatever a count was made of.
            entries, forward, backward = map(int, leaf[:3])
            sums = self._sums.setdefault(name, [entries, 0, 0, leaf.sparse])
            sums[1] += forward * steps
            sums[2] += backward * (steps - dense_gradients) + entries * dense_gradients

    def mean(self) -> dict[str, LeafCounts]:
        """The mean counts by leaf; `flops` of them are the mean FLOPs of a step."""
        return {
            name: LeafCounts(entries, forward / self.steps, backward / self.steps, sparse)
            for name, (entries, forward, backward, sparse) in self._sums.items()
        }

    def saved(self) -> dict[str, Any]:
        """The sums, as a value that `json.dumps` accepts."""
        return {"steps": self.steps, "sums": {name: [*sums] for name, sums in self._sums.items()}}


def planned_counts(
    plan: Plan | None, params: Any, steps: int
) -> tuple[dict[str, LeafCounts], dict[str, LeafCounts]]:
    """The counts of a run before it is made, from shapes alone.

    Args:
      plan: `tx.plan` of a sparsity method; its numbers must be plain. None: every leaf is dense.
      params: tree of parameters, or of their shapes.
      steps: how many steps the run takes, at least 1.

    Returns:
      The counts of the last step, and their mean over all steps as `CountsOverSteps.mean` returns
      it. Both follow from `Method.scheduled`. Where `Method.allocate` moves units between leaves,
      the counts of a leaf in the run may differ.
    """
    names, arrays, _ = flatten_with_names(params)
    entries = {name: math.prod(np.shape(x)) for name, x in zip(names, arrays, strict=True)}
    leaves = plan.sparse_leaves(params) if plan else {}
    whole = {name: LeafCounts(n, n, n, False) for name, n in entries.items()}

    @jax.jit
    def scheduled(finished: Any) -> Any:
        assert plan is not None
        return {path: plan.method.scheduled(leaf, finished) for path, leaf in leaves.items()}

    every = int(plan.refresh_every or steps) if plan else steps

    def after(finished: int) -> dict[str, LeafCounts]:
        assert plan is not None
        full = finished == 0 and plan.method.first_choice == "first_update"
        stopped = plan.stop_exploring_at is not None and finished >= int(plan.stop_exploring_at)
        found = {}
        for path, pair in scheduled(finished // every * every).items():
            kept, updated = (leaves[path].entries_in(int(count)) for count in pair)
            kept, updated = (entries[path],) * 2 if full else (kept, kept if stopped else updated)
            found[path] = LeafCounts(entries[path], kept, updated, True)
        return whole | found

    sums = CountsOverSteps()
    if plan is None:
        sums.add(whole, steps)
        return whole, sums.mean()
    changes = {1, steps}
    if type(plan.method).scheduled is not Method.scheduled:
        changes.update(range(every, steps + 1, every))
    if plan.stop_exploring_at is not None:
        changes.add(min(steps, max(1, int(plan.stop_exploring_at))))
    first, counts = 1, after(0)
    for step in sorted(changes):
        sums.add(counts, step + 1 - first, plan.dense_gradients(first, step))
        if step < steps:
            first, counts = step + 1, after(step)
    return counts, sums.mean()


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass and what sparsity leaves of them.

    Attributes:
      dense: FLOPs of one forward pass of the dense network, 2 for each multiply-add.
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
      counts: from `leaf_counts`, or a mean of `CountsOverSteps`.

    Returns:
      Totals and fractions.
    """
    dense = sum(by_leaf.values())

    def fraction(density: Callable[[LeafCounts], float]) -> float:
        left = [f * density(counts[n]) if n in counts else f for n, f in by_leaf.items()]
        return sum(left) / dense if dense else 1.0

    return Flops(
        dense,
        fraction(lambda leaf: leaf.forward / max(1, leaf.entries)),
        fraction(lambda leaf: leaf.backward / max(1, leaf.entries)),
    )
