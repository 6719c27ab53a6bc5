"""The products of the models with compact kernels, against their dense arrays."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolution_oracle import convolved
from oracle import buffer_sizes

import experiments.convolutions
import topkast_jax as tk
from experiments import layers
from topkast_jax.always_sparse import from_masks, to_dense
from topkast_jax.always_sparse.products import native_library

SAME = ((1, 1), (1, 1))
NONE = ((0, 0), (0, 0))


def kernels(shape, pattern, seed=0):
    """A kernel in compact form, and dense over A; the mask of B."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=shape).astype(np.float32)
    units = rng.uniform(size=pattern.grid(shape))
    forward, backward = (
        np.asarray(pattern.expand(jnp.asarray(units < d), shape)) for d in (0.3, 0.6)
    )
    return from_masks(dense, forward, backward, pattern), np.where(forward, dense, 0), backward


CASES = {
    "3x3": ((3, 3, 4, 8), tk.Unstructured(), lambda x, w: layers.conv(x, w, (2, 2), SAME)),
    "3x3-block": ((3, 3, 4, 8), tk.Block(2, 4), lambda x, w: layers.conv(x, w, (1, 1), SAME)),
    "1x1-block": ((1, 1, 4, 8), tk.Block(2, 4), lambda x, w: layers.conv(x, w, (2, 2), NONE)),
    "1x1-block-padded": (
        (1, 1, 4, 8),
        tk.Block(2, 4),
        lambda x, w: layers.conv(x, w, (2, 1), SAME),
    ),
    "matmul": ((4, 8), tk.Unstructured(), layers.matmul),
    "matmul-block": ((4, 8), tk.Block(2, 2), layers.matmul),
    "logits": ((6, 4), tk.Unstructured(), layers.matmul_transposed),
    "rows": ((6, 4), tk.Unstructured(), lambda x, w: layers.rows(w, 1, 5) + jnp.mean(x)),
    "vector": ((8,), tk.Unstructured(), lambda x, w: layers.vector(w) + jnp.mean(x)),
    "lookup": ((6, 4), tk.Unstructured(), lambda x, w: layers.lookup(w, jnp.arange(5), x.dtype)),
}


@pytest.mark.parametrize(("shape", "pattern", "product"), CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_those_of_the_dense_kernel(shape, pattern, product):
    kernel, dense, backward = kernels(shape, pattern)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 5, 4)), jnp.float32)
    loss = lambda x, w: jnp.sum(jnp.sin(product(x, w)))  # noqa: E731
    product_of, gradient = jax.jit(product), jax.jit(jax.grad(loss, (0, 1), allow_int=True))
    np.testing.assert_allclose(product_of(x, kernel), product_of(x, dense), atol=1e-5)
    dx, dkernel = gradient(x, kernel)
    expected_dx, dw = gradient(x, dense)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-5)
    found = to_dense(kernel.with_values(dkernel.values))
    np.testing.assert_allclose(found, np.where(backward, dw, 0), atol=1e-4)
    half = jax.eval_shape(product, x.astype(jnp.bfloat16), kernel)
    assert half.dtype in (jnp.bfloat16, jnp.float32)


def test_blocks_of_a_1x1_convolution_are_a_block_product():
    """No buffer of the kernel's dense size, in either pass."""
    kernel, dense, _ = kernels((1, 1, 32, 64), tk.Block(8, 8))
    step = jax.jit(
        jax.grad(lambda v, x: jnp.sum(layers.conv(x, kernel.with_values(v), (1, 1), NONE) ** 2))
    )
    sizes = buffer_sizes(step.lower(kernel.values, jnp.ones((1, 3, 3, 32))).compile())
    assert max(sizes) < dense.size


@pytest.fixture(params=["compiled", "xla"])
def form(request, monkeypatch):
    """Whether our convolutions are compiled, by which both kinds are tested on every machine."""
    if request.param == "compiled":
        request.getfixturevalue("native_cpu")
    else:
        monkeypatch.setattr(native_library, "unavailable", lambda: "not compiled")
    return request.param


SIZES, STRIDES = [(1, 1), (3, 3), (1, 3)], [(1, 1), (2, 1), (3, 2)]
PADDINGS = [NONE, SAME, ((0, 2), (1, 0))]


def pairwise():
    """All sizes, strides and paddings; those of which each pair stands elsewhere are marked."""
    for (i, size), (j, strides), (k, padding) in itertools.product(
        enumerate(SIZES), enumerate(STRIDES), enumerate(PADDINGS)
    ):
        rarely = (i + j + k) % 3 != 0
        yield pytest.param(size, strides, padding, marks=[pytest.mark.slow] if rarely else [])


@pytest.mark.parametrize(("size", "strides", "padding"), list(pairwise()))
@pytest.mark.usefixtures("form")
def test_a_convolution_and_its_gradients_are_those_of_the_definition(size, strides, padding):
    """The definition is linear in both arguments, so that differences give its exact gradients."""
    rng = np.random.default_rng(0)
    outputs = 2 if padding == NONE else 10  # Fewer or more than the entries of a kernel's row.
    x, kernel = rng.normal(size=(2, 5, 6, 3)), rng.normal(size=(*size, 3, outputs))
    y = convolved(x, kernel, strides, padding)
    weights = rng.normal(size=y.shape)
    of_x, of_kernel = (
        np.reshape([np.sum(weights * of(e)) for e in np.eye(a.size).reshape(-1, *a.shape)], a.shape)
        for a, of in (
            (x, lambda e: convolved(e, kernel, strides, padding)),
            (kernel, lambda e: convolved(x, e, strides, padding)),
        )
    )

    def product(x, kernel):
        return layers.conv(x, kernel, strides, padding)

    args = [jnp.asarray(a, jnp.float32) for a in (x, kernel)]
    found, gradients = jax.vjp(product, *args)
    np.testing.assert_allclose(found, y, atol=1e-4)
    gradients = gradients(jnp.asarray(weights, jnp.float32))
    for found, expected in zip(gradients, (of_x, of_kernel), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def lowered(size, platform, dtype=jnp.float32, mesh=None):
    def gradient(kernel, x):
        return jax.grad(lambda kernel: jnp.sum(layers.conv(x, kernel, (1, 1), NONE) ** 2))(kernel)

    shapes = (jax.ShapeDtypeStruct(s, dtype) for s in ((size, size, 4, 8), (2, 5, 5, 4)))
    with jax.sharding.use_abstract_mesh(mesh or jax.sharding.AbstractMesh((), ())):
        return jax.jit(gradient).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


OURS = ["topkast_convolution", "topkast_convolution_kernel_gradient"]


@pytest.mark.parametrize(
    ("platform", "size", "vectors", "by_xla", "compiled"),
    [
        ("cpu", 1, "AVX-512", (0, 2, []), (0, 0, OURS)),
        ("cpu", 1, "AVX2", (0, 2, []), (0, 1, OURS[1:])),
        ("cpu", 3, "AVX2", (1, 3, []), (0, 0, OURS)),
        ("tpu", 1, "AVX-512", (2, 0, []), (2, 0, [])),
        ("tpu", 3, "AVX-512", (2, 0, []), (2, 0, [])),
    ],
)
def test_only_a_cpu_has_products_or_our_functions_in_place_of_convolutions(
    form, platform, size, vectors, by_xla, compiled, monkeypatch
):
    """The numbers of XLA's convolutions and products, and the names of ours."""
    monkeypatch.setattr(experiments.convolutions, "instruction_set", lambda: vectors)
    text = lowered(size, platform)
    found = (
        text.count("stablehlo.convolution"),
        text.count("stablehlo.dot_general"),
        re.findall(r"@(topkast_\w+)", text),
    )
    assert found == (compiled if form == "compiled" else by_xla)


@pytest.mark.usefixtures("native_cpu")
def test_our_convolutions_are_in_float32_and_on_one_device():
    of_size = {n: jax.sharding.AbstractMesh((n,), ("data",)) for n in (1, 2)}
    assert "topkast_convolution" in lowered(3, "cpu", mesh=of_size[1])
    assert "topkast" not in lowered(3, "cpu", mesh=of_size[2])
    assert "topkast" not in lowered(3, "cpu", jnp.bfloat16)


@pytest.mark.parametrize("types", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
@pytest.mark.parametrize("size", [1, 3])
def test_gradients_of_a_convolution_on_a_mesh(types, size):
    rng = np.random.default_rng(0)
    shapes = (2, 5, 5, 3), (size, size, 3, 4)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def gradients(x, kernel):
        loss = lambda x, kernel: jnp.sum(layers.conv(x, kernel, (2, 2), NONE) ** 2)  # noqa: E731
        return jax.grad(loss, (0, 1))(x, kernel)

    expected = jax.jit(gradients)(x, kernel)
    mesh = jax.make_mesh((2,), ("data",), (types,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        kernel = jax.device_put(kernel, jax.NamedSharding(mesh, jax.P()))
        found = jax.jit(gradients)(x, kernel)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
