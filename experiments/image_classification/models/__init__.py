"""Networks for images, by the names that `config.model.name` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
from flax import nnx
from ml_collections import ConfigDict

from experiments.image_classification.models.resnet import ARCHITECTURES, residual_network
from experiments.registry import Registry


class Network(Protocol):
    """A `flax.nnx.Module`; its parameters are its variables of type `nnx.Param`."""

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps normalised images [batch, height, width, channels] to float32 logits."""


class Builder(Protocol):
    """Makes a network of one configuration."""

    def __call__(self, *, channels: int, num_classes: int, rngs: nnx.Rngs) -> Network:
        """The network with initialised parameters.

        Args:
            channels: the channels of the images.
            num_classes: the number of logits.
            rngs: the random numbers for the initialisation.
        """


# A factory reads the section `model` of a config; it raises UserError for a bad value in it.
Factory = Callable[[ConfigDict], Builder]
MODELS: Registry[Factory] = Registry(
    "config.model.name", {name: residual_network(a) for name, a in ARCHITECTURES.items()}
)
