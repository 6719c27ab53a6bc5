"""Image classification: a network, labelled images, and their cross-entropy."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from experiments.errors import UserError
from experiments.image_classification.config import default_config, validate
from experiments.image_classification.data import DATA_SETS, pipeline
from experiments.image_classification.data.preprocessing import RECIPES, Recipe
from experiments.image_classification.data.sources import Source
from experiments.image_classification.models import MODELS, Network
from experiments.layers import along_last
from experiments.task import Batch, Sums, Totals, Tree, ratios
from experiments.training import small_dense
from experiments.training.partition import WHOLE, Rules

__all__ = ["ImageClassification", "default_config", "make_task", "validate"]

_WIDTH_PARTS = 256  # The widths of small dense networks are multiples of this part of the full one.


class ImageClassification:
    """The task; see `experiments.task.Task`."""

    unit = "examples"
    eval_split = "test"
    test_split = "test"

    def __init__(self, config: ConfigDict):
        self._data = config.data
        self._label_smoothing = config.model.get("label_smoothing", 0.0)
        self._data_set = DATA_SETS.get(config.data.name)(config.data)
        self._seed = config.seed
        self.units_per_step = config.batch_size
        self._sources: dict[str, Source] = {}
        self._recipe: Recipe = RECIPES.get(config.data.recipe)
        self._num_classes = self._data_set.num_classes()
        self._builder = self._make_builder(config.model)
        abstract = nnx.eval_shape(lambda: self._make_model(jax.random.key(0)))
        size = getattr(abstract, "image_size", self._data.image_size)
        if size != self._data.image_size:
            raise UserError(
                f"config.data.image_size: found {self._data.image_size}; must be {size}, which the "
                f"model {config.model.name} is for"
            )
        self.tensor_axes: Rules = getattr(abstract, "tensor_axes", WHOLE)
        self._graph = nnx.graphdef(abstract)
        self._abstract_params = nnx.state(abstract, nnx.Param)
        self._abstract_rest = nnx.state(abstract, nnx.Not(nnx.Param))

    def init(self, rng: jax.Array) -> tuple[Tree, Tree]:
        """Initial parameters and batch statistics, as nested dicts."""
        return _dicts(self._make_model(rng))

    def loss(
        self, params: Tree, model_state: Tree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Sums]]:
        """Mean cross-entropy with smoothed labels over the batch; updates the statistics."""
        del rng  # The data pipeline does the augmentation.
        model = self._merge(params, model_state)
        logits = model(self._normalise(batch["image"]), train=True)
        targets = jax.nn.one_hot(batch["label"], self._num_classes)
        targets = optax.smooth_labels(targets, self._label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
        _, new_state = _dicts(model)
        weights = jnp.ones_like(losses)
        return jnp.mean(losses), (new_state, _sums(losses, logits, batch["label"], weights))

    def eval_state(self, model_state: Tree, split: str) -> Tree:
        """The running batch statistics."""
        del split
        return model_state

    def eval_step(self, params: Tree, eval_state: Tree, batch: Batch) -> tuple[Tree, Sums]:
        """Weighted sums of the cross-entropy, without smoothing, and of correct predictions."""
        model = self._merge(params, eval_state)
        logits = model(self._normalise(batch["image"]), train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return eval_state, _sums(losses, logits, batch["label"], batch["weight"])

    def train_data(self) -> pipeline.TrainBatches:
        """The part of this host of endless shuffled epochs.

        Raises:
            UserError: a batch is larger than the data set.
        """
        source = self._source("train")
        if self.units_per_step > len(source):
            raise UserError(
                f"config.batch_size: found {self.units_per_step}; must be at most the "
                f"{len(source)} images to train on"
            )
        return pipeline.TrainBatches(source, self._options())

    def eval_data(self, split: str) -> Iterable[Batch]:
        """Every image of a split once."""
        return pipeline.eval_batches(self._source(split), self._options())

    def model_state_specs(self, shapes: Tree) -> Tree:
        """Every device holds a copy of the batch statistics, which are small."""
        return jax.tree.map(lambda _: PartitionSpec(), shapes)

    def eval_context(self, split: str) -> dict[str, Any]:
        """The data set, and how many of its images are counted."""
        return {
            "dataset": self._data.name,
            "examples": len(self._source(split)),
            "image_size": self._data.image_size,
        }

    def final_metrics(self, totals: Totals) -> dict[str, float]:
        """Mean loss and accuracy."""
        return ratios(totals)

    def example_batch(self) -> Batch:
        """One training batch of all hosts, as abstract arrays."""
        size, count = self._data.image_size, self.units_per_step
        return {
            "image": jax.ShapeDtypeStruct((count, size, size, self._data.channels), jnp.uint8),
            "label": jax.ShapeDtypeStruct((count,), jnp.int32),
        }

    def _make_builder(self, model: ConfigDict) -> Callable[..., Network]:
        """The builder of the network, narrowed if it is to be a small dense one."""
        factory, small = MODELS.get(model.name), model.get("small_dense")
        if small is None or small.forward_density == 1.0:
            return factory(model)

        def at(part: int) -> Callable[..., Network]:
            narrow = model.copy_and_resolve_references()
            narrow.width = model.width * part / _WIDTH_PARTS
            return factory(narrow)

        def params(part: int) -> Tree:
            return nnx.state(nnx.eval_shape(lambda: self._build(at(part))), nnx.Param)

        budget = small_dense.active_parameters(
            params(_WIDTH_PARTS), small.rules, small.forward_density
        )
        return at(
            small_dense.widest(
                lambda part: small_dense.parameters(params(part)), _WIDTH_PARTS, budget
            )
        )

    def _build(self, builder: Callable[..., Network], rng: jax.Array | int = 0) -> Network:
        rngs = nnx.Rngs(params=rng)
        channels, classes = self._data.channels, self._num_classes
        return builder(channels=channels, num_classes=classes, rngs=rngs)

    def _make_model(self, rng: jax.Array) -> Network:
        return self._build(self._builder, rng)

    def _merge(self, params: Tree, rest: Tree) -> Network:
        variables = []
        for abstract, values in ((self._abstract_params, params), (self._abstract_rest, rest)):
            state = nnx.clone(abstract)
            nnx.replace_by_pure_dict(state, values)
            variables.append(state)
        # The model is a copy, because BatchNorm writes its statistics into it.
        return nnx.merge(self._graph, *variables, copy=True)

    def _normalise(self, images: jax.Array) -> jax.Array:
        scaled = images.astype(jnp.float32) / 255.0
        mean, std = jnp.asarray(self._recipe.mean), jnp.asarray(self._recipe.std)
        return (scaled - along_last(mean, scaled)) / along_last(std, scaled)

    def _source(self, split: str) -> Source:
        if split not in self._sources:
            source = self._data_set.source(split)
            if self._data.cache and not self._data_set.in_memory:
                source = pipeline.cached(source, self._recipe, self._data.image_size)
            self._sources[split] = source
        return self._sources[split]

    def _options(self) -> pipeline.Options:
        return pipeline.Options(
            recipe=self._recipe,
            image_size=self._data.image_size,
            batch_size=self.units_per_step,
            seed=self._seed,
            threads=self._data.threads,
            workers=self._data.workers,
            read_ahead=self._data.read_ahead,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )


def _sums(losses: jax.Array, logits: jax.Array, labels: jax.Array, weights: jax.Array) -> Sums:
    correct = jnp.argmax(logits, axis=-1) == labels
    count = jnp.sum(weights)
    return {
        "loss": (jnp.sum(losses * weights), count),
        "accuracy": (jnp.sum(correct * weights), count),
    }


def _dicts(model: Network) -> tuple[Tree, Tree]:
    """The parameters and all other variables, as nested dicts."""
    params, rest = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
    return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def make_task(config: ConfigDict) -> ImageClassification:
    """The task of a validated config."""
    return ImageClassification(config)
