"""A fixed random mask: the baseline that never changes its sets."""

from __future__ import annotations

from typing import Any

import jax
import optax

from topkast_jax.method import Counts, Density, Layer, Leaf, Method, Sets
from topkast_jax.patterns import Pattern
from topkast_jax.rules import Rules
from topkast_jax.sparsify import SparseTransform, sparsify


class StaticRandom(Method):
    """The sets are drawn once; backward set and forward set are the same."""

    explores = False

    def choose(self, layer: Layer, leaf: Leaf, counts: Counts) -> tuple[Sets, Any]:
        """Keeps the units with the largest of independent uniform random numbers."""
        scores = jax.random.uniform(layer.key, leaf.grid)
        (kept,), _ = leaf.pattern.top(scores, (counts.forward,))
        return Sets(kept, kept), ()


def static_random(
    inner: optax.GradientTransformation,
    forward_density: Density,
    seed: int | jax.Array,
    rules: Rules | None = None,
    pattern: Pattern | None = None,
) -> SparseTransform:
    """Trains a fixed random subset of each leaf; the rest keeps its initial value, unused.

    The sets are drawn by `init` and never again: a run that continues from an earlier state keeps
    the sets of that state, whatever density or pattern its transformation now has.

    Args:
      inner: any optax optimizer.
      forward_density: share of a leaf's units that are kept, in (0, 1].
      seed: of the masks; each leaf draws its own from its path. May be traced, as for an ensemble.
      rules: see `topkast_jax.top_kast`.
      pattern: what is kept together, `Unstructured()` if None.

    Returns:
      A gradient transformation whose update needs `params`.

    Raises:
      SparsityError: as for `topkast_jax.top_kast`.
    """
    return sparsify(
        inner,
        StaticRandom(),
        forward_density=forward_density,
        refresh_every=None,
        rules=rules,
        pattern=pattern,
        seed=seed,
    )
