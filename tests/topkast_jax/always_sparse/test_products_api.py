"""`matmul` of a dense or compact kernel, by XLA and by what the platform has, against NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import buffer_sizes
from products_oracle import assert_close, for_a_gpu, products, random_case

from topkast_jax import Block, SparsityError, Unstructured
from topkast_jax.always_sparse import (
    CompactKernel,
    dense_tile,
    matmul,
    options,
    to_dense,
    values_of,
    with_values,
)

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float64: 1e-14}


@pytest.fixture(params=["xla", None], ids=["xla", "platform"])
def backend(request):
    """What traces products without another word: XLA, or the first that the platform has."""
    with options(request.param):
        yield request.param


def run_products(case, x, dy, **kwargs):
    """y, dx and the dense dW found by `matmul`."""

    @jax.jit
    def run(x, values, index, dy):
        kernel = CompactKernel(
            values, index, case.kernel.shape, case.kernel.pattern, case.kernel.forward
        )
        y, vjp = jax.vjp(lambda x, v: matmul(x, kernel.with_values(v), **kwargs), x, values)
        return y, *vjp(dy)

    y, dx, dvalues = run(x, case.kernel.values, case.kernel.index, dy)
    assert (dvalues.shape, dvalues.dtype) == (case.kernel.values.shape, case.kernel.values.dtype)
    return y, dx, to_dense(case.kernel.with_values(dvalues))


def check(case, tokens=(3, 5), dtype=jnp.float32, seed=1, **kwargs):
    rng = np.random.default_rng(seed)
    k, n = case.dense.shape
    x, dy = (jnp.asarray(rng.standard_normal((*tokens, f)), dtype) for f in (k, n))
    found = run_products(case, x, dy, **kwargs)
    for array, like in zip(found[:2], (x, x), strict=True):
        assert array.dtype == like.dtype
    for one, expected in zip(found, products(case, x, dy), strict=True):
        assert_close(one, expected, TOLERANCE[dtype])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("pattern", [Block(16, 16), Block(8, 32), Unstructured()], ids=str)
def test_products_match_numpy(pattern, dtype):
    n = math.prod(pattern.grid((64, 96)))
    check(random_case((64, 96), pattern, n // 5, n // 2, dtype=dtype), dtype=dtype)


@settings(max_examples=6, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 8]),
    cols=st.sampled_from([1, 4, 8]),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    data=st.data(),
)
def test_any_block_pattern(rows, cols, grid, data):
    n = grid[0] * grid[1]
    b = data.draw(st.integers(1, n), "b")
    a = data.draw(st.integers(1, b), "a")
    tokens = data.draw(st.lists(st.integers(1, 4), max_size=2).map(tuple), "tokens")
    shape = (grid[0] * rows, grid[1] * cols)
    backend = data.draw(st.sampled_from(["xla", None]), "backend")
    check(random_case(shape, Block(rows, cols), a, b, seed=n), tokens=tokens, backend=backend)


@pytest.mark.usefixtures("backend")
def test_gradient_is_that_of_the_dense_masked_layer_with_a_straight_through_view():
    """The same through `jax.grad` of a masked dense layer, B\\A units included."""
    case = random_case((32, 24), Block(8, 8), 3, 7)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 32)), jnp.float32)

    def dense_loss(w):
        return jnp.sum(jnp.tanh(x @ w))

    def compact_loss(values):
        return jnp.sum(jnp.tanh(matmul(x, case.kernel.with_values(values))))

    view = jnp.where(case.forward, case.dense, 0)
    expected = jnp.where(case.backward, jax.grad(dense_loss)(view), 0)
    found = jax.grad(compact_loss)(case.kernel.values)
    assert_close(to_dense(case.kernel.with_values(found)), expected, 1e-5)
    straight_through = case.backward & ~case.forward
    assert np.abs(np.asarray(expected)[straight_through]).min() > 0


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("pattern", [Block(8, 8), Unstructured()], ids=str)
def test_stacked_layers_under_scan(pattern):
    n = math.prod(pattern.grid((16, 16)))
    cases = [random_case((16, 16), pattern, n // 3, n // 2, seed=s) for s in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(c.kernel for c in cases))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)), jnp.float32)

    def loss(values, x):
        y, _ = jax.lax.scan(lambda x, k: (matmul(x, k), None), x, stack.with_values(values))
        return jnp.sum(y**2)

    def dense_loss(weights, x):
        for w in weights:
            x = x @ w
        return jnp.sum(x**2)

    dvalues, dx = jax.jit(jax.grad(loss, (0, 1)))(stack.values, x)
    views = [jnp.where(c.forward, c.dense, 0) for c in cases]
    dweights, expected_dx = jax.grad(dense_loss, (0, 1))(views, x)
    expected = np.stack([np.where(c.backward, g, 0) for c, g in zip(cases, dweights, strict=True)])
    assert_close(dx, expected_dx, 1e-5)
    assert_close(to_dense(stack.with_values(dvalues)), expected, 1e-5)


def test_dense_kernel_is_a_plain_product_and_mixed_dtypes_promote():
    x, w = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 3), jnp.float32)
    assert matmul(x, w).dtype == jnp.float32
    case = random_case((16, 16), Block(8, 8), 1, 2)
    assert matmul(jnp.ones((2, 16), jnp.bfloat16), case.kernel).dtype == jnp.float32
    cast = case.kernel.astype(jnp.bfloat16)
    assert matmul(jnp.ones((2, 16), jnp.bfloat16), cast).dtype == jnp.bfloat16
    assert cast.forward == case.kernel.forward


def avals(jaxpr):
    """Every type in a jaxpr and the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in (*eqn.invars, *eqn.outvars))
        for sub in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(sub, "jaxpr"):
                sub = sub.jaxpr
            if hasattr(sub, "eqns"):
                yield from avals(sub)


def training_step(params, x):
    def loss(values):
        first, second = with_values(params, values)
        return jnp.sum(matmul(jax.nn.relu(matmul(x, first)), second) ** 2)

    values = values_of(params)
    return jax.tree.map(lambda v, g: v - 0.1 * g, values, jax.grad(loss)(values))


@pytest.mark.parametrize("pattern", [Block(32, 32), Unstructured()], ids=str)
def test_no_dense_buffer(pattern, backend):
    """Blocks: of no leaf's size anywhere. Single entries: not in arguments, results, residuals.

    The CPU's own products make no tile of them either.
    """
    shape = (256, 512)
    n = math.prod(pattern.grid(shape))
    cases = [random_case(s, pattern, n // 10, n // 5) for s in (shape, shape[::-1])]
    params, x = [c.kernel for c in cases], jnp.ones((16, 256))
    dense = math.prod(shape)
    sizes = {math.prod(a.shape) for a in avals(jax.make_jaxpr(training_step)(params, x).jaxpr)}
    compiled = jax.jit(training_step).lower(params, x).compile()
    buffers = buffer_sizes(compiled)
    if isinstance(pattern, Block):
        assert max(sizes) < dense
        assert max(buffers) < dense
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * dense
    elif backend == "xla":
        assert max(buffers) == dense  # the walk does see a tile where there is one
    _, vjp = jax.vjp(lambda v: matmul(x, params[0].with_values(v)), params[0].values)
    assert max(leaf.size for leaf in jax.tree.leaves(vjp)) < dense


@pytest.mark.parametrize("check_inside", [False, True])
def test_over_a_mesh_sums_the_gradient_once(check_inside):
    """`options(mesh=…)`, or a shard_map of the caller's own, gives what one device gives."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    case = random_case((64, 96), Block(16, 16), 5, 12)
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((16, 3, f)), jnp.float32) for f in (64, 96))

    def loss(values, x, dy):
        return jnp.sum(matmul(x, case.kernel.with_values(values)) * dy)

    def over_mesh(values, x, dy):
        if not check_inside:
            with options(mesh=mesh, axes=("data",)):
                return loss(values, x, dy)

        def local(values, x, dy):
            return jax.lax.psum(loss(values, x, dy), "data")

        specs = (P(), P("data"), P("data"))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(values, x, dy)

    split = NamedSharding(mesh, P("data"))
    arrays = (case.kernel.values, jax.device_put(x, split), jax.device_put(dy, split))
    step = jax.jit(jax.value_and_grad(over_mesh, (0, 1)))
    (y, grads), (expected_y, expected) = (
        step(*arrays),
        jax.value_and_grad(loss, (0, 1))(case.kernel.values, x, dy),
    )
    np.testing.assert_allclose(y, expected_y, rtol=1e-5)
    for one, other in zip(grads, expected, strict=True):
        assert_close(one, other, 1e-5)
    if not check_inside:
        # Of dW; without the option there is one for each product.
        assert step.lower(*arrays).compile().as_text().count("all-reduce(") == 1


def test_one_vector_over_a_mesh_is_not_split():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    case = random_case((64, 96), Block(16, 16), 5, 12)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(64), jnp.float32)
    with options(mesh=mesh, axes=("data",)):
        y = jax.jit(matmul)(x, case.kernel)
    assert_close(y, x @ np.where(case.forward, case.dense, 0), 1e-5)


def test_mistakes_are_told_in_one_line():
    kernel = random_case((32, 32), Block(8, 8), 2, 4).kernel
    x = jnp.ones((2, 32))
    mistakes = {
        "does not divide": lambda: matmul(x, CompactKernel(*_args(kernel, pattern=Block(5, 8)))),
        "does not fit a kernel": lambda: matmul(jnp.ones((2, 31)), kernel),
        "must be one of xla, pallas_tpu": lambda: matmul(x, kernel, backend="mosaic"),
        "multiples of 128x128": lambda: matmul(x, kernel, backend="pallas_tpu"),
        "powers of 2 from 16": lambda: matmul(x, kernel, backend="pallas_gpu"),
        "needs a kernel": lambda: matmul(x, CompactKernel(*_args(kernel, shape=(3, 32, 32)))),
        "must be one of xla": lambda: matmul(x, jnp.ones((32, 3)), backend="mosaic"),
        r"\('pallas_tpu', 'mosaic'\): must be": lambda: matmul(
            x, kernel, backend=["pallas_tpu", "mosaic"]
        ),
        r"backend \(\): must be": lambda: matmul(x, kernel, backend=()),
        "with such a kernel runs on nothing and this is cpu": lambda: matmul(
            x, kernel, backend=("pallas_tpu", "pallas_gpu")
        ),
        "a stack of .2,. kernels": lambda: matmul(
            x, jax.tree.map(lambda a: jnp.stack([a, a]), kernel)
        ),
        "a stack of .3,. kernels": lambda: dense_tile(
            jax.tree.map(
                lambda a: jnp.stack([a] * 3), random_case((4, 4), Unstructured(), 2, 4).kernel
            )
        ),
        "interpret=True with backend None": lambda: options(interpret=True).__enter__(),
        "axes .'data',. with no mesh": lambda: options(axes=("data",)).__enter__(),
    }
    for text, mistake in mistakes.items():
        with pytest.raises(SparsityError, match=text) as error:
            mistake()
        assert "\n" not in str(error.value)


def _args(kernel, shape=None, pattern=None):
    return (
        kernel.values,
        kernel.index,
        shape or kernel.shape,
        pattern or kernel.pattern,
        kernel.forward,
    )


@pytest.mark.parametrize(("backend", "platform"), [("pallas_tpu", "tpu"), ("pallas_gpu", "cuda")])
def test_a_kernel_on_the_wrong_platform(backend, platform):
    kernel = random_case((256, 256), Block(128, 128), 1, 2).kernel
    with pytest.raises(SparsityError, match=f"{backend}.* runs on {platform} and this is cpu"):
        matmul(jnp.ones((2, 256)), kernel, backend=backend)
    with options(backend), pytest.raises(SparsityError, match="use backend 'xla'"):
        jax.jit(matmul)(jnp.ones((2, 256)), kernel)


KERNEL_OF = {"tpu": "tpu_custom_call", "cuda": "triton"}


@pytest.mark.parametrize(
    ("backend", "block", "platforms"),
    [
        (None, 128, ("tpu", "cuda")),
        (("pallas_tpu", "pallas_gpu", "xla"), 128, ("tpu", "cuda")),
        (("pallas_gpu", "xla"), 128, ("cuda",)),
        (("xla", "pallas_tpu"), 128, ()),
        (("pallas_tpu", "pallas_gpu", "xla"), 64, ("cuda",)),  # TPU kernels refuse blocks of 64.
        (["xla"], 128, ()),
    ],
    ids=str,
)
def test_the_first_of_several_backends_that_fits_is_used(backend, block, platforms):
    kernel = random_case((256, 256), Block(block, block), 1, 2).kernel
    x = jnp.ones((128, 256))
    with for_a_gpu():
        traced = jax.jit(functools.partial(matmul, backend=backend)).trace(x, kernel)
    for platform, name in KERNEL_OF.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert (name in text) == (platform in platforms), platform
    assert_close(matmul(x, kernel, backend=backend), matmul(x, kernel, backend="xla"), 1e-6)


def test_a_named_backend_under_vmap():
    kernel = random_case((128, 256), Block(128, 128), 1, 2).kernel
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), kernel)
    product = functools.partial(matmul, jnp.ones((3, 128)), backend="pallas_gpu")
    with for_a_gpu():
        traced = jax.jit(jax.vmap(product)).trace(stack)
    assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
    with pytest.raises(SparsityError, match="runs on cuda and this is cpu"):
        traced.lower(lowering_platforms=("cpu",))


def test_several_backends_of_which_none_fits_are_refused_where_the_step_is_lowered():
    kernel = random_case((256, 256), Block(64, 64), 1, 2).kernel
    product = functools.partial(matmul, backend=("pallas_tpu", "pallas_gpu"))
    with for_a_gpu():
        traced = jax.jit(product).trace(jnp.ones((128, 256)), kernel)
    assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
    with pytest.raises(SparsityError, match="runs on cuda and this is tpu"):
        traced.lower(lowering_platforms=("tpu",))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("side", "tokens"), [(4, (0,)), (4, (2, 0)), (4, (0, 3)), (128, (0,))])
def test_no_tokens(side, tokens):
    check(random_case((2 * side, 3 * side), Block(side, side), 3, 5), tokens=tokens)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("b", [0, 5])
def test_an_empty_forward_set(b):
    check(random_case((8, 12), Block(4, 4), 0, b))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("side", [4, 16, 128])
def test_sixty_four_bits_are_summed_in_sixty_four(side, dtype):
    """From blocks of 16 on, a step for a CPU traces the kernels of other platforms too."""
    with jax.enable_x64(True):
        check(random_case((2 * side, 3 * side), Block(side, side), 3, 5, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_gpu"])
def test_kernels_that_sum_in_thirty_two_bits_refuse_sixty_four(backend):
    with jax.enable_x64(True):
        kernel = random_case((128, 128), Block(128, 128), 1, 1, dtype=np.float64).kernel
        with pytest.raises(SparsityError, match=f"{backend}': .* in float32 .*, found float64"):
            matmul(np.ones((2, 128)), kernel, backend=backend)


@pytest.mark.parametrize("split", [P("data"), P("data", "model"), P(("data", "model"))])
def test_an_explicitly_sharded_x(split):
    """The mesh is that of x's type: nothing is to be said of it."""
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    kernel = random_case((8, 12), Block(4, 4), 3, 5).kernel
    x = np.random.default_rng(1).normal(size=(4, 2, 8)).astype(np.float32)
    there = jax.device_put(x, NamedSharding(mesh, split))

    def loss(values, x):
        return jnp.sum(matmul(x, kernel.with_values(values)) ** 2)

    y = jax.jit(matmul)(there, kernel)
    assert jax.typeof(y).sharding.spec == P(*split, *(None,) * (3 - len(split)))
    assert_close(y, matmul(x, kernel), 1e-6)
    found = jax.jit(jax.grad(loss, (0, 1)))(kernel.values, there)
    for one, expected in zip(found, jax.grad(loss, (0, 1))(kernel.values, x), strict=True):
        assert_close(one, expected, 1e-6)
    whole = jax.device_put(x, NamedSharding(mesh, P(None, None, "data")))
    with pytest.raises(SparsityError, match="its last axis must be whole"):
        jax.jit(matmul)(whole, kernel)


def test_numbers_that_are_not_real():
    kernel = random_case((8, 12), Block(4, 4), 3, 5).kernel
    with pytest.raises(SparsityError, match="complex64 and float32 blocks: must be floating"):
        matmul(jnp.ones((2, 8), jnp.complex64), kernel)
    with pytest.raises(SparsityError, match=r"x of shape \(\) does not fit"):
        matmul(1.0, kernel)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("a", [7, 8, 16, 19])
def test_numbers_of_blocks_around_those_of_one_batch(a):
    check(random_case((48, 48), Block(8, 8), a, 30))
