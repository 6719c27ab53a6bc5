"""SNIP: single-shot network pruning (Lee et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from topkast_jax.method import Counts, Density, Layer, Leaf, Method, Sets
from topkast_jax.methods.global_ranking import global_counts, refuse_groups
from topkast_jax.patterns import Pattern
from topkast_jax.rules import Rules
from topkast_jax.sparsify import SparseTransform, sparsify


class SNIP(Method):
    """Sets that are chosen once, by |θ · g| of the first gradient, ranked over all leaves."""

    explores = False
    first_choice = "first_update"

    def allocate(
        self, layers: Mapping[str, Layer], leaves: Mapping[str, Leaf], step: jax.Array
    ) -> dict[str, Counts]:
        """As many of each layer as are among the units of largest saliency of the network."""
        del step
        refuse_groups("snip", leaves)
        saliency = {path: _saliency(layer) for path, layer in layers.items()}
        kept = {path: leaf.counts.forward for path, leaf in leaves.items()}
        counts = global_counts(saliency, leaves, kept)
        return {path: Counts(count, count) for path, count in counts.items()}

    def choose(self, layer: Layer, leaf: Leaf, counts: Counts) -> tuple[Sets, Any]:
        """The units of largest saliency."""
        saliency = leaf.pattern.magnitudes(_saliency(layer))
        (kept,), _ = leaf.pattern.top(saliency, [counts.forward], ties=layer.key)
        return Sets(kept, kept), ()


def _saliency(layer: Layer) -> jax.Array:
    assert layer.grad is not None
    # In float16, products of small numbers would be 0 or of few digits.
    kind = layer.theta.dtype if layer.theta.dtype.itemsize > 4 else jnp.float32
    return layer.theta.astype(kind) * layer.grad.astype(kind)


def snip(
    inner: optax.GradientTransformation,
    forward_density: Density,
    rules: Rules | None = None,
    pattern: Pattern | None = None,
    seed: int | jax.Array = 0,
) -> SparseTransform:
    r"""SNIP around any optax optimizer.

    The first update ranks the units of the whole network by their connection sensitivity
    :math:`|θ_i g_i|`, keeps the largest ones, and is already restricted to them; they never change.
    Before it the network is dense. A layer may keep more or fewer than `forward_density` of its
    units, even none.

    Args:
      inner: any optax optimizer.
      forward_density: share of all units that are kept, in (0, 1].
      rules: see `topkast_jax.top_kast`; the densities of all leaves make one budget.
      pattern: what is kept together, `Unstructured()` if None; not `NOfM` or `FanIn`.
      seed: by which ties are broken.

    Returns:
      A gradient transformation whose update needs `params`.

    Raises:
      SparsityError: as for `topkast_jax.top_kast`; from `init`, a pattern `NOfM` or `FanIn`, which
        fix how many units each group of a layer keeps.

    References:
      Lee et al., `SNIP: Single-shot Network Pruning based on Connection Sensitivity
      <https://arxiv.org/abs/1810.02340>`_, 2019
    """
    return sparsify(
        inner,
        SNIP(),
        forward_density=forward_density,
        refresh_every=None,
        rules=rules,
        pattern=pattern,
        seed=seed,
    )
