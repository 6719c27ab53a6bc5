"""The base class of SET, RigL and SNFS, which drop the smallest kept units and grow as many."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.errors import SparsityError, shown
from topkast_jax.method import Counts, Layer, Leaf, Method, Sets
from topkast_jax.values import is_number, is_whole


@dataclasses.dataclass(frozen=True)
class DropAndGrow(Method):
    """Drops a share of the kept units by magnitude and grows others, which start at zero.

    Forward and backward set are the same. The first sets are random. A unit that was dropped may be
    grown again at once: then it keeps its value.

    Attributes:
      drop_fraction: share of the kept units that a refresh drops, in (0, 1); of each group, at
        least one, where a pattern has groups that keep two or more.
      last_choice_at: the share falls to zero over so many steps, by half a cosine; after them sets
        do not change. None: the share stays.
    """

    explores = False
    drop_fraction: float | jax.Array = 0.3
    last_choice_at: int | jax.Array | None = None

    @abc.abstractmethod
    def growth(self, layer: Layer, leaf: Leaf) -> jax.Array:
        """The scores by which units are grown.

        Of the units that do not stay, those of largest absolute score are grown.

        Args:
          layer: the layer as it is now; `layer.sets` is not None.
          leaf: what does not change about it.

        Returns:
          One number for each unit, of the shape `leaf.grid`.
        """

    def choose(self, layer: Layer, leaf: Leaf, counts: Counts) -> tuple[Sets, Any]:
        """The kept units of largest magnitude, and those of largest growth score."""
        if layer.sets is None:
            chance = jax.random.uniform(layer.key, leaf.grid)
            (kept,), _ = leaf.pattern.top(chance, [counts.forward])
            return Sets(kept, kept), self.remembered(layer)
        groups = leaf.pattern.groups(leaf.shape)
        held = jnp.sum(layer.sets.forward, dtype=jnp.int32) // groups
        dropped = self.dropped(held, layer.step)
        if groups > 1:
            one = (held > 1) & (self.fraction(layer.step) > 0)
            dropped = jnp.maximum(dropped, one.astype(jnp.int32))
        staying = groups * (held - dropped)
        staying = jnp.minimum(staying, counts.forward)
        magnitudes = leaf.pattern.magnitudes(layer.theta)
        (stays,), _ = leaf.pattern.top(magnitudes, [staying], among=layer.sets.forward)
        (grown,), _ = leaf.pattern.top(
            self.growth(layer, leaf), [counts.forward - staying], among=~stays
        )
        return Sets(stays | grown, stays | grown), self.remembered(layer)

    def enter(self, theta: jax.Array, leaf: Leaf) -> jax.Array:
        """Zero."""
        del leaf
        return jnp.zeros_like(theta)

    def remembered(self, layer: Layer) -> Any:
        """The memory that a choice returns."""
        del layer
        return ()

    def dropped(self, held: jax.Array, step: Any) -> jax.Array:
        """⌊fraction · held⌋ units, the fraction that of the finished steps."""
        return jnp.floor(self.fraction(step) * held.astype(jnp.float32)).astype(jnp.int32)

    def fraction(self, step: Any) -> jax.Array:
        """The share of the kept units that is dropped after so many finished steps."""
        share = jnp.asarray(self.drop_fraction, jnp.float32)
        if self.last_choice_at is not None:
            end = jnp.asarray(self.last_choice_at, jnp.float32)
            passed = jnp.clip(jnp.asarray(step).astype(jnp.float32) / end, 0.0, 1.0)
            share = share / 2 * (1 + jnp.cos(np.float32(np.pi) * passed))
            share = jnp.where(passed < 1, share, 0.0)
        return share


def check_drop_and_grow(drop_fraction: Any, last_choice_at: Any, refresh_every: Any) -> None:
    """Raises SparsityError unless the options of a method that drops and grows fit each other."""
    if not isinstance(drop_fraction, jax.core.Tracer) and not (
        is_number(drop_fraction) and 0 < drop_fraction < 1
    ):
        raise SparsityError(f"drop_fraction={shown(drop_fraction)}: must be a number in (0, 1)")
    if last_choice_at is None or isinstance(last_choice_at, jax.core.Tracer):
        return
    if not is_whole(last_choice_at, 1):
        raise SparsityError(
            f"last_choice_at={shown(last_choice_at)}: must be None or an integer of at least 1 "
            "and below 2**31"
        )
    if isinstance(refresh_every, jax.core.Tracer) or not is_whole(refresh_every, 1):
        return
    if int(last_choice_at) <= int(refresh_every):
        raise SparsityError(
            f"last_choice_at={last_choice_at} must be above refresh_every={refresh_every}, or no "
            "choice is made"
        )
