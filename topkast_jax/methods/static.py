"""A fixed random mask: the baseline that never changes its sets."""

from __future__ import annotations

from typing import Any

import jax
import optax

from topkast_jax.patterns import Pattern
from topkast_jax.rules import Leaf, Rules
from topkast_jax.selection import keep_count, top_k_masks
from topkast_jax.sparsify import Method, Sets, SparseTransform, sparsify


class StaticRandom(Method):
    """The sets are drawn once; backward set and forward set are the same."""

    def start(self, theta: jax.Array, leaf: Leaf, key: jax.Array) -> tuple[Sets, Any]:
        """Keeps the units with the largest of independent uniform random numbers."""
        grid = leaf.pattern.grid(leaf.shape)
        scores = jax.random.uniform(key, grid)
        count = keep_count(scores.size, float(leaf.forward_density))
        (kept,), _ = top_k_masks(scores, (count,))
        mask = leaf.pattern.expand(kept, theta.shape)
        return Sets(mask, mask), ()


def static_random(
    inner: optax.GradientTransformation,
    forward_density: float,
    seed: int,
    rules: Rules | None = None,
    pattern: Pattern | None = None,
) -> SparseTransform:
    """Trains a fixed random subset of each leaf; the rest keeps its initial value, unused.

    Args:
      inner: any optax optimizer.
      forward_density: share of a leaf's units that are kept, in (0, 1].
      seed: of the masks; each leaf draws its own from its path.
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
