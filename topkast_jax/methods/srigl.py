"""SRigL: RigL with a constant fan-in (Lasby et al., 2023)."""

from __future__ import annotations

import jax
import optax

from topkast_jax.method import Density
from topkast_jax.methods.rigl import rigl
from topkast_jax.patterns import FanIn
from topkast_jax.rules import Rules
from topkast_jax.sparsify import SparseTransform


def srigl(
    inner: optax.GradientTransformation,
    forward_density: Density,
    refresh_every: int | jax.Array = 100,
    drop_fraction: float | jax.Array = 0.3,
    last_choice_at: int | jax.Array | None = None,
    rules: Rules | None = None,
    seed: int | jax.Array = 0,
) -> SparseTransform:
    """RigL in which every output feature keeps the same number of inputs.

    This is `topkast_jax.methods.rigl` with the pattern `FanIn()`; neurons are not ablated.

    Args:
      inner: any optax optimizer.
      forward_density: share of each output feature's inputs that are kept, in (0, 1].
      refresh_every: steps between two refreshes.
      drop_fraction: share of the kept inputs that a refresh drops, in (0, 1).
      last_choice_at: the share falls to zero over so many steps; None: it stays.
      rules: see `topkast_jax.top_kast`.
      seed: of the first sets.

    Returns:
      A gradient transformation whose update needs `params`. It must be the last member of a chain,
      since what is grown enters with the updates.

    Raises:
      SparsityError: as for `topkast_jax.methods.rigl`.

    References:
      Lasby et al., `Dynamic Sparse Training with Structured Sparsity
      <https://arxiv.org/abs/2305.02299>`_, 2023
    """
    return rigl(
        inner,
        forward_density,
        refresh_every,
        drop_fraction,
        last_choice_at,
        rules=rules,
        pattern=FanIn(),
        seed=seed,
    )
