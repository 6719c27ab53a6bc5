"""Language modelling: a model with a memory, texts in lanes, bits per character or perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.language_modelling.config import (
    check_lengths,
    default_config,
    lengths,
    make_model,
    validate,
)
from experiments.language_modelling.data import TEXTS, streams
from experiments.language_modelling.data.corpus import Corpus
from experiments.task import Batch, Sums, Totals, Tree
from experiments.training.partition import WHOLE, Rules

__all__ = ["LanguageModelling", "default_config", "make_task", "validate"]


class LanguageModelling:
    """The task; see `experiments.task.Task`. The model state is the lanes' memory."""

    unit = "tokens"
    test_split = "test"

    def __init__(self, config: ConfigDict):
        self._config = config
        self._lanes = config.batch_size
        self._train = lengths(config, "train")
        self._evaluation = lengths(config, "evaluation")
        self.units_per_step = self._lanes * self._train.target
        self.eval_split = config.data.eval_split
        self.model = make_model(config)
        self.tensor_axes: Rules = getattr(self.model, "tensor_axes", WHOLE)
        self._text = TEXTS.get(config.data.name)(config.data)
        self._share = streams.Share(jax.process_index(), jax.process_count())
        self._corpus: Corpus | None = None

    def init(self, rng: jax.Array) -> tuple[Tree, Tree]:
        """Initial parameters and an empty memory."""
        return self.model.init(rng), self.model.init_memory(self._lanes, self._train)

    def loss(
        self, params: Tree, model_state: Tree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Sums]]:
        """Mean negative log-likelihood in nats over one segment of every lane."""
        nll, memory = self.model.apply(
            params, model_state, batch["tokens"], batch["targets"], self._train, rng=rng
        )
        total = jnp.sum(nll)
        return total / nll.size, (memory, {"loss": (total, jnp.float32(nll.size))})

    def eval_state(self, model_state: Tree, split: str) -> Tree:
        """An empty memory of evaluation's length."""
        del model_state, split
        return self.model.init_memory(self._eval_rows, self._evaluation)

    def eval_step(self, params: Tree, eval_state: Tree, batch: Batch) -> tuple[Tree, Sums]:
        """Negative log-likelihood, summed with the weights."""
        nll, memory = self.model.apply(
            params, eval_state, batch["tokens"], batch["targets"], self._evaluation
        )
        weights = batch["weights"]
        return memory, {"loss": (jnp.sum(nll * weights), jnp.sum(weights))}

    def train_data(self) -> streams.TrainStream:
        """This host's lanes of the training part."""
        tokens = self._open().splits["train"]
        return streams.TrainStream(
            tokens, self._lanes, self._train.target, self._share, self._identity()
        )

    def eval_data(self, split: str) -> Iterable[Batch]:
        """Every token of a split once, except its first, which has no token before it."""
        tokens = self._open().splits[split]
        plan = self.eval_plan(len(tokens))
        return streams.eval_segments(tokens, plan, self._share.of(self._eval_rows))

    def eval_plan(self, tokens: int) -> streams.EvalPlan:
        """How a text of that many tokens is divided among the lanes."""
        target, warmup = self._evaluation.target, self.model.reach(self._evaluation)
        return streams.EvalPlan(tokens - 1, target, self._config.data.eval_batch_size, warmup)

    def model_state_specs(self, shapes: Tree) -> Tree:
        """The memory is sharded like its lanes."""
        return self.model.memory_specs(shapes)

    def eval_context(self, split: str) -> dict[str, Any]:
        """The text, the number of tokens that are counted, and how far the model looks back."""
        return {
            "dataset": self._config.data.name,
            "level": self._config.data.level,
            "tokens": len(self._open().splits[split]) - 1,
            **self._config.model.evaluation.to_dict(),
        }

    def final_metrics(self, totals: Totals) -> dict[str, float]:
        """Nats per token, and bits per character, or perplexity for words."""
        top, bottom = totals["loss"]
        loss = top / bottom if bottom else math.nan
        if self._config.data.level == "word":
            # At most 8e99, so that the loss of a model that diverges has one that can be averaged.
            return {"loss": loss, "perplexity": math.exp(min(loss, 230.0))}
        return {"loss": loss, "bpc": loss / math.log(2)}

    def example_batch(self) -> Batch:
        """One training batch of all hosts, as abstract arrays."""
        segment = jax.ShapeDtypeStruct((self._lanes, self._train.target), jnp.int32)
        return {"tokens": segment, "targets": segment}

    @property
    def _eval_rows(self) -> int:
        """The lanes of evaluation, with empty ones so that they divide evenly over all devices."""
        devices = jax.device_count()
        return math.ceil(self._config.data.eval_batch_size / devices) * devices

    def _open(self) -> Corpus:
        if self._corpus is None:
            self._corpus = self._text.open()
            check_lengths(self._config, self._corpus)
        return self._corpus

    def _identity(self) -> dict[str, Any]:
        """What must agree for a position in the text to keep its meaning."""
        corpus = self._open()
        return {
            "vocabulary": corpus.vocabulary.fingerprint,
            "tokens": len(corpus.splits["train"]),
            "symbols": None if self._text.known else list(corpus.vocabulary.symbols),
        }


def make_task(config: ConfigDict) -> LanguageModelling:
    """The task of a validated config."""
    return LanguageModelling(config)
