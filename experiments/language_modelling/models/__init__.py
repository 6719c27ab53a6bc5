"""Language models, by the names that `config.model.name` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from experiments.language_modelling.models.narrow import transformer_config
from experiments.language_modelling.models.settings import Lengths
from experiments.language_modelling.models.transformer_xl import LanguageModel
from experiments.registry import Registry, function_of

Tree = Any


class Model(Protocol):
    """Pure functions of plain nested parameters.

    Two attributes are optional: `tensor_axes`, as of `experiments.task.Task`, and `linear`, a
    regular expression over the names of kernels that `experiments.layers.matmul` alone reads, which
    generation orders by output where their fan-in is constant.
    """

    @property
    def abstract_params(self) -> Tree:
        """The shapes and types of the parameters, as `init` would return them."""

    @property
    def stacked(self) -> str:
        """The beginning of the names of parameters whose first axis numbers layers, or ""."""

    def init(self, rng: jax.Array) -> Tree:
        """Initialised parameters, float32."""

    def init_memory(self, lanes: int, lengths: Lengths) -> Tree:
        """The memory before the first segment."""

    def memory_specs(self, shapes: Tree) -> Tree:
        """A PartitionSpec for each array of a memory; `experiments.training.partition.BATCH`."""

    def apply(
        self,
        params: Tree,
        memory: Tree,
        tokens_BxT: jax.Array,
        targets_BxT: jax.Array,
        lengths: Lengths,
        *,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Tree]:
        """Negative log-likelihood of the targets in nats, float32 [B, T], and the next memory."""

    def next_log_probs(
        self, params: Tree, memory: Tree, tokens_BxT: jax.Array, lengths: Lengths
    ) -> tuple[jax.Array, Tree]:
        """Log-probabilities of the token after each segment, [B, n_token], and the next memory."""

    def reach(self, lengths: Lengths) -> int:
        """How many segments back a prediction can look."""


def transformer_xl(model: ConfigDict, vocabulary_size: int) -> LanguageModel:
    """A Transformer-XL, or the narrow dense one of `config.model.small_dense`."""
    return LanguageModel(transformer_config(model, vocabulary_size))


# A factory reads the section `model` of a config, and the size of the vocabulary; it raises
# UserError for a bad value.
Factory = Callable[[ConfigDict, int], Model]
MODELS: Registry[Factory] = Registry(
    "config.model.name",
    {"transformer_xl": transformer_xl},
    function_of("model", "vocabulary_size"),
)
