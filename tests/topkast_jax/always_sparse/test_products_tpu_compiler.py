"""The TPU kernels through the real TPU compiler, for named topologies, without a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.tpu import library
from topkast_jax import Block
from topkast_jax.always_sparse import CompactKernel, matmul, options

pytestmark = pytest.mark.skipif(library.find() is None, reason="no libtpu: scripts/setup aot")


def mesh_of(topology, devices=None):
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(found[:devices]), ("data",))


def compiled_gradient(mesh, block, shape, tokens, dtype=jnp.bfloat16, layers=None, backend=None):
    """The gradient of one product, or of a scanned stack of them, over the mesh."""
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    n = (shape[0] // block.rows) * (shape[1] // block.cols)
    a, b = max(1, n // 10), max(2, n // 5)
    stack = () if layers is None else (layers,)
    values = jax.ShapeDtypeStruct((*stack, b, block.rows, block.cols), dtype, sharding=whole)
    index = jax.ShapeDtypeStruct((*stack, b), jnp.int32, sharding=whole)
    x = jax.ShapeDtypeStruct((tokens, shape[0]), dtype, sharding=split)

    def loss(values, index, x):
        kernel = CompactKernel(values, index, shape, block, a)
        with options(backend, mesh=mesh, axes=("data",)):
            if layers is None:
                return jnp.sum(matmul(x, kernel).astype(jnp.float32) ** 2)
            y, _ = jax.lax.scan(lambda x, k: (matmul(x, k), None), x, kernel)
            return jnp.sum(y.astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss, (0, 2))).lower(values, index, x).compile()


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for(topology):
    mesh = mesh_of(topology)
    text = compiled_gradient(mesh, Block(128, 128), (1024, 2048), 250 * mesh.size).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3


def test_compiles_under_sixty_four_bits():
    with jax.enable_x64(True):
        text = compiled_gradient(
            mesh_of("v5e:2x2", 1), Block(128, 128), (256, 256), 16, jnp.float32
        ).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize(
    ("block", "dtype"),
    [(Block(256, 256), jnp.bfloat16), (Block(128, 256), jnp.float32)],
    ids=str,
)
def test_other_blocks(block, dtype):
    mesh = mesh_of("v5e:2x2", 1)
    text = compiled_gradient(mesh, block, (1024, 2048), 512, dtype, backend="pallas_tpu").as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize(
    ("topology", "block", "dtype"),
    [
        ("v5e:2x2", Block(1024, 1024), jnp.bfloat16),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("v5e:2x2", Block(2048, 2048), jnp.bfloat16),
                ("v5e:2x2", Block(128, 4096), jnp.bfloat16),
                ("v4:2x2x1", Block(1024, 1024), jnp.bfloat16),
                ("v4:2x2x1", Block(512, 512), jnp.float32),
            )
        ],
        ("v4:2x2x1", Block(640, 4096), jnp.float32),
    ],
    ids=str,
)
def test_large_blocks_fit_vmem(topology, block, dtype):
    """2,048 tokens a device, where all the operands of a kernel take most."""
    mesh = mesh_of(topology)
    shape = (-(-4096 // block.rows) * block.rows, 4096)
    text = compiled_gradient(mesh, block, shape, 2048 * mesh.size, dtype).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3


def test_scanned_stack_of_layers():
    compiled = compiled_gradient(mesh_of("v5e:2x2"), Block(128, 128), (512, 512), 512, layers=3)
    assert "tpu_custom_call" in compiled.as_text()


def test_blocks_that_the_kernels_refuse_run_on_xla():
    compiled = compiled_gradient(mesh_of("v5e:2x2"), Block(64, 64), (512, 512), 512)
    assert "tpu_custom_call" not in compiled.as_text()


@pytest.mark.slow
def test_the_widest_published_layer_fits_vmem():
    """4096 → 16384 and back: v4's 16 MiB are the least."""
    mesh = mesh_of("v4:2x2x1", 1)
    for shape in ((4096, 16384), (16384, 4096)):
        text = compiled_gradient(mesh, Block(128, 128), shape, 2048).as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 3
