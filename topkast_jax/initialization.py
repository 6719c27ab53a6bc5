"""Initial parameters of sparse layers."""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.choosing import over_stack
from topkast_jax.errors import SparsityError
from topkast_jax.sets import keep_masks
from topkast_jax.sparsify import Plan
from topkast_jax.trees import flatten_with_names


class Planned(Protocol):
    """What carries the plan of a sparsity method: a transformation, or an `AlwaysSparse`."""

    plan: Plan


def scale_to_fan_in(params: Any, state: Any, tx: Planned) -> Any:
    r"""Scales the kept entries of initial parameters to the number of inputs of each output.

    The usual initialisations have a variance of c / n for an output of n inputs. If an output keeps
    k of them, its kept entries are multiplied by :math:`\sqrt{n / k}`, which gives them the
    variance c / k (Evci et al., 2022). Call it once, after `init`.

    Args:
      params: initial parameters; the last axis of a leaf numbers its outputs.
      state: the optimizer state that `tx.init(params)` returned, or one that holds it.
      tx: the sparsity method, as `top_kast(...)` and the others return it.

    Returns:
      A tree like `params`; dense leaves and entries that are not kept are the same.

    Raises:
      SparsityError: `tx` is not what a sparsity method returned, but, say, a chain around it; the
        method chooses its first sets from the first gradient, and keeps all entries until then;
        `state` holds no sparsity state, or one of other parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import topkast_jax as tk
      >>> params = {"w": jnp.ones((8, 4))}
      >>> tx = tk.static_random(optax.sgd(0.1), 0.25, seed=0, pattern=tk.FanIn())
      >>> state = tx.init(params)
      >>> float(tk.scale_to_fan_in(params, state, tx)["w"].max())
      2.0

    References:
      Evci et al., `Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win
      <https://arxiv.org/abs/2010.03533>`_, 2022
    """
    if not isinstance(getattr(tx, "plan", None), Plan):
        raise SparsityError(
            f"scale_to_fan_in: tx is a {type(tx).__name__}; must be what top_kast(...) or another "
            "method returned, without what is wrapped around it"
        )
    if tx.plan.method.first_choice != "init":
        raise SparsityError(
            f"scale_to_fan_in: {type(tx.plan.method).__name__} keeps everything until the first "
            "gradient is seen; must be a method whose first sets are chosen by init"
        )
    masks = jax.tree.leaves(keep_masks(params, state)[0])
    _, thetas, treedef = flatten_with_names(params)
    leaves = tx.plan.leaves(params).values()
    return treedef.unflatten(
        theta if leaf is None else over_stack(_scaled, leaf)(theta, mask)
        for theta, mask, leaf in zip(thetas, masks, leaves, strict=True)
    )


def _scaled(theta: jax.Array, mask: jax.Array) -> jax.Array:
    inputs = np.float32(math.prod(theta.shape[:-1]))
    kept = jnp.sum(mask, tuple(range(theta.ndim - 1)), jnp.int32, keepdims=True)
    factor = jnp.sqrt(inputs / jnp.maximum(kept, 1).astype(jnp.float32))
    return jnp.where(mask, theta * factor.astype(theta.dtype), theta)
