"""Draws text from a language model, one token after another."""

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
      top_k: the number of most probable tokens to draw from; 0 for all tokens.
      top_p: draws from the smallest set of tokens that together have this probability.
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
        """Draws one token from log-probabilities [tokens]."""
        if self.temperature == 0.0:
            return jnp.argmax(log_probs)
        # The largest is 0, so that a temperature near 0 leaves it alone above minus infinity.
        scaled = (log_probs - log_probs.max()) / max(self.temperature, 1e-37)
        return jax.random.categorical(rng, self.restrict(scaled))

    def restrict(self, logits: jax.Array) -> jax.Array:
        """The same logits, with minus infinity for tokens that must not be drawn."""
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
    """Draws the tokens that follow a prompt. The same seed gives the same tokens.

    Args:
      model: the language model.
      params: the parameters on which it runs.
      lengths: those of evaluation. Segments have one token here, so the memory is longer by the
        rest of a segment: a token sees as many before it as the last one of a segment does there.
      prompt: the tokens before, at least one.
      tokens: the number of tokens to draw.
      sampling: how tokens are drawn.
      seed: the seed of the draws.
    """
    if not lengths.same_length:
        lengths = dataclasses.replace(lengths, memory=lengths.memory + lengths.target - 1)
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
    """The compiled function (params, memory, token, rng) → (memory, next token)."""

    @jax.jit
    def step(params: Any, memory: Any, token: jax.Array, rng: jax.Array) -> tuple[Any, jax.Array]:
        log_probs, memory = model.next_log_probs(params, memory, token.reshape(1, 1), lengths)
        return memory, sampling.draw(rng, log_probs[0]).astype(jnp.int32)

    return step
