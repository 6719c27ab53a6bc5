"""What a sparsity method receives and what it returns."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax

from topkast_jax.patterns import Pattern
from topkast_jax.selection import Count

Density = float | jax.Array


class Sets(NamedTuple):
    """The sets of one layer, named for what they keep; `forward` lies within `backward`.

    A method's `choose` gets and returns them by unit, `bool[leaf.grid]`; its `gradient` gets them
    by entry, in the shape of the gradient.

    Attributes:
      forward: units the network runs on (the paper's A).
      backward: units that are updated (the paper's B).
    """

    forward: jax.Array
    backward: jax.Array


class Counts(NamedTuple):
    """How many units of one layer the two sets keep: ints, or int32 scalars that may be traced.

    Attributes:
      forward: units in the forward set.
      backward: units in the backward set, at least `forward`.
    """

    forward: Count
    backward: Count


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One sparse leaf of the parameters: everything about it that its entries do not change.

    Attributes:
      shape: shape of one layer, without the stacked axes.
      dtype: type of the entries.
      pattern: what is kept together.
      forward_density: share of the units in the forward set, before rounding to whole units.
      backward_density: share of the units in the backward set, likewise.
      counts: units that one layer keeps at these densities.
      stack: sizes of the stacked axes, which number separate layers.
      axes: the positions of the stacked axes in the parameter's shape.
    """

    shape: tuple[int, ...]
    dtype: Any
    pattern: Pattern
    forward_density: Density
    backward_density: Density
    counts: Counts
    stack: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the array of units of one layer."""
        return self.pattern.grid(self.shape)

    def entries_in(self, units: int) -> int:
        """Entries of the whole leaf in so many units of each of its layers."""
        each = math.prod(self.shape) // math.prod(self.grid)
        return units * each * math.prod(self.stack)

    @property
    def size(self) -> int:
        """Entries of the whole leaf."""
        return math.prod(self.shape) * math.prod(self.stack)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the parameter, stacked axes included."""
        shape = list(self.shape)
        for axis, size in sorted(zip(self.axes, self.stack, strict=True)):
            shape.insert(axis, size)
        return tuple(shape)


class Layer(NamedTuple):
    """What a method sees of one layer when it chooses its sets.

    Attributes:
      theta: the parameters that the caller has, of the layer's shape.
      grad: the dense gradient at the forward view of the step before, of the layer's shape; None
        unless the method has `needs_gradient` (or chooses first from the first gradient), and at a
        first choice by `init`.
      sets: the sets in use, by unit; None at the first choice.
      memory: what the last choice returned; None at the first choice.
      key: random key of this layer and step.
      step: int32 scalar, finished steps.
    """

    theta: jax.Array
    grad: jax.Array | None
    sets: Sets | None
    memory: Any
    key: jax.Array
    step: jax.Array


class Method(abc.ABC):
    """How sets are chosen; `topkast_jax.sparsify` does everything else. Subclass it.

    All functions are traced and must be pure. Those of one layer are mapped over the layers of a
    stacked leaf and over leaves that are alike. `memory` is what a method wants to remember about a
    layer: any tree of scalars and of arrays of the layer's shape.

    Numbers among the attributes of a method (`int`, `float`, arrays of them, but not `bool`) may be
    hyperparameters of `optax.inject_hyperparams`: inside `choose`, `allocate` and `enter` they are
    traced scalars.

    Attributes:
      needs_gradient: whether `choose` and `allocate` read the dense gradient. The state then holds
        the last one, an array more for each sparse leaf, and training FLOPs count it at refreshes.
      observes_gradient: whether `observe` runs in every step on the dense gradient; training FLOPs
        count it in every step.
      explores: whether B may hold units that are not in A. If not, a backward density other than
        the forward density is refused.
      skips_update: whether the step whose gradient a refresh reads moves neither parameters nor
        inner state.
      last_choice_at: with `skips_update`, the number of finished steps after which no step is
        skipped, because sets no longer change; None: every refresh skips one.
      first_choice: "init": the first sets are chosen from the initial parameters. "first_update":
        all units are in both sets until the first gradient is seen; the first update then chooses
        from the parameters and their gradient, and is already restricted to these sets.
    """

    needs_gradient: bool = False
    observes_gradient: bool = False
    explores: bool = True
    skips_update: bool = False
    last_choice_at: int | jax.Array | None = None
    first_choice: Literal["init", "first_update"] = "init"

    @abc.abstractmethod
    def choose(self, layer: Layer, leaf: Leaf, counts: Counts) -> tuple[Sets, Any]:
        """The sets of one layer and what is to be remembered about it.

        Args:
          layer: the layer as it is now; `layer.sets` is None at the first choice.
          leaf: what does not change about it.
          counts: units to keep, as `allocate` returned them for this layer.

        Returns:
          The sets by unit, `bool[leaf.grid]` each, and the memory, of the same structure, shapes
          and types at every choice.
        """

    def allocate(
        self, layers: Mapping[str, Layer], leaves: Mapping[str, Leaf], step: jax.Array
    ) -> dict[str, Counts]:
        """How many units each leaf keeps: the one place that sees all leaves at once.

        Args:
          layers: by leaf; the arrays of a stacked leaf have the stacked axes in front.
          leaves: by leaf.
          step: int32 scalar, finished steps.

        Returns:
          Counts by leaf: scalars, or arrays `leaf.stack` with one number for each stacked layer.
          By default what `scheduled` returns for each.
        """
        del layers
        return {path: self.scheduled(leaf, step) for path, leaf in leaves.items()}

    def scheduled(self, leaf: Leaf, step: jax.Array) -> Counts:
        """How many units of one layer are kept at a step, before leaves share them out.

        By default the leaf's own counts, which its densities give at every step.

        Args:
          leaf: what does not change about the layer.
          step: int32 scalar, finished steps.
        """
        del step
        return leaf.counts

    def enter(self, theta: jax.Array, leaf: Leaf) -> jax.Array:
        """What entries that enter the backward set start from; by default the reservoir's value.

        It is applied as a part of the next update, `enter(θ) − θ`, and the forward view shows it
        from the first step on. What alters updates after the wrapper alters this part too.

        Args:
          theta: entries of one layer, in its shape.
          leaf: what does not change about it.
        """
        del leaf
        return theta

    def gradient(
        self, grad: jax.Array, theta: jax.Array, sets: Sets, leaf: Leaf, step: jax.Array
    ) -> jax.Array:
        """The gradient that the inner optimizer gets; it is zeroed outside the backward set after.

        Must work entry by entry: always sparse, the arrays hold the backward set alone, `[b]` or
        `[b, rows, cols]`, in place of the layer.

        Args:
          grad: gradient at the forward view.
          theta: parameters.
          sets: the sets in use, by entry, in the shape of `grad`.
          leaf: what does not change about the layer.
          step: int32 scalar, finished steps.
        """
        del theta, sets, leaf, step
        return grad

    def observe(self, grad: jax.Array, theta: jax.Array, memory: Any, leaf: Leaf) -> Any:
        """The memory after a step, where `observes_gradient`; must work entry by entry.

        Args:
          grad: the dense gradient at the forward view.
          theta: parameters.
          memory: what the last `choose` or `observe` returned.
          leaf: what does not change about the layer.
        """
        del grad, theta, leaf
        return memory


def allocates(method: Method) -> bool:
    """Whether counts may be others than the leaves' own."""
    kind = type(method)
    return kind.allocate is not Method.allocate or kind.scheduled is not Method.scheduled


def enters_anew(method: Method) -> bool:
    """Whether entries that enter the backward set start from another value than they have."""
    return type(method).enter is not Method.enter
