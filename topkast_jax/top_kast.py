"""Top-KAST (Jayakumar et al., NeurIPS 2020)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from topkast_jax.errors import SparsityError, shown
from topkast_jax.method import Counts, Density, Layer, Leaf, Method, Sets
from topkast_jax.patterns import Pattern
from topkast_jax.rules import Rules
from topkast_jax.sparsify import (
    SparseTransform,
    check_weight,
    sparsify,
    with_exploration_decay,
)


@dataclasses.dataclass(frozen=True)
class TopKast(Method):
    """Sets by magnitude, and the exploration loss that lets entries of B enter A.

    Attributes:
      exploration_weight: λ, the weight of the exploration loss.
      exploration_norm: "l2" (gradient λθ on A, λθ/D on B∖A) or "l1" (sign θ in place of θ).
      exploration_set: what B∖A is: the "magnitude" that comes next, or units at "random".
    """

    exploration_weight: float | jax.Array = 1e-4
    exploration_norm: Literal["l2", "l1"] = "l2"
    exploration_set: Literal["magnitude", "random"] = "magnitude"

    def choose(self, layer: Layer, leaf: Leaf, counts: Counts) -> tuple[Sets, Any]:
        """A, and B unless it is random: the units of largest magnitude (section 2.1).

        Remembers the thresholds, from which the next selection starts.
        """
        by_magnitude = self.exploration_set == "magnitude"
        masks, thresholds = leaf.pattern.top(
            leaf.pattern.magnitudes(layer.theta),
            counts if by_magnitude else counts[:1],
            start=layer.memory,
            ties=layer.key if layer.sets is None else None,
        )
        if by_magnitude:
            return Sets(*masks), thresholds
        chance = jax.random.uniform(layer.key, leaf.grid)
        (extra,), _ = leaf.pattern.top(chance, [counts.backward - counts.forward], among=~masks[0])
        return Sets(masks[0], masks[0] | extra), thresholds

    def gradient(
        self, grad: jax.Array, theta: jax.Array, sets: Sets, leaf: Leaf, step: jax.Array
    ) -> jax.Array:
        """Adds the gradient of the exploration loss (section 2.3)."""
        del step
        if isinstance(self.exploration_weight, int | float) and self.exploration_weight == 0:
            return grad
        weight = jnp.asarray(self.exploration_weight, theta.dtype)
        density = jnp.asarray(leaf.forward_density, theta.dtype)
        pull = theta if self.exploration_norm == "l2" else jnp.sign(theta)
        return grad + jnp.where(sets.forward, weight, weight / density) * pull


def top_kast(
    inner: optax.GradientTransformation,
    forward_density: Density,
    backward_density: Density,
    refresh_every: int | jax.Array = 100,
    exploration_weight: float | jax.Array = 1e-4,
    exploration_norm: Literal["l2", "l1"] = "l2",
    stop_exploring_at: int | jax.Array | None = None,
    rules: Rules | None = None,
    pattern: Pattern | None = None,
    inner_state: Literal["keep", "reset"] = "keep",
    exploration_set: Literal["magnitude", "random"] = "magnitude",
    seed: int | jax.Array = 0,
    exploration_decay: float | jax.Array | optax.Schedule = 0.0,
) -> SparseTransform:
    r"""Top-K Always Sparse Training around any optax optimizer.

    In each leaf the forward set A holds the units of largest magnitude at `forward_density` D, the
    backward set B ⊇ A those at `backward_density`. The network runs on θ over A, 0 elsewhere
    (`forward_params`); B is updated, with the exploration loss added to the gradient:

    .. math::
      g_i + λ θ_i \;(i ∈ A), \qquad g_i + λ θ_i / D \;(i ∈ B ∖ A), \qquad 0 \;(i ∉ B)

    Args:
      inner: any optax optimizer.
      forward_density: D, in (0, 1].
      backward_density: D + M, from D to 1.
      refresh_every: steps between two refreshes; the paper saw no loss up to 100.
      exploration_weight: λ, at least 0.
      exploration_norm: "l2" (as above) or "l1" (sign θ in place of θ).
      stop_exploring_at: when so many steps are finished, B := A and neither changes again.
      rules: ordered (regular expression → `Sparse(...)` or `Dense()`); the first whose expression
        matches the whole path of a leaf applies to it, and every leaf needs one. None: floating
        leaves with two or more axes longer than one are sparse, but for biases, scales and norms.
      pattern: what is kept together, `Unstructured()` if None.
      inner_state: "keep": entries that leave B keep their inner state. "reset": entries that leave
        or enter B get the inner state that `inner.init` gives them; moments become zero.
      exploration_set: "magnitude": B∖A are the units that come next by magnitude; "random": units
        drawn anew at each refresh (the paper's table 1).
      seed: of the random numbers: ties at the first selection, and random units.
      exploration_decay: ours, not the paper's. c ≥ 0, or a schedule of it by the number of finished
        steps: a penalty that is decoupled from the gradient, as the weight decay of AdamW. From
        `inner`'s updates it takes c θ on A and c θ / D on B ∖ A, so that moments do not scale it.
        c contains the learning rate. Set `exploration_weight` to 0 to have it in place of the
        exploration loss.

    Returns:
      A gradient transformation whose update needs `params` and takes gradients at
      `forward_params(params, state)`.

    Raises:
      SparsityError: an argument outside its range; from `init`, rules that do not fit the
        parameters; from `update`, gradients, state or parameters that do not fit each other.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import topkast_jax as tk
      >>> params = {"w": jnp.arange(1.0, 11.0).reshape(2, 5)}
      >>> tx = tk.top_kast(optax.sgd(0.1), forward_density=0.1, backward_density=0.2)
      >>> state = tx.init(params)
      >>> tk.forward_params(params, state)["w"].tolist()
      [[0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 10.0]]

    References:
      Jayakumar et al., `Top-KAST: Top-K Always Sparse Training
      <https://arxiv.org/abs/2106.03517>`_, 2020
    """
    if exploration_norm not in ("l2", "l1"):
        raise SparsityError(f"exploration_norm={shown(exploration_norm)}: must be 'l2' or 'l1'")
    if exploration_set not in ("magnitude", "random"):
        raise SparsityError(
            f"exploration_set={shown(exploration_set)}: must be 'magnitude' or 'random'"
        )
    hint = "; a schedule goes through optax.inject_hyperparams"
    allowed = "a finite number of at least 0" + hint * callable(exploration_weight)
    check_weight("exploration_weight", exploration_weight, allowed)
    tx = sparsify(
        inner,
        TopKast(exploration_weight, exploration_norm, exploration_set),
        forward_density=forward_density,
        backward_density=backward_density,
        refresh_every=refresh_every,
        stop_exploring_at=stop_exploring_at,
        inner_state=inner_state,
        rules=rules,
        pattern=pattern,
        seed=seed,
    )
    return with_exploration_decay(tx, exploration_decay)
