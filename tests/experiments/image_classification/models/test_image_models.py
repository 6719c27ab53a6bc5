"""Networks for images: parameter counts, shapes, and blocks against plain NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments import layers
from experiments.image_classification.models import blocks
from experiments.image_classification.models.perceptron import Perceptron
from experiments.image_classification.models.pooling import max_pool_3x3
from experiments.image_classification.models.resnet import ARCHITECTURES, ResNet
from topkast_jax.always_sparse.products import native_library


def build(name, num_classes=10, **options):
    architecture = ARCHITECTURES[name]
    return ResNet(architecture, channels=3, num_classes=num_classes, rngs=nnx.Rngs(0), **options)


@functools.cache
def abstract(name, num_classes=10, **options):
    return nnx.eval_shape(lambda: build(name, num_classes, **options))


def traced(function, images, name, **options):
    """The shapes that a function of a fresh model and images gives; nothing is computed."""
    images = jax.ShapeDtypeStruct(images, jnp.float32)
    return jax.eval_shape(lambda x: function(build(name, **options), x), images)


def flat_params(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(path): leaf.get_value() for path, leaf in flat}


def count(model):
    return sum(math.prod(leaf.shape) for leaf in flat_params(model).values())


def cifar_count(n, widths, stem, *, pre_activated):
    """Parameters of a CIFAR network, written out from the papers' tables."""
    total = 9 * 3 * stem + (0 if pre_activated else 2 * stem)
    inputs = stem
    for width in widths:
        for block in range(n):
            total += 9 * inputs * width + 9 * width * width
            total += 2 * width + 2 * (inputs if pre_activated else width)
            if pre_activated and block == 0 and inputs != width:
                total += inputs * width
            inputs = width
    return total + (2 * inputs if pre_activated else 0) + inputs * 10 + 10


def test_resnet50_has_the_published_number_of_parameters():
    assert count(abstract("resnet50", num_classes=1000)) == 25_557_032


def test_cifar_networks_have_the_papers_number_of_parameters():
    assert count(abstract("resnet20")) == cifar_count(3, (16, 32, 64), 16, pre_activated=False)
    assert count(abstract("resnet20")) == 269_722
    assert count(abstract("wrn_22_2")) == cifar_count(3, (32, 64, 128), 16, pre_activated=True)


def test_parameter_paths_read_well():
    paths = set(flat_params(abstract("resnet50")))
    wanted = {"stem/kernel", "stage1/block0/conv1/kernel", "stage4/block2/bn3/scale"}
    wanted |= {"head/kernel", "head/bias", "stage2/block0/shortcut/kernel", "stem_bn/bias"}
    assert wanted <= paths


def test_width_multiplies_every_channel():
    narrow = flat_params(abstract("resnet50", width=0.25))
    assert narrow["stem/kernel"].shape == (7, 7, 3, 16)
    assert narrow["stage4/block0/conv3/kernel"].shape == (1, 1, 128, 512)


def test_resnet50_resolutions():
    def stages(model, x):
        seen = [max_pool_3x3(model.stem(x))]
        for name in model.stages:
            seen.append(getattr(model, name)(seen[-1], train=False))
        return seen

    assert [x.shape[1:] for x in traced(stages, (1, 224, 224, 3), "resnet50")] == [
        (56, 56, 64),
        (56, 56, 256),
        (28, 28, 512),
        (14, 14, 1024),
        (7, 7, 2048),
    ]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_logits_are_float32_and_one_a_class(name):
    size = 64 if ARCHITECTURES[name].max_pool else 32
    logits = traced(
        lambda model, x: model(x, train=False),
        (2, size, size, 3),
        name,
        num_classes=7,
        dtype="bfloat16",
    )
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


@pytest.fixture
def products(monkeypatch):
    """(operand, kernel, result) of every product that a traced model makes."""
    seen = []

    def watched(product):
        def call(x, kernel, *rest):
            y = product(x, kernel, *rest)
            seen.append((x, kernel, y))
            return y

        return call

    monkeypatch.setattr(layers, "conv", watched(layers.conv))
    monkeypatch.setattr(layers, "matmul", watched(layers.matmul))
    return seen


def test_bfloat16_convolutions_and_float32_parameters(products):
    traced(lambda m, x: m(x, train=True), (2, 64, 64, 3), "resnet14", dtype="bfloat16")
    *convolutions, head = products
    assert len(convolutions) == 1 + 4 * 3 + 4
    assert {v.dtype for x, _, y in convolutions for v in (x, y)} == {jnp.dtype("bfloat16")}
    assert {v.dtype for v in head} == {jnp.dtype("float32")}
    state = nnx.state(abstract("resnet14", dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}


def test_every_kernel_goes_through_layers_once(products):
    """What the always-sparse path relies on: a kernel reaches `layers` whatever it is."""
    traced(lambda m, x: m(x, train=True), (1, 64, 64, 3), "resnet50")
    kernels = [v for path, v in flat_params(abstract("resnet50")).items() if "kernel" in path]
    shapes = lambda arrays: sorted(a.shape for a in arrays)  # noqa: E731
    assert shapes(k for _, k, _ in products) == shapes(kernels)
    assert len(kernels) == 54


def test_last_scale_of_a_bottleneck_starts_at_zero():
    block = blocks.Bottleneck(8, 4, 1, nnx.Rngs(0))
    assert not np.any(block.bn3.scale.get_value())
    assert np.all(block.bn1.scale.get_value() == 1)


# Plain NumPy, written from the papers.


def np_conv(x, kernel, stride):
    size = kernel.shape[0]
    pad = (size - 1) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = range(0, x.shape[1] - size + 1, stride)
    cols = range(0, x.shape[2] - size + 1, stride)
    windows = [[x[:, r : r + size, c : c + size] for c in cols] for r in rows]
    out = [[np.einsum("bijc,ijco->bo", w, kernel) for w in row] for row in windows]
    return np.transpose(np.array(out), (2, 0, 1, 3))


def np_norm(x, bn):
    get = lambda v: np.asarray(v.get_value(), np.float64)  # noqa: E731
    scaled = (x - get(bn.mean)) / np.sqrt(get(bn.var) + 1e-5)
    return scaled * get(bn.scale) + get(bn.bias)


def relu(x):
    return np.maximum(x, 0)


def scrambled(block):
    """The block with random parameters and statistics, and a function to its float64 kernels."""
    rng = np.random.default_rng(0)
    state = nnx.state(block)
    new = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.2, 1.0, v.shape), jnp.float32), state)
    nnx.update(block, new)
    return lambda conv: np.asarray(conv.kernel.get_value(), np.float64) - 0.6


def shifted(block):
    """Kernels around zero, so that ReLU has something to cut."""
    state = nnx.state(block, lambda path, v: path[-1] == "kernel")
    nnx.update(block, jax.tree.map(lambda k: k - 0.6, state))


@pytest.mark.parametrize(("kind", "stride"), [(k, s) for k in "bwp" for s in (1, 2)])
def test_blocks_against_numpy(kind, stride):
    make = {"b": blocks.Bottleneck, "w": blocks.Basic, "p": blocks.PreActivation}[kind]
    block = make(4, 6, stride, nnx.Rngs(0))
    kernel = scrambled(block)
    expected_kernels = {
        n: kernel(getattr(block, n))
        for n in ("conv1", "conv2", "conv3", "shortcut")
        if hasattr(block, n)
    }
    shifted(block)
    x = np.random.default_rng(1).normal(size=(2, 6, 6, 4)).astype(np.float32)
    k, n = expected_kernels, np_norm
    if kind == "b":
        y = relu(n(np_conv(x, k["conv1"], 1), block.bn1))
        y = relu(n(np_conv(y, k["conv2"], stride), block.bn2))
        y = n(np_conv(y, k["conv3"], 1), block.bn3)
        expected = relu(y + n(np_conv(x, k["shortcut"], stride), block.shortcut_bn))
    elif kind == "w":
        y = relu(n(np_conv(x, k["conv1"], stride), block.bn1))
        y = n(np_conv(y, k["conv2"], 1), block.bn2)
        shortcut = np.zeros_like(y)
        shortcut[..., 1:5] = x[:, ::stride, ::stride]
        expected = relu(y + shortcut)
    else:
        h = relu(n(x, block.bn1))
        y = np_conv(relu(n(np_conv(h, k["conv1"], stride), block.bn2)), k["conv2"], 1)
        expected = y + np_conv(h, k["shortcut"], stride)
    np.testing.assert_allclose(block(jnp.asarray(x), train=False), expected, rtol=2e-4, atol=2e-4)


def test_batch_norm_in_training():
    bn = blocks.BatchNorm(3, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(2.0, 3.0, (4, 5, 5, 3)).astype(np.float32)
    y = bn(jnp.asarray(x), train=True)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    np.testing.assert_allclose(bn.mean.get_value(), 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(bn.var.get_value(), 0.9 + 0.1 * var, rtol=1e-5)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_norm_in_training_is_that_of_flax(dtype, compiled, relu, request, monkeypatch):
    """Values, running statistics and the gradients, which ours writes out."""
    if compiled:
        request.getfixturevalue("native_cpu")
    else:
        monkeypatch.setattr(native_library, "unavailable", lambda: "not compiled")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(3, 2, (5, 4, 6, 19)), dtype)
    weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    leaves = {
        name: jnp.asarray(rng.uniform(0.5, 2, 19), jnp.float32)
        for name in ("scale", "bias", "mean", "var")
    }

    def run(make, call):
        def loss(x, scale, bias):
            bn = make()
            for name, value in {**leaves, "scale": scale, "bias": bias}.items():
                getattr(bn, name)[...] = value
            y = call(bn, x)
            of_batch = jnp.sum(bn.mean[...] + bn.var[...])  # Has no gradient.
            statistics = bn.mean[...], bn.var[...]
            return jnp.sum(y.astype(jnp.float32) * weights) + of_batch, (y, statistics)

        grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
        return grad(x, leaves["scale"], leaves["bias"])

    def flax_norm(bn, x):
        y = bn(x.astype(jnp.float32))
        return (jax.nn.relu(y) if relu else y).astype(dtype)

    found = run(lambda: blocks.BatchNorm(19, nnx.Rngs(0)), lambda bn, x: bn(x, True, relu=relu))
    expected = run(
        lambda: nnx.BatchNorm(19, momentum=0.9, use_running_average=False, rngs=nnx.Rngs(0)),
        flax_norm,
    )
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-4
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance
        )


def pooled(x, weights):
    """The maxima of all windows, and the gradient of their sum with `weights`, entry by entry."""
    rows, columns = (-(-size // 2) for size in x.shape[1:3])
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    maxima, gradient = np.zeros((len(x), rows, columns, x.shape[3])), np.zeros(padded.shape)
    for place in np.ndindex(maxima.shape):
        image, row, column, channel = place
        window = padded[image, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3, channel]
        i, j = np.unravel_index(np.argmax(window), window.shape)
        maxima[place] = window[i, j]
        gradient[image, 2 * row + i, 2 * column + j, channel] += weights[place]
    return maxima, gradient[:, 1:-1, 1:-1]


@pytest.mark.parametrize("size", [(6, 6), (7, 4), (1, 5), (2, 1)], ids=str)
@pytest.mark.parametrize("types", [AxisType.Explicit, AxisType.Auto])
def test_max_pool_and_its_gradient_against_numpy(size, types):
    """The entries are three whole numbers, so that most windows hold equal ones."""
    rng = np.random.default_rng(0)
    x = rng.integers(-9, -6, (8, *size, 2)).astype(np.float32)
    weights = rng.normal(size=(8, -(-size[0] // 2), -(-size[1] // 2), 2)).astype(np.float32)
    maxima, gradient = pooled(x, weights)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(types,))
    with jax.set_mesh(mesh):
        images, weights = jax.device_put((x, weights), NamedSharding(mesh, PartitionSpec("data")))
        y, back = jax.vjp(jax.jit(max_pool_3x3), images)
        np.testing.assert_array_equal(y, maxima)
        np.testing.assert_allclose(back(weights)[0], gradient, rtol=1e-6)


@pytest.mark.usefixtures("native_cpu")
@pytest.mark.parametrize("size", [(6, 6), (7, 4), (1, 5), (2, 1)], ids=str)
def test_compiled_max_pool_and_its_gradient_against_numpy(size):
    """With a NaN, which is the maximum of its windows and has their gradients."""
    rng = np.random.default_rng(0)
    x = rng.integers(-9, -6, (2, *size, 37)).astype(np.float32)
    x[1, -1, -1, ::5] = np.nan
    weights = rng.normal(size=(2, -(-size[0] // 2), -(-size[1] // 2), 37)).astype(np.float32)
    maxima, gradient = pooled(x, weights)
    y, back = jax.vjp(jax.jit(max_pool_3x3), jnp.asarray(x))
    np.testing.assert_array_equal(y, maxima)
    np.testing.assert_allclose(back(jnp.asarray(weights))[0], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("native_cpu")
@pytest.mark.parametrize(("platform", "windows"), [("cpu", 0), ("tpu", 1)])
def test_only_on_a_cpu_max_pool_is_compiled(platform, windows):
    shape = jax.ShapeDtypeStruct((2, 6, 6, 2), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(max_pool_3x3(x) ** 2)))
    text = gradient.trace(shape).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.select_and_scatter") == windows
    assert text.count("topkast_max_pool_gradient") == 1 - windows


def lenet(**options):
    return Perceptron(channels=1, num_classes=10, rngs=nnx.Rngs(0), **options)


def test_lenet_has_the_published_number_of_parameters():
    """266,610: LeCun et al. 1998, as work on pruning counts it."""
    assert count(nnx.eval_shape(lenet)) == 266_610
    narrow = flat_params(nnx.eval_shape(lambda: lenet(width=0.2)))
    assert [narrow[f"{name}/kernel"].shape for name in ("hidden1", "hidden2", "head")] == [
        (784, 60),
        (60, 20),
        (20, 10),
    ]


def test_lenet_against_numpy():
    model = lenet(width=0.1)
    images = np.random.default_rng(0).normal(size=(3, 28, 28, 1)).astype(np.float32)
    p = {name: np.float64(x) for name, x in flat_params(model).items()}
    x = images.reshape(3, -1)
    for layer in ("hidden1", "hidden2"):
        x = np.maximum(x @ p[f"{layer}/kernel"] + p[f"{layer}/bias"], 0)
    expected = x @ p["head/kernel"] + p["head/bias"]
    np.testing.assert_allclose(model(images, train=True), expected, rtol=1e-4, atol=1e-6)
    spread = np.std(p["hidden1/kernel"])
    np.testing.assert_allclose(spread, math.sqrt(2 / 784), rtol=0.05)  # He et al. 2015
