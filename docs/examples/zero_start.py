"""Top-KAST in which the backward set is entered at zero, which the paper does not have.

docs/results.md tried it on enwik8; a config names it as docs.examples.zero_start:zero_start.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import topkast_jax as tk
from topkast_jax.top_kast import TopKast


@dataclasses.dataclass(frozen=True)
class ZeroStart(TopKast):
    """Top-KAST in which what enters the backward set starts at zero, in place of its old value."""

    def enter(self, theta: jax.Array, leaf: tk.Leaf) -> jax.Array:
        """Zeros."""
        return jnp.zeros_like(theta)


def zero_start(
    inner: optax.GradientTransformation,
    forward_density: float,
    backward_density: float,
    refresh_every: int = 100,
    exploration_weight: float = 1e-4,
    inner_state: Literal["keep", "reset"] = "keep",
    rules: Any = None,
    pattern: Any = None,
    seed: int = 0,
) -> Any:
    """Top-KAST with a start at zero; its arguments are among those of `topkast_jax.top_kast`."""
    return tk.sparsify(
        inner, ZeroStart(exploration_weight), forward_density=forward_density,
        backward_density=backward_density, refresh_every=refresh_every, inner_state=inner_state,
        rules=rules, pattern=pattern, seed=seed,
    )  # fmt: skip
