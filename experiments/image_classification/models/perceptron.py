"""LeNet-300-100 in Flax NNX: the fully connected network that work on pruning starts with.

The names of parameters are `hidden1/kernel`, `hidden2/kernel`, `head/kernel`, and their biases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from experiments.config.checks import check_values
from experiments.image_classification.models.blocks import CHECKS, Dense

SIDE = 28
HIDDEN = (300, 100)


def lenet_300_100(model: ConfigDict) -> Callable[..., Any]:
    """The factory, which reads `width` and `dtype` from the config."""
    check_values(model, CHECKS, "config.model")
    return functools.partial(Perceptron, width=model.width, dtype=model.dtype)


class Perceptron(nnx.Module):
    """Two hidden layers of 300 and 100 units with ReLU, and a linear head.

    Args:
        channels: the channels of the input.
        num_classes: the number of logits.
        width: multiplies the numbers of hidden units.
        dtype: the dtype of activations and products; parameters are float32.
        rngs: the random numbers for the initialisation.
    """

    image_size = SIDE

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        width: float = 1.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        first, second = (max(1, round(units * width)) for units in HIDDEN)
        self.dtype = dtype
        init = jax.nn.initializers.he_normal()
        self.hidden1 = Dense(SIDE * SIDE * channels, first, rngs, init)
        self.hidden2 = Dense(first, second, rngs, init)
        self.head = Dense(second, num_classes, rngs)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps normalised images to float32 logits; it is the same in training."""
        del train
        x = images.reshape(images.shape[0], -1).astype(self.dtype)
        x = jax.nn.relu(self.hidden1(x))
        x = jax.nn.relu(self.hidden2(x))
        # The head computes in float32, because the loss takes differences of its logits.
        return self.head(x.astype(jnp.float32))
