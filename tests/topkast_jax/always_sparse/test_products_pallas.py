"""The Pallas kernels: numbers in interpret mode against the XLA path, and lowering for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from products_oracle import assert_close, make_case, random_case

from topkast_jax import Block
from topkast_jax.always_sparse import CompactKernel, matmul, options, pallas_tpu


def forward_and_backward(kernel, x, dy, backend, interpret):
    def run(x, values, index, dy):
        k = CompactKernel(values, index, kernel.shape, kernel.pattern, kernel.forward)
        y, vjp = jax.vjp(lambda x, v: matmul(x, k.with_values(v)), x, values)
        return y, *vjp(dy)

    with options(backend, interpret=interpret):
        return jax.jit(run)(x, kernel.values, kernel.index, dy)


def compare(case, backend, tokens, dtype):
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.standard_normal((tokens, f)), dtype) for f in case.dense.shape)
    found = forward_and_backward(case.kernel, x, dy, backend, interpret=True)
    expected = forward_and_backward(case.kernel, x, dy, "xla", interpret=False)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other, 1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize(
    ("backend", "block", "dtype"),
    [
        ("pallas_tpu", Block(128, 128), jnp.bfloat16),
        ("pallas_tpu", Block(256, 128), jnp.float32),
        ("pallas_gpu", Block(64, 64), jnp.bfloat16),
        ("pallas_gpu", Block(256, 16), jnp.float32),
    ],
    ids=str,
)
def test_kernels_match_xla(backend, block, dtype):
    case = random_case((2 * block.rows, 3 * block.cols), block, 3, 4, dtype=dtype)
    compare(case, backend, tokens=40, dtype=dtype)


@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("kept", ["one", "all", "row", "column"])
def test_every_output_panel_is_written(backend, kept):
    """Panels that no block feeds come out zero, not as whatever the memory held."""
    forward = np.zeros((2, 3), bool)
    where = {"one": (1, 1), "all": ..., "row": (1,), "column": (slice(None), 2)}
    forward[where[kept]] = True
    backward = forward.copy()
    backward[0, 0] = True
    compare(make_case((256, 384), Block(128, 128), forward, backward), backend, 17, jnp.float32)


@pytest.mark.parametrize("seed", range(4))
def test_work_list_visits_each_block_once_and_each_panel(seed):
    rng = np.random.default_rng(seed)
    targets = 6
    target = rng.integers(0, targets, rng.integers(1, 12)).astype(np.int32)
    panel, block, counts = (np.asarray(v) for v in pallas_tpu.work_list(target, targets))
    counts = counts.astype(bool)
    assert sorted(block[counts]) == list(range(target.size))
    np.testing.assert_array_equal(target[block[counts]], panel[counts])
    assert np.all(np.diff(panel) >= 0)
    assert set(panel) == set(range(targets))
    # A visit that does not count fetches no new block.
    idle = np.flatnonzero(~counts[1:]) + 1
    np.testing.assert_array_equal(block[idle], block[idle - 1])


def test_several_token_tiles(monkeypatch):
    """Tokens that do not fit one tile, the last tile partly padding."""
    monkeypatch.setattr(pallas_tpu, "TILE_BYTES", 32 * 128 * 4)
    case = random_case((256, 256), Block(128, 128), 2, 2)
    compare(case, "pallas_tpu", tokens=40, dtype=jnp.float32)


def test_tpu_kernels_over_a_mesh():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    case = random_case((256, 256), Block(128, 128), 2, 3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 256)), jnp.float32)

    def loss(values, x):
        return jnp.sum(jnp.sin(matmul(x, case.kernel.with_values(values))))

    expected = jax.grad(loss, (0, 1))(case.kernel.values, x)
    with options("pallas_tpu", interpret=True, mesh=mesh, axes=("data",)):
        found = jax.jit(jax.grad(loss, (0, 1)))(case.kernel.values, x)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("backend", [None, "pallas_gpu"])
@pytest.mark.parametrize("block", [Block(128, 128), Block(32, 32), Block(256, 16)], ids=str)
def test_lowers_for_cuda(backend, block):
    """On a machine without a GPU; the platform's kernels are taken without being asked for."""
    shape = (4 * block.rows, 8 * block.cols)
    kernel = random_case(shape, block, 4, 8, dtype=jnp.bfloat16).kernel

    def loss(values, x):
        return jnp.sum(matmul(x, kernel.with_values(values)).astype(jnp.float32) ** 2)

    x = jnp.ones((100, shape[0]), jnp.bfloat16)
    allowed = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)  # what to compile for
    with jax.sharding.use_abstract_mesh(mesh), options(backend):
        exported = export.export(
            jax.jit(jax.grad(loss, (0, 1))), platforms=["cuda"], disabled_checks=allowed
        )(kernel.values, x)
    assert exported.mlir_module().count("__gpu$xla.gpu.triton") == 3
