"""The Pallas kernels: numbers in interpret mode against the XLA path, and lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import export
from products_oracle import assert_close, for_a_gpu, make_case, products, random_case

from topkast_jax import Block
from topkast_jax.always_sparse import CompactKernel, matmul, options
from topkast_jax.always_sparse.products import pallas_tpu
from topkast_jax.always_sparse.products.pallas_tpu import SddmmSettings, SpmmSettings


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
    monkeypatch.setattr(pallas_tpu, "SPMM", SpmmSettings(tile_bytes=32 * 128 * 4))
    monkeypatch.setattr(pallas_tpu, "SDDMM", SddmmSettings(tile_bytes=16 * 128 * 4))
    case = random_case((256, 256), Block(128, 128), 2, 2)
    compare(case, "pallas_tpu", tokens=40, dtype=jnp.float32)


GRID = (4, 5)
COMPILED = {
    "spmm": jax.jit(
        functools.partial(
            pallas_tpu.spmm, settings=SpmmSettings(tile_bytes=16 * 640 * 4), interpret=True
        ),
        static_argnames=("width", "transposed"),
    ),
    "sddmm": jax.jit(
        functools.partial(
            pallas_tpu.sddmm,
            block=(128, 128),
            settings=SddmmSettings(tile_bytes=16 * 320 * 4),
            interpret=True,
        )
    ),
}


@settings(max_examples=2, deadline=None)
@given(st.permutations(range(20)))
@example([0, 4, 15, 19, 1, 2, 3, 16])  # corners, rows without blocks
@example([5, 6, 8, 9, 7, 0, 3, 2])  # one row
@example([2, 7, 12, 17, 0, 5, 10, 15])  # one column
def test_blocks_anywhere(order):
    """4 blocks of A and 8 of B over 4x5, in 2 tiles of tokens: rows and columns stay empty."""
    sets = [np.isin(np.arange(20), order[:n]).reshape(GRID) for n in (4, 8)]
    case = make_case((512, 640), Block(128, 128), *sets)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((20, f)).astype(np.float32) for f in case.dense.shape)
    values, index = case.kernel.values, case.kernel.index
    row, col = index // GRID[1], index % GRID[1]
    y = COMPILED["spmm"](x, values, row[:4], col[:4], width=640, transposed=False)
    dx = COMPILED["spmm"](dy, values, col[:4], row[:4], width=512, transposed=True)
    blocks = COMPILED["sddmm"](x, dy, row, col)
    dw = np.zeros((*GRID, 128, 128), np.float32)
    dw[row, col] = blocks
    found = y, dx, dw.swapaxes(1, 2).reshape(512, 640)
    for one, other in zip(found, products(case, x, dy), strict=True):
        assert_close(one, other, 1e-5)


def test_blocks_cut_into_parts(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "SPMM", SpmmSettings(part=128))
    monkeypatch.setattr(pallas_tpu, "SDDMM", SddmmSettings(part=128))
    case = random_case((512, 768), Block(256, 384), 2, 3)
    compare(case, "pallas_tpu", tokens=20, dtype=jnp.float32)


@pytest.mark.parametrize("tokens", [1, 100, 1024, 4096, 5000])
@pytest.mark.parametrize("features", [128, 1024, 4096, 16384])
def test_all_that_a_kernel_holds_fits(tokens, features):
    for itemsize in (2, 4):
        tile = pallas_tpu._spmm_tile(pallas_tpu.SPMM, tokens, features, 512, 512, itemsize)
        twice = tile * (features + 512) * itemsize + 512 * 512 * itemsize
        assert 2 * twice + 4 * tile * 512 <= 15 * 2**20
        tiles = -(-tokens // tile)
        assert tile % 16 == 0
        assert tiles * tile - tokens < 16 * tiles


def test_tiles_that_hold_the_tokens_exactly_are_preferred():
    """2,048 tokens of 3,072 float32 features: 336 fit, 304 would be the fewest tiles, padded."""
    assert pallas_tpu._tile(2048, 336) == 256
    assert pallas_tpu._tile(2048, 512) == 512
    assert pallas_tpu._tile(2045, 336) == 304  # 2,128 in all


def cost_of(function, *arguments):
    """What the one kernel of a function says: its estimate; bytes of each array, least and most."""
    jaxpr = jax.make_jaxpr(functools.partial(function, interpret=True))(*arguments)
    (call,) = (e for e in jaxpr.eqns if e.primitive.name == "pallas_call")
    each = [call.params["metadata"][f"{bound}_bytes"].split() for bound in ("least", "most")]
    return call.params["cost_estimate"], *(np.array(sizes, int) for sizes in each)


@pytest.mark.parametrize(("a", "reads"), [(3, 9), (1, 1)])
def test_spmm_says_what_it_fetches(a, reads):
    """3 tiles of 16 tokens: x and y once, each block once a tile, a single one once; visits."""
    x, values = jnp.ones((40, 256)), jnp.ones((5, 128, 128))
    source, target = jnp.array([0, 1, 0][:a]), jnp.array([1, 1, 0][:a])
    tiles = SpmmSettings(tile_bytes=16 * 256 * 4)
    product = functools.partial(pallas_tpu.spmm, width=384, transposed=False, settings=tiles)
    estimate, least, most = cost_of(product, x, values, source, target)
    assert estimate.flops == 2 * 48 * a * 128 * 128
    floats = 48 * 256 + 48 * 384 + reads * 128 * 128
    assert estimate.bytes_accessed == 4 * (floats + 4 * (a + 3)) == sum(least) == sum(most)
    assert list(least[4:]) == [4 * 48 * 256, 4 * reads * 128 * 128, 4 * 48 * 384]


def changes(*places):
    """How often a block is fetched whose place at each step is given."""
    return 1 + int(np.any(np.diff(places, axis=1), axis=0).sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("tiles", "cols", "slack"), [(3, 128, 0), (3, 256, 0), (1, 128, GRID[0] - 1), (1, 256, 99)]
)
def test_sddmm_says_what_it_fetches_at_the_least(tiles, cols, slack, seed):
    """Exact over several tiles; over one, panels stay, and only where it runs is known how many."""
    rng = np.random.default_rng(seed)
    index = np.sort(rng.permutation(20)[: rng.integers(1, 21)])
    row, col = index // GRID[1], index % GRID[1]
    sizes = SddmmSettings(tile_bytes=48 // tiles * cols * 4)
    product = functools.partial(pallas_tpu.sddmm, block=(128, cols), settings=sizes)
    x, dy = jnp.ones((48, 128 * GRID[0])), jnp.ones((48, cols * GRID[1]))
    estimate, least, most = cost_of(product, x, dy, jnp.asarray(row), jnp.asarray(col))
    step = np.tile(np.arange(tiles), index.size)
    rows, columns = (changes(np.repeat(side, tiles), step) for side in (row, col))
    panel = 4 * 48 // tiles * 128
    places, result = 4 * index.size, 4 * index.size * 128 * cols
    each = [places, places, panel * rows, panel * columns * cols // 128, result]
    assert np.all(least <= each)
    assert np.all(each <= most)
    assert sum(each) - slack * panel <= estimate.bytes_accessed <= sum(each)


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


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(None, "bfloat16"), ("pallas_gpu", "bfloat16"), ("pallas_gpu", "float32")],
)
@pytest.mark.parametrize("block", [Block(128, 128), Block(32, 32), Block(256, 16)], ids=str)
def test_lowers_for_cuda(backend, dtype, block):
    """On a machine without a GPU; the platform's kernels are taken without being asked for."""
    shape = (4 * block.rows, 8 * block.cols)
    kernel = random_case(shape, block, 4, 8, dtype=jnp.dtype(dtype)).kernel

    def loss(values, x):
        return jnp.sum(matmul(x, kernel.with_values(values)).astype(jnp.float32) ** 2)

    x = jnp.ones((100, shape[0]), dtype)
    allowed = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with for_a_gpu(), options(backend):
        exported = export.export(
            jax.jit(jax.grad(loss, (0, 1))), platforms=["cuda"], disabled_checks=allowed
        )(kernel.values, x)
    assert exported.mlir_module().count("__gpu$xla.gpu.triton") == 3
