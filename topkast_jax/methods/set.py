"""SET: sparse evolutionary training (Mocanu et al., 2018)."""

from __future__ import annotations

import jax
import optax

from topkast_jax.method import Density, Layer, Leaf
from topkast_jax.methods.drop_and_grow import DropAndGrow, check_drop_and_grow
from topkast_jax.patterns import Pattern
from topkast_jax.rules import Rules
from topkast_jax.sparsify import SparseTransform, sparsify


class SET(DropAndGrow):
    """Grows at random places."""

    def growth(self, layer: Layer, leaf: Leaf) -> jax.Array:
        """Independent uniform random numbers."""
        return jax.random.uniform(layer.key, leaf.grid)


def set_evolution(
    inner: optax.GradientTransformation,
    forward_density: Density,
    refresh_every: int | jax.Array = 100,
    drop_fraction: float | jax.Array = 0.3,
    last_choice_at: int | jax.Array | None = None,
    rules: Rules | None = None,
    pattern: Pattern | None = None,
    seed: int | jax.Array = 0,
) -> SparseTransform:
    r"""Sparse evolutionary training around any optax optimizer.

    Every `refresh_every` steps, in each leaf of k kept units, the ⌊f k⌋ of smallest magnitude are
    dropped and as many are grown at random places, from zero. The network runs on the kept units,
    and they alone are updated. The paper has f = 0.3 and a refresh at every epoch; the comparison
    in RigL's paper lets f fall by half a cosine (`last_choice_at`).

    Args:
      inner: any optax optimizer.
      forward_density: share of a leaf's units that are kept, in (0, 1].
      refresh_every: steps between two refreshes.
      drop_fraction: f, in (0, 1).
      last_choice_at: f falls to zero over so many steps; None: it stays.
      rules: see `topkast_jax.top_kast`.
      pattern: what is kept together, `Unstructured()` if None.
      seed: of the random choices.

    Returns:
      A gradient transformation whose update needs `params`. It must be the last member of a chain,
      since what is grown enters with the updates.

    Raises:
      SparsityError: an argument outside its range; otherwise as for `topkast_jax.top_kast`.

    References:
      Mocanu et al., `Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science <https://arxiv.org/abs/1707.04780>`_, 2018
    """
    check_drop_and_grow(drop_fraction, last_choice_at, refresh_every)
    return sparsify(
        inner,
        SET(drop_fraction, last_choice_at),
        forward_density=forward_density,
        refresh_every=refresh_every,
        inner_state="reset",
        rules=rules,
        pattern=pattern,
        seed=seed,
    )
