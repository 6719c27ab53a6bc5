"""Top-KAST (Jayakumar et al., NeurIPS 2020)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from topkast_jax.errors import SparsityError
from topkast_jax.patterns import Pattern
from topkast_jax.rules import Density, Leaf, Rules
from topkast_jax.selection import Thresholds, keep_count, top_k_masks
from topkast_jax.sparsify import Method, Sets, SparseTransform, sparsify


@dataclasses.dataclass(frozen=True)
class TopKast(Method):
    """Sets by magnitude, and the exploration loss that lets entries of B enter A.

    Attributes:
      exploration_weight: λ, the weight of the exploration loss.
      exploration_norm: "l2" (gradient λθ on A, λθ/D on B∖A) or "l1" (sign θ in place of θ).
    """

    exploration_weight: float | jax.Array = 1e-4
    exploration_norm: Literal["l2", "l1"] = "l2"

    def start(self, theta: jax.Array, leaf: Leaf, key: jax.Array) -> tuple[Sets, Any]:
        """A and B: the units of largest magnitude (section 2.1)."""
        del key
        return _select(theta, leaf, None)

    def gradient(self, grad: jax.Array, theta: jax.Array, sets: Sets, leaf: Leaf) -> jax.Array:
        """Adds the gradient of the exploration loss (section 2.3)."""
        weight = jnp.asarray(self.exploration_weight, grad.dtype)
        density = jnp.asarray(leaf.forward_density, grad.dtype)
        pull = theta if self.exploration_norm == "l2" else jnp.sign(theta)
        scale = jnp.where(sets.forward, weight, weight / density)
        return grad + scale * pull.astype(grad.dtype)

    def change(
        self,
        theta: jax.Array,
        grad: jax.Array | None,
        sets: Sets,
        memory: Any,
        leaf: Leaf,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[Sets, Any]:
        """The same selection from the present θ, started at the last thresholds."""
        del grad, sets, key, step
        return _select(theta, leaf, memory)


class LastThresholds(NamedTuple):
    """Where the next selection starts: int32 scalars, bit patterns of the last thresholds."""

    forward: jax.Array
    backward: jax.Array


def _select(theta: jax.Array, leaf: Leaf, last: LastThresholds | None) -> tuple[Sets, Any]:
    magnitudes = leaf.pattern.magnitudes(theta)
    counts = (
        count_of(magnitudes.size, leaf.forward_density),
        count_of(magnitudes.size, leaf.backward_density),
    )
    start = None if last is None else Thresholds(jnp.stack(last), jnp.zeros(2, jnp.int32))
    (forward, backward), thresholds = top_k_masks(magnitudes, counts, start)
    sets = Sets(
        leaf.pattern.expand(forward, theta.shape), leaf.pattern.expand(backward, theta.shape)
    )
    return sets, LastThresholds(*thresholds.key)


def count_of(units: int, density: Density) -> int | jax.Array:
    """How many of `units` a density keeps: max(1, ⌊density · units + ½⌋).

    A plain number is rounded on the host in double precision. A traced density (a hyperparameter
    of `optax.inject_hyperparams`) is read to six decimals and counted in exact integers.
    """
    if not isinstance(density, jax.core.Tracer):
        return keep_count(units, float(density))
    million = 1_000_000
    parts = jnp.round(density * million).astype(jnp.int32)
    whole, rest = divmod(units, million)
    high, low = divmod(rest, 1000)
    thousands, left = jnp.divmod(parts * high, 1000)
    count = parts * whole + thousands + (left * 1000 + parts * low + million // 2) // million
    return jnp.maximum(1, count)


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
      refresh_every: steps between two selections; the paper saw no loss up to 100.
      exploration_weight: λ, at least 0.
      exploration_norm: "l2" (as above) or "l1" (sign θ in place of θ).
      stop_exploring_at: when so many steps are finished, B := A and neither changes again.
      rules: ordered (regular expression → `Sparse(...)` or `Dense()`) over parameter paths; None:
        floating leaves with two or more axes are sparse.
      pattern: what is kept together, `Unstructured()` if None.
      inner_state: "keep" or "reset" the inner state of entries that leave B, to what `inner.init`
        gives them: moments to zero. With "reset", what enters B starts from there as well.

    Returns:
      A gradient transformation whose update needs `params` and takes gradients at
      `forward_params(params, state)`.

    Raises:
      SparsityError: an argument outside its range; from `init`, rules that do not fit the
        parameters.

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
        raise SparsityError(f"exploration_norm={exploration_norm!r}: must be 'l2' or 'l1'")
    if not isinstance(exploration_weight, jax.core.Tracer) and not exploration_weight >= 0:
        raise SparsityError(f"exploration_weight={exploration_weight!r}: must be at least 0")
    return sparsify(
        inner,
        TopKast(exploration_weight, exploration_norm),
        forward_density=forward_density,
        backward_density=backward_density,
        refresh_every=refresh_every,
        stop_exploring_at=stop_exploring_at,
        inner_state=inner_state,
        rules=rules,
        pattern=pattern,
    )
