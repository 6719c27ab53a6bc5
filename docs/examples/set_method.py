"""SET: sparse evolutionary training (Mocanu et al., 2018, arXiv 1707.04780), in one file."""

import dataclasses

import jax
import jax.numpy as jnp

import topkast_jax as tk


@dataclasses.dataclass(frozen=True)
class SET(tk.Method):
    """Drops the smallest kept units at each refresh and grows as many at random places."""

    drop_fraction: float = 0.3

    def choose(self, layer, leaf, counts):
        """Forward and backward set are the same, and keep their size."""
        chance = jax.random.uniform(layer.key, leaf.grid)
        if layer.sets is None:
            (kept,), _ = leaf.pattern.top(chance, [counts.forward])
            return tk.Sets(kept, kept), ()
        dropped = jnp.floor(self.drop_fraction * counts.forward).astype(jnp.int32)
        magnitudes = leaf.pattern.magnitudes(layer.theta)
        (stays,), _ = leaf.pattern.top(
            magnitudes, [counts.forward - dropped], among=layer.sets.forward
        )
        (grown,), _ = leaf.pattern.top(chance, [dropped], among=~stays)
        return tk.Sets(stays | grown, stays | grown), ()

    def enter(self, theta, leaf):
        """What is grown starts at zero."""
        return jnp.zeros_like(theta)


def set_method(
    inner,
    forward_density,
    refresh_every=100,
    drop_fraction=0.3,
    rules=None,
    pattern=None,
    seed=0,
):
    """SET around any optax optimizer; the other arguments are those of `topkast_jax.sparsify`."""
    return tk.sparsify(
        inner,
        SET(drop_fraction),
        forward_density=forward_density,
        refresh_every=refresh_every,
        inner_state="reset",
        rules=rules,
        pattern=pattern,
        seed=seed,
    )
