"""Gradual magnitude pruning (Zhu and Gupta, 2017)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from topkast_jax.errors import SparsityError, shown
from topkast_jax.method import Counts, Density, Layer, Leaf, Method, Sets
from topkast_jax.methods.global_ranking import global_counts, refuse_groups
from topkast_jax.patterns import Pattern
from topkast_jax.rules import Rules
from topkast_jax.sparsify import SparseTransform, sparsify
from topkast_jax.values import is_whole


@dataclasses.dataclass(frozen=True)
class Pruning(Method):
    """The units of largest magnitude, fewer and fewer of them; only they are updated.

    Attributes:
      begin_at: finished steps up to which all units are kept.
      end_at: finished steps from which the final density holds.
      ranking: "layer": each layer keeps its own share; "global": one ranking over the network.
    """

    explores = False
    begin_at: int | jax.Array
    end_at: int | jax.Array
    ranking: Literal["layer", "global"] = "layer"

    def allocate(
        self, layers: Mapping[str, Layer], leaves: Mapping[str, Leaf], step: jax.Array
    ) -> dict[str, Counts]:
        """The counts of the schedule at this step, those of one ranking if it is global."""
        counts = super().allocate(layers, leaves, step)
        if self.ranking == "layer":
            return counts
        refuse_groups("pruning by one ranking", leaves)
        theta = {path: layer.theta for path, layer in layers.items()}
        kept = global_counts(theta, leaves, {path: c.forward for path, c in counts.items()})
        return {path: Counts(count, count) for path, count in kept.items()}

    def scheduled(self, leaf: Leaf, step: jax.Array) -> Counts:
        """The final counts, and of what is above them the share that the schedule leaves."""
        begin, end = (jnp.asarray(x, jnp.float32) for x in (self.begin_at, self.end_at))
        passed = jnp.clip((jnp.asarray(step).astype(jnp.float32) - begin) / (end - begin), 0.0, 1.0)
        units, final = math.prod(leaf.grid), leaf.counts.forward
        above = jnp.asarray(units - final).astype(jnp.float32) * (1 - passed) ** 3
        groups = leaf.pattern.groups(leaf.shape)  # Each keeps the same number of units.
        count = final + groups * jnp.round(above / groups).astype(jnp.int32)
        # A float32 holds whole numbers up to 2**24 alone.
        count = jnp.where(passed > 0, jnp.minimum(count, units), units)
        return Counts(count, count)

    def choose(self, layer: Layer, leaf: Leaf, counts: Counts) -> tuple[Sets, Any]:
        """The units of largest magnitude."""
        magnitudes = leaf.pattern.magnitudes(layer.theta)
        ties = layer.key if layer.sets is None else None
        (kept,), _ = leaf.pattern.top(magnitudes, [counts.forward], ties=ties)
        return Sets(kept, kept), ()


def pruning(
    inner: optax.GradientTransformation,
    forward_density: Density,
    begin_at: int | jax.Array,
    end_at: int | jax.Array,
    refresh_every: int | jax.Array = 100,
    ranking: Literal["layer", "global"] = "layer",
    rules: Rules | None = None,
    pattern: Pattern | None = None,
) -> SparseTransform:
    r"""Gradual magnitude pruning around any optax optimizer.

    Every `refresh_every` steps the units of largest magnitude are kept, at the density

    .. math::
      D_t = D + (1 - D) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

    between the steps t₀ = `begin_at` (dense until then) and t₁ = `end_at`. Units outside are not
    updated; one of them comes back if those inside shrink below it. The memory and the time of a
    training step follow D only from t₁ on, which is what Top-KAST avoids.

    Args:
      inner: any optax optimizer.
      forward_density: D, the final density, in (0, 1].
      begin_at: t₀, at least 0.
      end_at: t₁, above `begin_at`. The first refresh at or after it gives the density D.
      refresh_every: steps between two refreshes.
      ranking: "layer": each layer keeps its own share of its units. "global": one ranking over the
        network, in which a layer may keep more or fewer units than its share.
      rules: see `topkast_jax.top_kast`.
      pattern: what is kept together, `Unstructured()` if None; with a global ranking, not `NOfM` or
        `FanIn`.

    Returns:
      A gradient transformation whose update needs `params`.

    Raises:
      SparsityError: another ranking, or a schedule that does not end after it begins; from `init`,
        a pattern that a global ranking excludes; otherwise as for `topkast_jax.top_kast`.

    References:
      Zhu and Gupta, `To prune, or not to prune: exploring the efficacy of pruning for model
      compression <https://arxiv.org/abs/1710.01878>`_, 2017
    """
    _check(begin_at, end_at, ranking)
    return sparsify(
        inner,
        Pruning(begin_at, end_at, ranking),
        forward_density=forward_density,
        refresh_every=refresh_every,
        inner_state="reset",
        rules=rules,
        pattern=pattern,
    )


def _check(begin_at: Any, end_at: Any, ranking: Any) -> None:
    if not isinstance(ranking, str) or ranking not in ("layer", "global"):
        raise SparsityError(f"ranking={shown(ranking)}: must be 'layer' or 'global'")
    for name, step in (("begin_at", begin_at), ("end_at", end_at)):
        if isinstance(step, jax.core.Tracer):
            continue
        if not is_whole(step, 0):
            raise SparsityError(
                f"{name}={shown(step)}: must be an integer of at least 0 and below 2**31"
            )
    traced = isinstance(begin_at, jax.core.Tracer) or isinstance(end_at, jax.core.Tracer)
    if not traced and end_at <= begin_at:
        raise SparsityError(f"end_at={end_at} must be above begin_at={begin_at}")
