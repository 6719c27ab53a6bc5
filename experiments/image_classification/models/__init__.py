"""Networks for images, by the names that `config.model.name` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
from ml_collections import ConfigDict

from experiments.image_classification.models.perceptron import lenet_300_100
from experiments.image_classification.models.resnet import ARCHITECTURES, residual_network
from experiments.registry import Registry, function_of


class Network(Protocol):
    """A `flax.nnx.Module`; its parameters are its variables of type `nnx.Param`.

    An attribute `tensor_axes`, as of `experiments.task.Task`, is optional, and so is `image_size`,
    the only height and width that the network takes.
    """

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps normalised images [batch, height, width, channels] to float32 logits."""


# A factory reads the section `model` of a config; it raises UserError for a bad value in it. It
# returns a function (*, channels, num_classes, rngs) that builds the network.
Factory = Callable[[ConfigDict], Callable[..., Network]]
MODELS: Registry[Factory] = Registry(
    "config.model.name",
    {name: residual_network(a) for name, a in ARCHITECTURES.items()}
    | {"lenet_300_100": lenet_300_100},
    function_of("model"),
)
