"""RigL: rigging the lottery (Evci et al., 2020)."""

from __future__ import annotations

import dataclasses

import jax
import optax

from topkast_jax.method import Density, Layer, Leaf
from topkast_jax.methods.drop_and_grow import DropAndGrow, check_drop_and_grow
from topkast_jax.patterns import Pattern
from topkast_jax.rules import Rules
from topkast_jax.sparsify import SparseTransform, sparsify


@dataclasses.dataclass(frozen=True)
class RigL(DropAndGrow):
    """Grows where the dense gradient is largest.

    Attributes:
      skips_update: whether the step whose gradient a refresh reads moves no parameter, as in the
        original.
    """

    needs_gradient = True
    skips_update: bool = False

    def growth(self, layer: Layer, leaf: Leaf) -> jax.Array:
        """The magnitude of the loss's gradient at the forward view of the step before."""
        assert layer.grad is not None
        return leaf.pattern.magnitudes(layer.grad)


def rigl(
    inner: optax.GradientTransformation,
    forward_density: Density,
    refresh_every: int | jax.Array = 100,
    drop_fraction: float | jax.Array = 0.3,
    last_choice_at: int | jax.Array | None = None,
    skips_update: bool = False,
    rules: Rules | None = None,
    pattern: Pattern | None = None,
    seed: int | jax.Array = 0,
) -> SparseTransform:
    r"""RigL around any optax optimizer.

    Every ΔT = `refresh_every` steps, in each leaf of k kept units, the ⌊f(t) k⌋ of smallest
    magnitude are dropped and as many are grown, from zero, where the dense gradient is largest:

    .. math::
      f(t) = \frac{f}{2} \left(1 + \cos\frac{π t}{T_\text{end}}\right)

    The gradient is what `update` is given: it includes an L2 term that is added before the method
    in a chain, but none inside `inner`. A dense gradient is needed at every ΔT-th step alone.

    Args:
      inner: any optax optimizer.
      forward_density: share of a leaf's units that are kept, in (0, 1].
      refresh_every: ΔT, steps between two refreshes.
      drop_fraction: f, in (0, 1).
      last_choice_at: T_end; the paper has 25,000 of 32,000 steps. None: f stays.
      skips_update: whether the step whose gradient a refresh reads moves no parameter and no inner
        state, as in the original.
      rules: see `topkast_jax.top_kast`.
      pattern: what is kept together, `Unstructured()` if None. With `FanIn()` this is SRigL.
      seed: of the first sets.

    Returns:
      A gradient transformation whose update needs `params`. It must be the last member of a chain,
      since what is grown enters with the updates.

    Raises:
      SparsityError: an argument outside its range; otherwise as for `topkast_jax.top_kast`.

    References:
      Evci et al., `Rigging the Lottery: Making All Tickets Winners
      <https://arxiv.org/abs/1911.11134>`_, 2020
    """
    check_drop_and_grow(drop_fraction, last_choice_at, refresh_every)
    return sparsify(
        inner,
        RigL(drop_fraction, last_choice_at, skips_update),
        forward_density=forward_density,
        refresh_every=refresh_every,
        inner_state="reset",
        rules=rules,
        pattern=pattern,
        seed=seed,
    )
