"""Text, token by token, from a language model and its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.errors import UserError
from experiments.language_modelling.models import Model
from experiments.language_modelling.models.settings import Lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the log-probabilities; 0 takes the most probable token.
      top_k: only among so many of the most probable; 0 for all.
      top_p: only among the fewest that together have this probability.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature={self.temperature}: must be a number of at least 0")
        if self.top_k < 0:
            raise UserError(f"--top_k={self.top_k}: must be at least 0")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"--top_p={self.top_p}: must be above 0 and at most 1")

    def draw(self, rng: jax.Array, log_probs: jax.Array) -> jax.Array:
        """One token from log-probabilities [tokens]."""
        if self.temperature == 0.0:
            return jnp.argmax(log_probs)
        return jax.random.categorical(rng, self.restrict(log_probs / self.temperature))

    def restrict(self, logits: jax.Array) -> jax.Array:
        """The same, with minus infinity for what may not be drawn."""
        order = jnp.argsort(logits, descending=True)
        sorted_logits = logits[order]
        before = jnp.cumsum(jax.nn.softmax(sorted_logits)) - jax.nn.softmax(sorted_logits)
        keep = before < self.top_p
        if self.top_k:
            keep &= jnp.arange(logits.size) < self.top_k
        kept = jnp.where(keep.at[0].set(True), sorted_logits, -jnp.inf)
        return jnp.zeros_like(logits).at[order].set(kept)


def generate(
    model: Model,
    params: Any,
    lengths: Lengths,
    prompt: Sequence[int],
    tokens: int,
    sampling: Sampling,
    seed: int,
) -> list[int]:
    """The tokens that follow a prompt; the same for the same seed.

    Args:
      model: what predicts.
      params: what it runs on.
      lengths: its memory; segments are of one token.
      prompt: one token at least.
      tokens: how many to draw.
      sampling: how.
      seed: of the draws.
    """
    step = _step(model, lengths, sampling)
    memory, key = model.init_memory(1, lengths), jax.random.key(seed)
    for token in prompt:
        memory, following = step(params, memory, jnp.int32(token), key)
    found = []
    for i in range(tokens):
        found.append(int(following))
        memory, following = step(params, memory, following, jax.random.fold_in(key, i))
    return found


def _step(model: Model, lengths: Lengths, sampling: Sampling) -> Callable[..., Any]:
    """(params, memory, token, rng) → (memory, next token), compiled."""

    @jax.jit
    def step(params: Any, memory: Any, token: jax.Array, rng: jax.Array) -> tuple[Any, jax.Array]:
        log_probs, memory = model.next_log_probs(params, memory, token.reshape(1, 1), lengths)
        return memory, sampling.draw(rng, log_probs[0]).astype(jnp.int32)

    return step
