"""SNFS: sparse networks from scratch (Dettmers and Zettlemoyer, 2019)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast_jax.errors import SparsityError, shown
from topkast_jax.method import Counts, Density, Layer, Leaf
from topkast_jax.methods.drop_and_grow import DropAndGrow, check_drop_and_grow
from topkast_jax.methods.global_ranking import refuse_groups
from topkast_jax.patterns import Pattern
from topkast_jax.rules import Rules
from topkast_jax.sparsify import SparseTransform, sparsify
from topkast_jax.values import is_number


@dataclasses.dataclass(frozen=True)
class SNFS(DropAndGrow):
    """Momentum of the dense gradient says how many units each layer grows, and which.

    Attributes:
      momentum: decay of the mean of the dense gradient that every step observes.
    """

    observes_gradient = True
    momentum: float | jax.Array = 0.9

    def growth(self, layer: Layer, leaf: Leaf) -> jax.Array:
        """The magnitude of the momentum."""
        return leaf.pattern.magnitudes(layer.memory)

    def remembered(self, layer: Layer) -> Any:
        """The momentum, zero at first."""
        return jnp.zeros_like(layer.theta) if layer.memory is None else layer.memory

    def observe(self, grad: jax.Array, theta: jax.Array, memory: Any, leaf: Leaf) -> Any:
        """The decaying mean of the dense gradient."""
        del theta, leaf
        decay = jnp.asarray(self.momentum, memory.dtype)
        return decay * memory + (1 - decay) * grad.astype(memory.dtype)

    def allocate(
        self, layers: Mapping[str, Layer], leaves: Mapping[str, Leaf], step: jax.Array
    ) -> dict[str, Counts]:
        """All dropped units, shared out by the mean momentum of each layer's kept units."""
        refuse_groups("snfs", leaves)
        if any(layer.sets is None for layer in layers.values()):
            return {path: leaf.counts for path, leaf in leaves.items()}
        held, strength, room = [], [], []
        for path, leaf in leaves.items():
            kept, layer = layers[path].sets, layers[path]
            assert kept is not None
            axes = tuple(range(len(leaf.stack), kept.forward.ndim))
            sums = jnp.sum(kept.forward, axis=axes, dtype=jnp.int32).reshape(-1)
            magnitudes = leaf.pattern.magnitudes
            for _ in leaf.stack:
                magnitudes = jax.vmap(magnitudes)
            inside = jnp.where(kept.forward, jnp.abs(magnitudes(layer.memory)), 0.0)
            means = jnp.sum(inside.astype(jnp.float32), axis=axes).reshape(-1) / sums.astype(
                jnp.float32
            )
            held.append(sums)
            strength.append(means)
            room.append(jnp.full_like(sums, math.prod(leaf.grid)))
        all_held, all_room = jnp.concatenate(held), jnp.concatenate(room)
        dropped = self.dropped(all_held, step)
        staying = all_held - dropped
        grown = share_out(
            jnp.sum(dropped, dtype=jnp.int32), jnp.concatenate(strength), all_room - staying
        )
        counts, start = {}, 0
        for (path, leaf), sums in zip(leaves.items(), held, strict=True):
            here = (staying + grown)[start : start + sums.size].reshape(leaf.stack)
            counts[path] = Counts(here, here)
            start += sums.size
        return counts


def share_out(total: jax.Array, weights: jax.Array, room: jax.Array) -> jax.Array:
    """Shares a whole number out in proportion to weights, no part above its room.

    What a full part cannot take goes to the others in the same proportion. Parts are rounded down,
    and the units left over go to the parts with most left of theirs, the first of equal ones first.

    Args:
      total: int32 scalar, at most the sum of `room`.
      weights: float32 [n], not negative.
      room: int32 [n].

    Returns:
      int32 [n] whose sum is `total`.
    """
    weights = jnp.where(jnp.max(weights) > 0, weights, 1.0)  # Without any, all parts are alike.
    weights = weights / jnp.max(weights) + np.float32(1e-12)
    whole, most = total.astype(jnp.float32), room.astype(jnp.float32)

    def fill(_: Any, full: jax.Array) -> jax.Array:
        left = whole - jnp.sum(jnp.where(full, most, 0.0))
        open_weights = jnp.where(full, 0.0, weights)
        parts = left * open_weights / jnp.maximum(jnp.sum(open_weights), np.float32(1e-37))
        return full | (parts >= most)

    full = jax.lax.fori_loop(0, weights.size, fill, jnp.zeros(weights.shape, bool))
    left = whole - jnp.sum(jnp.where(full, most, 0.0))
    open_weights = jnp.where(full, 0.0, weights)
    parts = left * open_weights / jnp.maximum(jnp.sum(open_weights), np.float32(1e-37))
    shares = jnp.minimum(jnp.where(full, room, jnp.floor(parts).astype(jnp.int32)), room)
    rest = parts - jnp.floor(parts)

    def give(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        shares, rest = state
        missing = total - jnp.sum(shares, dtype=jnp.int32)
        best = jnp.argmax(jnp.where(shares < room, rest, -2.0))
        more = jnp.where(missing > 0, jnp.minimum(missing, 1), jnp.maximum(missing, -1))
        return shares.at[best].add(more), rest.at[best].add(-1.0)

    shares, _ = jax.lax.fori_loop(0, 2 * weights.size, give, (shares, rest))
    return shares


def snfs(
    inner: optax.GradientTransformation,
    forward_density: Density,
    refresh_every: int | jax.Array = 100,
    drop_fraction: float | jax.Array = 0.3,
    last_choice_at: int | jax.Array | None = None,
    momentum: float | jax.Array = 0.9,
    rules: Rules | None = None,
    pattern: Pattern | None = None,
    seed: int | jax.Array = 0,
) -> SparseTransform:
    r"""Sparse momentum around any optax optimizer.

    Every `refresh_every` steps the ⌊f k⌋ kept units of smallest magnitude of each layer are
    dropped. As many are grown over the whole network: each layer gets a part in proportion to the
    mean magnitude of the momentum of its kept units, and grows, from zero, where the momentum of
    the dense gradient is largest. So units move between layers. The dense gradient is needed in
    every step.

    Args:
      inner: any optax optimizer.
      forward_density: share of all units that are kept; of each layer's at the start.
      refresh_every: steps between two refreshes.
      drop_fraction: f, in (0, 1).
      last_choice_at: f falls to zero over so many steps; None: it stays.
      momentum: decay of the observed mean of the gradient, in [0, 1).
      rules: see `topkast_jax.top_kast`.
      pattern: what is kept together, `Unstructured()` if None; not `NOfM` or `FanIn`.
      seed: of the first sets.

    Returns:
      A gradient transformation whose update needs `params`. It must be the last member of a chain,
      since what is grown enters with the updates.

    Raises:
      SparsityError: an argument outside its range; from `init`, a pattern `NOfM` or `FanIn`, which
        fix how many units each group of a layer keeps; otherwise as for `topkast_jax.top_kast`.

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch: Faster Training without Losing
      Performance <https://arxiv.org/abs/1907.04840>`_, 2019
    """
    check_drop_and_grow(drop_fraction, last_choice_at, refresh_every)
    if not isinstance(momentum, jax.core.Tracer) and not (
        is_number(momentum) and 0 <= momentum < 1
    ):
        raise SparsityError(f"momentum={shown(momentum)}: must be a number in [0, 1)")
    return sparsify(
        inner,
        SNFS(drop_fraction, last_choice_at, momentum),
        forward_density=forward_density,
        refresh_every=refresh_every,
        inner_state="reset",
        rules=rules,
        pattern=pattern,
        seed=seed,
    )
