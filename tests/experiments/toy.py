"""A task small enough to train in a test: a perceptron on numbers made from a seed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from experiments.errors import UserError
from experiments.layers import matmul
from experiments.task import ratios

INPUTS, CLASSES = 16, 4
SIZES = {"train": 256, "test": 77}


def default_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {"hidden": 32, "dropout": 0.1},
            # poison: the step whose batch holds a NaN; 0: none
            "data": {"noise": 0.5, "poison": 0},
        }
    )


def validate(config: ConfigDict) -> None:
    if config.model.hidden < 1:
        raise UserError(f"config.model.hidden: found {config.model.hidden}; must be at least 1")


def make_task(config: ConfigDict) -> "Toy":
    return Toy(config)


def examples(split: str, noise: float) -> dict[str, np.ndarray]:
    centers = np.random.default_rng(0).normal(size=(CLASSES, INPUTS))
    rng = np.random.default_rng(1 + list(SIZES).index(split))
    label = rng.integers(CLASSES, size=SIZES[split])
    x = centers[label] + noise * rng.normal(size=(SIZES[split], INPUTS))
    return {"x": x.astype(np.float32), "label": label.astype(np.int32)}


def this_host(values: np.ndarray) -> np.ndarray:
    return np.split(values, jax.process_count())[jax.process_index()]


class TrainData:
    """Batches drawn from a seed and the number of the batch."""

    def __init__(self, config: ConfigDict):
        self.position = 0
        self._config = config
        self._examples = examples("train", config.data.noise)

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._config.seed, self.position))
        rows = rng.integers(SIZES["train"], size=self._config.batch_size)
        self.position += 1
        batch = {name: this_host(values[rows]) for name, values in self._examples.items()}
        if self.position == self._config.data.poison:
            batch["x"][0, 0] = np.nan
        return batch

    def get_state(self) -> dict[str, int]:
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Toy:
    unit = "examples"
    eval_split = "test"
    test_split = "test"
    tensor_axes = (("in/.*", -1), ("out/kernel", -2), (".*", None))

    def __init__(self, config: ConfigDict):
        self.config = config
        self.units_per_step = config.batch_size

    def init(self, rng):
        first, second = jax.random.split(rng)
        hidden = self.config.model.hidden
        params = {
            "in": {
                "kernel": jax.random.normal(first, (INPUTS, hidden)) / 4,
                "bias": jnp.zeros(hidden),
            },
            "out": {
                "kernel": jax.random.normal(second, (hidden, CLASSES)) / 4,
                "bias": jnp.zeros(CLASSES),
            },
        }
        return params, {"mean": jnp.zeros(INPUTS)}

    def _logits(self, params, x, rng=None):
        hidden = jax.nn.relu(matmul(x, params["in"]["kernel"]) + params["in"]["bias"][None])
        if rng is not None:
            hidden *= jax.random.bernoulli(rng, 1 - self.config.model.dropout, hidden.shape)
        return matmul(hidden, params["out"]["kernel"]) + params["out"]["bias"][None]

    def _sums(self, logits, label, weight):
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1)[:, 0]
        right = jnp.argmax(logits, -1) == label
        total = jnp.sum(weight)
        return losses, {
            "loss": (jnp.sum(losses * weight), total),
            "accuracy": (jnp.sum(right * weight), total),
        }

    def loss(self, params, model_state, batch, rng):
        mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(batch["x"], 0)
        logits = self._logits(params, batch["x"] - mean[None], rng)
        losses, sums = self._sums(logits, batch["label"], jnp.ones(len(batch["label"])))
        return jnp.mean(losses), ({"mean": mean}, sums)

    def eval_state(self, model_state, split):
        return model_state

    def eval_step(self, params, eval_state, batch):
        logits = self._logits(params, batch["x"] - eval_state["mean"][None])
        return eval_state, self._sums(logits, batch["label"], batch["weight"])[1]

    def train_data(self) -> TrainData:
        return TrainData(self.config)

    def eval_data(self, split):
        size, found = self.config.batch_size, examples(split, self.config.data.noise)
        found["weight"] = np.ones(SIZES[split], np.float32)
        for start in itertools.count(0, size):
            if start >= SIZES[split]:
                return
            batch = {name: values[start : start + size] for name, values in found.items()}
            missing = size - len(batch["label"])
            yield {
                name: this_host(np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)))
                for name, values in batch.items()
            }

    def model_state_specs(self, shapes):
        return {"mean": PartitionSpec()}

    def eval_context(self, split):
        return {"examples": SIZES[split]}

    def final_metrics(self, totals):
        return ratios(totals)

    def example_batch(self):
        size = self.config.batch_size
        return {
            "x": jax.ShapeDtypeStruct((size, INPUTS), np.float32),
            "label": jax.ShapeDtypeStruct((size,), np.int32),
        }
