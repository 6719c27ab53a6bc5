"""Residual networks in Flax NNX: ResNet-50 v1.5, the CIFAR ResNets, Wide ResNet.

The names of parameters look like `stem/kernel`, `stage1/block0/conv1/kernel`, `head/kernel`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from experiments.config.checks import check_values
from experiments.image_classification.models.blocks import (
    CHECKS,
    Basic,
    BatchNorm,
    Block,
    Bottleneck,
    Conv,
    Dense,
    PreActivation,
)
from experiments.image_classification.models.pooling import max_pool_3x3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a residual network."""

    block: type[Block]
    stage_blocks: tuple[int, ...]
    stage_widths: tuple[int, ...]
    stem_width: int
    stem_size: int = 3
    stem_stride: int = 1
    max_pool: bool = False


RESNET50 = Architecture(
    block=Bottleneck,
    stage_blocks=(3, 4, 6, 3),
    stage_widths=(64, 128, 256, 512),
    stem_width=64,
    stem_size=7,
    stem_stride=2,
    max_pool=True,
)
RESNET20 = Architecture(
    block=Basic, stage_blocks=(3, 3, 3), stage_widths=(16, 32, 64), stem_width=16
)
WRN_22_2 = Architecture(
    block=PreActivation, stage_blocks=(3, 3, 3), stage_widths=(32, 64, 128), stem_width=16
)
ARCHITECTURES = {
    "resnet50": RESNET50,
    "resnet20": RESNET20,
    "wrn_22_2": WRN_22_2,
    # The stem and the blocks of ResNet-50 with one block in each stage, for its smoke run.
    "resnet14": dataclasses.replace(RESNET50, stage_blocks=(1, 1, 1, 1)),
    # A CIFAR ResNet that halves the image first. It trains on MNIST in half a minute on two cores.
    "small_resnet": Architecture(
        block=Basic,
        stage_blocks=(1, 1, 1),
        stage_widths=(16, 32, 64),
        stem_width=16,
        stem_stride=2,
    ),
}


def residual_network(architecture: Architecture) -> Callable[[ConfigDict], Callable[..., Any]]:
    """The factory of an architecture, which reads `width` and `dtype` from the config."""

    def factory(model: ConfigDict) -> Callable[..., ResNet]:
        check_values(model, CHECKS, "config.model")
        return functools.partial(ResNet, architecture, width=model.width, dtype=model.dtype)

    return factory


class Stage(nnx.Module):
    """Blocks of one width. The first of them may halve the resolution."""

    def __init__(
        self, block: type[Block], inputs: int, width: int, count: int, stride: int, rngs: nnx.Rngs
    ):
        self.names = tuple(f"block{i}" for i in range(count))
        for i, name in enumerate(self.names):
            setattr(self, name, block(inputs, width, stride if i == 0 else 1, rngs))
            inputs = width * block.EXPANSION

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Applies the blocks in order."""
        for name in self.names:
            x = getattr(self, name)(x, train)
        return x


class ResNet(nnx.Module):
    """A stem, stages that halve the resolution from the second one on, and a linear head.

    Args:
        architecture: the shape of the network.
        channels: the channels of the input.
        num_classes: the number of logits.
        width: multiplies every number of channels.
        dtype: the dtype of activations and products; parameters and statistics are float32.
        rngs: the random numbers for the initialisation.
    """

    # The widest kernels, by output channels.
    tensor_axes = ((r"stage[34]/.*kernel", -1), (r".*", None))

    def __init__(
        self,
        architecture: Architecture,
        *,
        channels: int,
        num_classes: int,
        width: float = 1.0,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        block = architecture.block
        features = max(1, round(architecture.stem_width * width))
        self.dtype = dtype
        self.max_pool = architecture.max_pool
        self.pre_activated = block.PRE_ACTIVATED
        self.stem = Conv(channels, features, architecture.stem_size, architecture.stem_stride, rngs)
        if not self.pre_activated:
            self.stem_bn = BatchNorm(features, rngs)
        self.stages = tuple(f"stage{i + 1}" for i in range(len(architecture.stage_widths)))
        for i, name in enumerate(self.stages):
            wide = max(1, round(architecture.stage_widths[i] * width))
            count, stride = architecture.stage_blocks[i], 1 if i == 0 else 2
            setattr(self, name, Stage(block, features, wide, count, stride, rngs))
            features = wide * block.EXPANSION
        if self.pre_activated:
            self.head_bn = BatchNorm(features, rngs)
        self.head = Dense(features, num_classes, rngs)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps normalised images to float32 logits; training also updates the batch statistics."""
        x = self.stem(images.astype(self.dtype))
        if not self.pre_activated:
            x = self.stem_bn(x, train, relu=True)
        if self.max_pool:
            x = max_pool_3x3(x)
        for name in self.stages:
            x = getattr(self, name)(x, train)
        if self.pre_activated:
            x = self.head_bn(x, train, relu=True)
        # The head computes in float32, because the loss takes differences of its logits.
        return self.head(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))
