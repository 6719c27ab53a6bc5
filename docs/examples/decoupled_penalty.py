"""Top-KAST with a decoupled exploration penalty, which the paper does not have.

As AdamW's weight decay, the penalty does not pass through the moments of the inner optimizer.
docs/results.md tried it on enwik8; a config names it as docs.examples.decoupled_penalty:decoupled
and sets `optimizer.name=adamw`, `optimizer.weight_decay` and `method.exploration_weight=0.0`.
"""

from typing import Any

import jax.numpy as jnp
import optax

import topkast_jax as tk
from topkast_jax.sparsify import SparseTransform, check_transformation
from topkast_jax.trees import flatten_with_names


def decoupled(
    inner: optax.GradientTransformation,
    forward_density: float,
    backward_density: float,
    refresh_every: int = 100,
    exploration_weight: float = 0.0,
    rules: Any = None,
    pattern: Any = None,
    seed: int = 0,
) -> SparseTransform:
    """Top-KAST whose inner optimizer decays the weights: by θ on A, and by θ/D on B∖A.

    `inner` reads its parameters for a decoupled weight decay alone, as `optax.adamw` does, and the
    weight of its decay is that of the penalty; dense leaves have none. `exploration_weight` is the
    weight of a penalty within the gradient beside it. The other arguments are those of
    `topkast_jax.top_kast`.
    """
    tx = tk.top_kast(
        _decays(inner), forward_density, backward_density, refresh_every, exploration_weight,
        rules=rules, pattern=pattern, seed=seed,
    )  # fmt: skip

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            return tx.update(grads, state, params, **extra)  # which says that they are missing
        names, arrays, treedef = flatten_with_names(params)
        leaves = tx.plan.sparse_leaves(params)
        forward = treedef.flatten_up_to(tk.keep_masks(params, state)[0])
        decayed = treedef.unflatten([
            jnp.where(kept, theta, theta / leaves[name].forward_density)
            if name in leaves
            else jnp.zeros_like(theta)
            for name, theta, kept in zip(names, arrays, forward, strict=True)
        ])  # fmt: skip
        return tx.update(grads, state, params, decayed=decayed, **extra)

    transform = SparseTransform(tx.init, update)
    transform.plan = tx.plan
    return transform


def _decays(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, with what it decays passed as an extra argument in place of the parameters."""
    check_transformation("inner", inner)
    with_extra = optax.with_extra_args_support(inner)

    def update(
        updates: Any, state: Any, params: Any = None, *, decayed: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        if decayed is None:
            raise tk.SparsityError("a decoupled penalty needs masks: it is not for always_sparse")
        return with_extra.update(updates, state, decayed, **extra)

    return optax.GradientTransformationExtraArgs(with_extra.init, update)
