"""DNW: discovering neural wirings (Wortsman et al., 2019), a straight-through estimator."""

from __future__ import annotations

import jax
import optax

from topkast_jax.method import Density
from topkast_jax.patterns import Pattern
from topkast_jax.rules import Rules
from topkast_jax.sparsify import SparseTransform
from topkast_jax.top_kast import top_kast


def dnw(
    inner: optax.GradientTransformation,
    forward_density: Density,
    refresh_every: int | jax.Array = 1,
    rules: Rules | None = None,
    pattern: Pattern | None = None,
) -> SparseTransform:
    """The network runs on the units of largest magnitude, and all are updated straight through.

    This is `topkast_jax.top_kast` with a dense backward set, no exploration loss and a refresh in
    every step.

    Args:
      inner: any optax optimizer.
      forward_density: share of a leaf's units the network runs on, in (0, 1].
      refresh_every: steps between two refreshes. Above 1, units outside the forward set are updated
        for several steps as if they were in use, and the network learns much less.
      rules: see `topkast_jax.top_kast`.
      pattern: what is kept together, `Unstructured()` if None.

    Returns:
      A gradient transformation whose update needs `params`.

    Raises:
      SparsityError: as for `topkast_jax.top_kast`.

    References:
      Wortsman et al., `Discovering Neural Wirings <https://arxiv.org/abs/1906.00586>`_, 2019
    """
    return top_kast(
        inner,
        forward_density,
        1.0,
        refresh_every=refresh_every,
        exploration_weight=0.0,
        rules=rules,
        pattern=pattern,
    )
