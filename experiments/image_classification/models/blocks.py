"""Layers and residual blocks. They compute in the dtype of their input; parameters are float32."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import convolutions, layers
from experiments.config.checks import Check, number, one_of


class Conv(nnx.Module):
    """A square convolution without bias, with the same padding on both sides."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, rngs: nnx.Rngs):
        init = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (size, size, inputs, outputs), jnp.float32))
        self.strides = (stride, stride)
        pad = (size - 1) // 2
        self.padding = ((pad, pad), (pad, pad))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves `x`."""
        return layers.conv(x, self.kernel.get_value(), self.strides, self.padding)


# Of the keys that all models here read.
CHECKS: dict[str, Check] = {
    "width": number(0, 1e6, above=True),
    "dtype": one_of("float32", "bfloat16"),
}


class Dense(nnx.Module):
    """A linear layer with a bias."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rngs: nnx.Rngs,
        init: jax.nn.initializers.Initializer = jax.nn.initializers.normal(0.01),  # noqa: B008
    ):
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the last axis of `x`."""
        y = layers.matmul(x, self.kernel.get_value())
        return y + layers.along_last(self.bias.get_value(), y)


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation in float32, whatever the dtype of the activations."""

    def __init__(self, features: int, rngs: nnx.Rngs, *, zero_scale: bool = False):
        init = jax.nn.initializers.zeros if zero_scale else jax.nn.initializers.ones
        super().__init__(features, momentum=0.9, scale_init=init, rngs=rngs)

    def __call__(  # type: ignore[override]
        self, x: jax.Array, train: bool, *, relu: bool = False
    ) -> jax.Array:
        """Normalises `x` by the batch's statistics in training, by the running ones otherwise.

        With `relu`, what it returns is rectified. In training, it has no forward-mode derivative.
        """
        dtype, x = x.dtype, x.astype(jnp.float32)
        if not train:
            y = super().__call__(x, use_running_average=True)
            return (jax.nn.relu(y) if relu else y).astype(dtype)
        assert self.scale is not None
        assert self.bias is not None
        y, mean, variance = _normalized(x, self.scale[...], self.bias[...], self.epsilon, relu)
        for running, batch in ((self.mean, mean), (self.var, variance)):
            batch = jax.lax.stop_gradient(batch)
            running[...] = self.momentum * running[...] + (1 - self.momentum) * batch
        return y.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalized(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, relu: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`x` normalised over all axes but the last, and its means and variances, without gradients.

    Its gradient is written out, because what JAX derives goes over the images more often: with
    `relu`, where the output was positive is told from `x` instead of from the output.
    """
    return _normalized_forward(x, scale, bias, epsilon, relu)[0]


def _normalized_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, relu: bool
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    entries = x.size // x.shape[-1]
    total, squares = convolutions.channel_sums(x, x, jnp.zeros_like(scale))
    mean = total / entries
    variance = jnp.maximum(0.0, squares / entries - mean * mean)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = _affine(x - layers.along_last(mean, x), inverse * scale, bias)
    return (jax.nn.relu(y) if relu else y, mean, variance), (x, mean, inverse, scale, bias)


def _normalized_backward(
    epsilon: float, relu: bool, residuals: tuple[jax.Array, ...], gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    del epsilon
    (x, mean, inverse, scale, bias), (gradient, _, _) = residuals, gradients
    centred, entries = x - layers.along_last(mean, x), x.size // x.shape[-1]
    factor = inverse * scale
    positive = (factor, bias) if relu else None
    by_bias, by_scale = convolutions.channel_sums(x, gradient, mean, positive)
    by_scale *= inverse
    if relu:
        gradient = jnp.where(_affine(centred, factor, bias) > 0, gradient, 0)
    of_centred, constant = -factor * inverse * by_scale / entries, -factor * by_bias / entries
    by_x = layers.along_last(factor, x) * gradient + _affine(centred, of_centred, constant)
    return by_x, by_scale, by_bias


_normalized.defvjp(_normalized_forward, _normalized_backward)


def _affine(x: jax.Array, factor: jax.Array, constant: jax.Array) -> jax.Array:
    return x * layers.along_last(factor, x) + layers.along_last(constant, x)


class Bottleneck(nnx.Module):
    """Convolutions of 1×1, 3×3 and 1×1, with the stride in the 3×3 one (ResNet v1.5).

    The scale of the last normalisation starts at zero.
    """

    EXPANSION: ClassVar[int] = 4
    PRE_ACTIVATED: ClassVar[bool] = False

    def __init__(self, inputs: int, width: int, stride: int, rngs: nnx.Rngs):
        outputs = width * self.EXPANSION
        self.conv1 = Conv(inputs, width, 1, 1, rngs)
        self.bn1 = BatchNorm(width, rngs)
        self.conv2 = Conv(width, width, 3, stride, rngs)
        self.bn2 = BatchNorm(width, rngs)
        self.conv3 = Conv(width, outputs, 1, 1, rngs)
        self.bn3 = BatchNorm(outputs, rngs, zero_scale=True)
        self.projects = stride > 1 or inputs != outputs
        if self.projects:
            self.shortcut = Conv(inputs, outputs, 1, stride, rngs)
            self.shortcut_bn = BatchNorm(outputs, rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Applies the block."""
        y = self.bn1(self.conv1(x), train, relu=True)
        y = self.bn2(self.conv2(y), train, relu=True)
        y = self.bn3(self.conv3(y), train)
        if self.projects:
            x = self.shortcut_bn(self.shortcut(x), train)
        return jax.nn.relu(x + y)


class Basic(nnx.Module):
    """Two convolutions of 3×3, with shortcuts that have no parameters.

    Where the shape changes, the shortcut subsamples the image and pads the channels with zeros (He
    et al. 2015, section 4.2, option A).
    """

    EXPANSION: ClassVar[int] = 1
    PRE_ACTIVATED: ClassVar[bool] = False

    def __init__(self, inputs: int, width: int, stride: int, rngs: nnx.Rngs):
        self.conv1 = Conv(inputs, width, 3, stride, rngs)
        self.bn1 = BatchNorm(width, rngs)
        self.conv2 = Conv(width, width, 3, 1, rngs)
        self.bn2 = BatchNorm(width, rngs)
        self.stride = stride
        self.new_channels = width - inputs

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Applies the block."""
        y = self.bn1(self.conv1(x), train, relu=True)
        y = self.bn2(self.conv2(y), train)
        x = x[:, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        after = self.new_channels - before
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)))
        return jax.nn.relu(x + y)


class PreActivation(nnx.Module):
    """Two convolutions of 3×3, each after normalisation and ReLU (Zagoruyko and Komodakis 2016)."""

    EXPANSION: ClassVar[int] = 1
    PRE_ACTIVATED: ClassVar[bool] = True

    def __init__(self, inputs: int, width: int, stride: int, rngs: nnx.Rngs):
        self.bn1 = BatchNorm(inputs, rngs)
        self.conv1 = Conv(inputs, width, 3, stride, rngs)
        self.bn2 = BatchNorm(width, rngs)
        self.conv2 = Conv(width, width, 3, 1, rngs)
        self.projects = stride > 1 or inputs != width
        if self.projects:
            self.shortcut = Conv(inputs, width, 1, stride, rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Applies the block."""
        y = self.bn1(x, train, relu=True)
        if self.projects:
            x = self.shortcut(y)
        y = self.bn2(self.conv1(y), train, relu=True)
        return x + self.conv2(y)


Block = Bottleneck | Basic | PreActivation
