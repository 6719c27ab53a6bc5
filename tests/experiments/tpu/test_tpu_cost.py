"""What the TPU compiler's programs are said to cost, against functions of known cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from experiments import chips
from experiments.errors import UserError
from experiments.tpu import compiling, hlo, library
from experiments.tpu.cost import cost, dearest
from topkast_jax import Block
from topkast_jax.always_sparse import CompactKernel, matmul

pytestmark = pytest.mark.skipif(library.find() is None, reason="no libtpu: scripts/setup aot")
FLOAT = 4


def compiled(function, *shapes, devices=1, specs=None, dtype=jnp.float32):
    found = compiling.target("v5e:2x2", devices).devices
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=found)
    arguments = [
        jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, spec))
        for s, spec in zip(shapes, specs or [P()] * len(shapes), strict=True)
    ]
    if devices > 1:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=tuple(specs), out_specs=P("x"), check_vma=False
        )
    return compiling.compile(jax.jit(function).lower(*arguments))


def cost_of(found, devices=1, **options):
    return cost(hlo.parse(found.as_text()), devices, **options)


def stack(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]


@pytest.mark.parametrize("layers", [3, 40])
def test_scanned_products_count_once_a_turn(layers):
    width, tokens = 256, 512
    found = compiled(stack, (tokens, width), (layers, width, width))
    step = cost_of(found)
    assert step.flops == layers * 2 * tokens * width * width
    assert step.unknown_loops == step.alternatives == 0
    kernels = layers * width * width * FLOAT
    assert kernels <= step.moved <= kernels + 4 * tokens * width * FLOAT * (layers + 1)


def test_the_gradient_of_a_scanned_stack():
    width, tokens, layers = 256, 512, 5

    def loss(kernels, x):
        return jnp.sum(stack(x, kernels) ** 2)

    found = compiled(jax.grad(loss), (layers, width, width), (tokens, width))
    product = 2 * tokens * width * width
    assert 3 * layers * product - product <= cost_of(found).flops <= 3 * layers * product


def test_batched_products():
    """On a TPU they are convolutions over a window with holes."""
    step = cost_of(
        compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (6, 128, 256), (6, 256, 384))
    )
    assert step.flops == 2 * 6 * 128 * 256 * 384


@pytest.mark.parametrize(("padding", "taps"), [("VALID", 14 * 14 * 9), ("SAME", (3 * 16 - 2) ** 2)])
def test_convolutions(padding, taps):
    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)

    step = cost_of(compiled(convolve, (8, 16, 16, 128), (3, 3, 128, 128)))
    assert step.flops == 2 * 8 * 128 * 128 * taps


def test_of_two_alternatives_one_counts():
    def either(x, kernel, which):
        return jax.lax.cond(which[0] > 0, lambda: x @ kernel, lambda: x)

    found = compiled(either, (1024, 1024), (1024, 1024), (1,))
    assert cost_of(found).flops == 0
    assert cost_of(found, choose=dearest).flops == 2 * 1024**3
    assert cost_of(found).alternatives == 1


ROWS, WIDTH = 1024, 1024
SIZE = ROWS * WIDTH
COLLECTIVES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "x"), SIZE, 1.5),
    "all-gather": (lambda x: jax.lax.all_gather(x, "x", tiled=True), 4 * SIZE, 0.75),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), SIZE, 0.75),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), SIZE, 0.75),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)]),
        SIZE,
        1.0,
    ),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_collectives(kind):
    function, entries, share = COLLECTIVES[kind]
    found = compiled(function, (4 * ROWS, WIDTH), devices=4, specs=[P("x")])
    step = cost_of(found, 4)
    assert step.collectives == {(kind, entries * FLOAT): 1}
    assert step.sent == share * entries * FLOAT


def test_a_large_reduce_scatter_is_a_fusion():
    """An all-reduce of which a part stays, padded a little."""
    found = compiled(COLLECTIVES["reduce-scatter"][0], (32768, WIDTH), devices=4, specs=[P("x")])
    step = cost_of(found, 4)
    sizes = dict(step.collectives.keys())
    assert "all-reduce" not in sizes
    assert sizes["reduce-scatter"] == pytest.approx(8192 * WIDTH * FLOAT, rel=0.02)
    assert step.sent == pytest.approx(0.75 * 8192 * WIDTH * FLOAT, rel=0.05)


def test_collectives_in_a_loop():
    def turn(x, _):
        return jnp.tanh(jax.lax.psum(x, "x")), None

    found = compiled(
        lambda x: jax.lax.scan(turn, x, length=7)[0], (4 * ROWS, WIDTH), devices=4, specs=[P("x")]
    )
    assert cost_of(found, 4).collectives == {("all-reduce", SIZE * FLOAT): 7}


@pytest.mark.parametrize("flops", [12345, None])
def test_kernels_say_what_they_cost(flops):
    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    estimate = flops and pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=678)

    def call(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=shape, cost_estimate=estimate)(x)

    step = cost_of(compiled(call, (32, 128), devices=4, specs=[P("x")]))
    assert (step.flops, step.unknown_kernels) == ((12345, 0) if flops else (0, 1))
    assert step.moved == (678 if flops else 2 * 8 * 128 * FLOAT)


@pytest.mark.parametrize(
    ("metadata", "said", "moved"),
    [
        ("{}", 5000, 1000),
        ("{}", 4500, 500),
        ("{}", 100, 0),
        ("{}", 9000, 1000),
        ('{\n"least_bytes":"7000 2000",\n"most_bytes":"7000 2000"\n}', 9000, 2000),
        ('{\n"least_bytes":"2000 2000",\n"most_bytes":"8000 8000"\n}', 9000, 2000),
        ('{\n"least_bytes":"2000 2000",\n"most_bytes":"3000 8000"\n}', 9000, 6000),
    ],
)
def test_arrays_on_the_chip_are_free_for_kernels(metadata, said, moved):
    """x, 4,000 bytes, is; y, 1,000 bytes, counts once at most if the kernel says nothing of it."""
    text = f"""
ENTRY %main (x: f32[1000]) -> f32[250] {{
  %x = f32[1000]{{0:S(1)}} parameter(0)
  ROOT %y = f32[250]{{0}} custom-call(%x), custom_call_target="tpu_custom_call", \
frontend_attributes={{kernel_metadata={metadata}}}, \
backend_config={{"cost_estimate":{{"flops":"7","bytes_accessed":"{said}"}}}}
}}
"""
    step = cost(hlo.parse(text), 1)
    assert (step.flops, step.moved) == (7, moved)


def test_a_block_product_reads_the_blocks_of_the_forward_set():
    """Not those of the backward set, which are twice as many; v4's chips have no room for them."""
    tokens, k, n, a, b = 4096, 2048, 4096, 51, 102
    one = SingleDeviceSharding(compiling.target("v4:2x2x1", 1).devices[0])

    def product(x, values, index):
        return matmul(x, CompactKernel(values, index, (k, n), Block(128, 128), a))

    x, values = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one)
        for shape in ((tokens, k), (b, 128, 128))
    )
    index = jax.ShapeDtypeStruct((b,), jnp.int32, sharding=one)
    step = cost_of(compiling.compile(jax.jit(product).lower(x, values, index)))
    tiles = 4  # of 1,024 tokens, 4 MiB
    by_hand = 2 * (tokens * (k + n) + tiles * a * 128 * 128)
    assert step.flops == 2 * tokens * a * 128 * 128
    assert by_hand <= step.moved <= 1.001 * by_hand


def test_memory_is_that_of_the_arguments():
    found = compiled(lambda x, kernels: stack(x, kernels), (512, 256), (5, 256, 256))
    device = compiling.memory(found)["device_bytes"]
    assert device["arguments"] == (512 * 256 + 5 * 256 * 256) * FLOAT
    assert device["output"] == 512 * 256 * FLOAT
    assert device["total"] == device["arguments"] + device["output"] + device["temporaries"]
    assert compiling.memory(found)["host_bytes"]["total"] == 0


@pytest.mark.parametrize(
    "function", [lambda x: x @ x, lambda x: jnp.sum(x)], ids=["temporaries", "arguments"]
)
def test_what_does_not_fit_says_what_it_needs(function):
    with pytest.raises(compiling.TooLarge) as error:
        compiled(function, (70_000, 70_000))
    assert 15 * 2**30 < error.value.available < 16 * 2**30 < error.value.needed


def test_a_kernel_that_takes_too_much_is_not_too_large_a_program():
    """Its own memory, VMEM, does not suffice: nothing is wrong with the device's."""

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...]

    def call(x):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    with pytest.raises(jax.errors.JaxRuntimeError, match="memory space vmem"):
        compiled(call, (4096, 1024))


def test_peaks_are_those_of_a_device():
    assert compiling.target("v5e:2x2").peaks == chips.CHIPS["v5e"]
    assert compiling.target("v4:2x2x1", 1).peaks.flops == 275e12
    assert len(compiling.target("v4:2x2x1").devices) == 4  # Two cores a chip, one device.


@pytest.mark.parametrize(
    ("topology", "count", "part"),
    [("v5e:3x5", None, "v5e:2x2"), ("v5e", None, "v5e:2x2"), ("gpu:2x2", None, "v6e"),
     ("v5e:2x2", 5, "has 4")],
)  # fmt: skip
def test_topologies_that_are_none(topology, count, part):
    with pytest.raises(UserError) as error:
        compiling.target(topology, count)
    assert part in str(error.value)


def test_seconds():
    seconds = chips.CHIPS["v5e"].seconds(197e12, 819e9 / 2, 200e9 * 3)
    assert {k: round(v, 6) for k, v in seconds.items()} == {"compute": 1, "memory": 0.5, "links": 3}
    assert np.isfinite(list(seconds.values())).all()
