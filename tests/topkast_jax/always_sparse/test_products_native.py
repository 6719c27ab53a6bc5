"""The CPU's compiled products against NumPy, their building, what they refuse.

What they must do with blocks, as every backend must, is in test_products_backends.py.
"""

import dataclasses
import os
import re
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import buffer_sizes
from products_oracle import assert_close, make_case, products, random_case

from topkast_jax import Block, SparsityError, Unstructured
from topkast_jax.always_sparse import CompactKernel, build_native, matmul, options, to_dense
from topkast_jax.always_sparse.products import native_cpu, native_library, single_entries

F32, BF16 = jnp.float32, jnp.bfloat16
TOLERANCE = {F32: 1e-5, BF16: 1e-2}
ENTRIES = Unstructured()

pytestmark = pytest.mark.usefixtures("native_cpu")


def entry_products(case, x, dy, backend="native_cpu"):
    """y, dx and the dense dW."""

    def run(x, values, index, dy):
        kernel = dataclasses.replace(case.kernel, values=values, index=index)
        y, vjp = jax.vjp(lambda x, v: matmul(x, kernel.with_values(v), backend=backend), x, values)
        return y, *vjp(dy)

    y, dx, dvalues = jax.jit(run)(x, case.kernel.values, case.kernel.index, dy)
    assert (y.dtype, dx.dtype, dvalues.dtype) == (x.dtype, x.dtype, case.kernel.values.dtype)
    return y, dx, to_dense(case.kernel.with_values(dvalues))


def check(case, tokens, dtype=F32):
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.standard_normal((*tokens, f)), dtype) for f in case.dense.shape)
    expected = products(case, x, dy)
    for found, one in zip(entry_products(case, x, dy), expected, strict=True):
        assert_close(found, one, TOLERANCE[dtype])


def entries_case(shape, forward, backward, seed=0, dtype=F32):
    a, b = (max(1, int(shape[0] * shape[1] * density)) for density in (forward, backward))
    return random_case(shape, ENTRIES, a, b, seed, dtype)


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((64, 96), (1,)),
        ((64, 96), (3, 7)),
        ((2500, 24), (70,)),  # Several passes over the inputs, the last one short.
        ((24, 2500), (70,)),
        ((300, 200), (130,)),  # Of dW two bands of rows, two parts of columns, three of tokens.
    ],
)
def test_entries_match_numpy(shape, tokens):
    check(entries_case(shape, 0.1, 0.2), tokens)


def test_entries_in_bfloat16():
    check(entries_case((64, 96), 0.1, 0.2, dtype=BF16), (3, 7), BF16)


@settings(max_examples=10, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 140)),
    tokens=st.integers(1, 150),
    forward=st.floats(0, 0.35),
    more=st.floats(0, 0.2),
    seed=st.integers(0, 99),
)
def test_any_set_of_entries(shape, tokens, forward, more, seed):
    """On both sides of the density from which the dense tile is used, for each product alone."""
    check(entries_case(shape, forward, forward + more, seed), (tokens,))


@settings(max_examples=12, deadline=None)
@given(
    block=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    tokens=st.integers(0, 300),
    most=st.sampled_from((16, 48, 100, 240)),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_set_of_blocks(block, grid, tokens, most, density, seed):
    """Whole and cut tiles, parts of the tokens, several blocks of dW that share a panel."""
    rng, units = np.random.default_rng(seed), grid[0] * grid[1]
    chosen = np.isin(np.arange(units), rng.permutation(units)[: int(density * units)])
    shape = (block[0] * grid[0], block[1] * grid[1])
    case = make_case(shape, Block(*block), chosen.reshape(grid), np.ones(grid, bool), seed)
    x, dy = (jnp.asarray(rng.standard_normal((tokens, f)), F32) for f in shape)
    values, forward = case.kernel.values, case.kernel.forward
    row, col = map(jnp.asarray, np.divmod(np.asarray(case.kernel.index), grid[1]))
    a_row, a_col, limit = row[:forward], col[:forward], native_cpu.SpmmSettings(tokens=most)
    y = native_cpu.spmm(x, values, a_row, a_col, shape[1], False, limit)
    dx = native_cpu.spmm(dy, values, a_col, a_row, shape[0], True, limit)
    dw = native_cpu.sddmm(x, dy, row, col, block, native_cpu.SddmmSettings(tokens=most))
    found = y, dx, to_dense(case.kernel.with_values(dw))
    for one, expected in zip(found, products(case, x, dy), strict=True):
        assert_close(one, expected, TOLERANCE[F32])


def test_a_width_that_no_blocks_fill_is_refused():
    x, values, at = jnp.ones((3, 8)), jnp.ones((1, 4, 4)), jnp.zeros(1, int)
    for width, inputs in ((9, 8), (8, 7)):
        dy = jnp.ones((3, width))
        with pytest.raises(jax.errors.JaxRuntimeError, match="outside the kernel"):
            native_cpu.spmm(x[:, :inputs], values, at, at, width, False).block_until_ready()
        with pytest.raises(jax.errors.JaxRuntimeError, match="outside the kernel"):
            native_cpu.sddmm(x[:, :inputs], dy, at, at, (4, 4)).block_until_ready()


def test_rows_and_columns_without_an_entry_are_zero():
    forward = np.zeros((30, 90), bool)
    forward[7, [0, 64, 89]] = forward[[0, 29], 13] = True
    backward = forward.copy()
    backward[8, 63:66] = True
    check(make_case((30, 90), ENTRIES, forward, backward), (9,))


def lowered_targets(case, tokens=8, **kwargs):
    x = jnp.ones((tokens, case.dense.shape[0]))
    loss = lambda x, v: matmul(x, case.kernel.with_values(v), **kwargs).sum()  # noqa: E731
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, case.kernel.values).as_text()
    return set(re.findall(r"@(topkast_\w+)", text))


def test_what_runs_on_a_cpu_by_default():
    entries, blocks = entries_case((64, 64), 0.1, 0.2), random_case((64, 64), Block(8, 8), 8, 16)
    assert lowered_targets(entries) == {"topkast_entry_spmm", "topkast_entry_sddmm"}
    assert lowered_targets(blocks) == {"topkast_block_spmm", "topkast_block_sddmm"}
    for case in (entries, blocks):
        assert lowered_targets(case, backend="xla") == set()
        assert lowered_targets(case, backend=("pallas_gpu", "xla", "native_cpu")) == set()
        assert lowered_targets(case, backend=("pallas_gpu", "native_cpu")) == lowered_targets(case)


def test_each_product_of_entries_is_dense_from_a_density_on():
    product, gradient = single_entries.DENSEST_PRODUCT, single_entries.DENSEST_GRADIENT
    spmm, sddmm = {"topkast_entry_spmm"}, {"topkast_entry_sddmm"}
    assert lowered_targets(entries_case((50, 50), product, gradient)) == spmm | sddmm
    assert lowered_targets(entries_case((50, 50), product, gradient + 0.01)) == spmm
    assert lowered_targets(entries_case((50, 50), product + 0.01, gradient)) == sddmm


@pytest.mark.parametrize("pattern", [ENTRIES, Block(16, 16)], ids=str)
def test_no_dense_buffer(pattern):
    units = pattern.grid((256, 320))[0] * pattern.grid((256, 320))[1]
    case = random_case((256, 320), pattern, units // 20, units // 10)
    x = jnp.ones((24, 256))

    def loss(x, values):
        return matmul(x, case.kernel.with_values(values)).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, case.kernel.values).compile()
    assert max(buffer_sizes(compiled)) < 256 * 320


def lowered_for_tpu(case, **kwargs):
    loss = lambda x, v: matmul(x, case.kernel.with_values(v), **kwargs).sum()  # noqa: E731
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(jnp.ones((8, 64)), case.kernel.values)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


def test_another_platform_gets_the_dense_tile_of_entries():
    """It is made again in the backward pass, as without these products."""
    case = entries_case((64, 64), 0.1, 0.2)
    found, expected = (lowered_for_tpu(case, backend=backend) for backend in (None, "xla"))
    assert "topkast" not in found
    for operation in ("optimization_barrier", "stablehlo.scatter", "stablehlo.dot_general"):
        assert found.count(operation) == expected.count(operation) > 0
    for backend in ("native_cpu", ("native_cpu", "pallas_tpu")):
        with pytest.raises(SparsityError, match="runs on cpu and this is tpu"):
            lowered_for_tpu(case, backend=backend)


def test_vmap_over_x_is_one_call_with_all_tokens():
    case = entries_case((64, 48), 0.1, 0.2)
    blocks = random_case((64, 48), Block(8, 8), 8, 16)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 5, 64)), F32)
    for each, name in ((case, "topkast_entry_spmm"), (blocks, "topkast_block_spmm")):
        run = jax.jit(jax.vmap(jax.vmap(lambda x, k=each.kernel: matmul(x, k))))
        text = run.lower(x).as_text()
        assert text.count(f"@{name}") == 1
        assert "stablehlo.while" not in text
        assert_close(run(x), products(each, x, jnp.zeros((3, 2, 5, 48)))[0], 1e-5)


@pytest.mark.parametrize("dtype", [jnp.int16, jnp.uint32])
@pytest.mark.parametrize("pattern", [ENTRIES, Block(8, 8)], ids=str)
def test_an_index_of_another_integer_type(pattern, dtype):
    units = pattern.grid((32, 32))[0] * pattern.grid((32, 32))[1]
    case = random_case((32, 32), pattern, units // 8, units // 5)
    case = dataclasses.replace(
        case, kernel=dataclasses.replace(case.kernel, index=case.kernel.index.astype(dtype))
    )
    check(case, (4,))


@pytest.mark.parametrize("pattern", [ENTRIES, Block(8, 8)], ids=str)
def test_inside_vmap_scan_and_shard_map(pattern):
    units = pattern.grid((32, 32))[0] * pattern.grid((32, 32))[1]
    cases = [random_case((32, 32), pattern, units // 8, units // 5, seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(case.kernel for case in cases))
    x = np.random.default_rng(0).standard_normal((3, 16, 32)).astype(np.float32)

    def gradients(product):
        return jax.jit(jax.grad(lambda x, v: (product(x, v) ** 2).sum(), (0, 1)))

    def kernel_of(index, v):
        return dataclasses.replace(cases[0].kernel, values=v, index=index)

    def one(x, v, index):
        return matmul(x, kernel_of(index, v), backend="native_cpu")

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def over_devices(x, v):
        def part(x, v, index):
            return one(x, v, index)

        run = jax.shard_map(part, mesh=mesh, in_specs=(split, whole, whole), out_specs=split)
        return jnp.stack([run(x[i], v[i], stack.index[i]) for i in range(3)])

    found = [
        gradients(lambda x, v: jax.vmap(one)(x, v, stack.index)),
        gradients(lambda x, v: jax.lax.map(lambda a: one(*a), (x, v, stack.index))),
        gradients(over_devices),
    ]
    for i, case in enumerate(cases):
        y, _, _ = products(case, x[i], x[i])
        _, dx, dw = products(case, x[i], 2 * y)
        for run in found:
            gx, gv = run(x, stack.values)
            assert_close(gx[i], dx, 1e-5)
            assert_close(to_dense(case.kernel.with_values(gv[i])), dw, 1e-5)


def test_infinities_outside_the_forward_set_do_not_reach_the_result():
    case = entries_case((40, 50), 0.1, 0.2)
    x = np.ones((5, 40), np.float32)
    empty = int(np.flatnonzero(~case.forward.any(axis=1))[0]) if (~case.forward.any(1)).any() else 0
    forward = case.forward.copy()
    forward[empty] = False
    case = make_case((40, 50), ENTRIES, forward, case.backward | forward)
    x[:, empty] = np.inf
    assert np.isfinite(matmul(x, case.kernel, backend="native_cpu")).all()


@pytest.mark.parametrize(
    ("pattern", "index", "says"),
    [
        (ENTRIES, [5, 4, 7], "must ascend within A"),
        (ENTRIES, [5, 5, 7], "must ascend within A"),
        (ENTRIES, [-1, 4, 7], "must ascend within A"),
        (ENTRIES, [1, 4, 16 * 16], "must ascend within A"),
        (Block(4, 4), [0, 3, 16], "a block lies outside the kernel"),
        (Block(4, 4), [0, 3, -1], "a block lies outside the kernel"),
    ],
)
def test_an_index_that_no_kernel_has_is_an_error_and_reads_nothing(pattern, index, says):
    values = jnp.ones((3, *pattern.unit_shape))
    kernel = CompactKernel(values, jnp.asarray(index, jnp.int32), (16, 16), pattern, 3)
    with pytest.raises(jax.errors.JaxRuntimeError, match=says):
        jax.block_until_ready(matmul(jnp.ones((2, 16)), kernel, backend="native_cpu"))
    if pattern == ENTRIES:
        kernel = dataclasses.replace(kernel, forward=0)
        gradient = jax.grad(lambda v: matmul(jnp.ones((2, 16)), kernel.with_values(v)).sum())
        with pytest.raises(jax.errors.JaxRuntimeError, match=says):
            jax.block_until_ready(gradient(values))


@pytest.mark.parametrize("pattern", [ENTRIES, Block(8, 8)], ids=str)
@pytest.mark.parametrize("wrong", ["forward", "values"])
def test_a_kernel_that_is_none_is_told_and_not_read(pattern, wrong):
    kernel = random_case((32, 32), pattern, 3, 5).kernel
    kernel = dataclasses.replace(
        kernel, **{"forward": {"forward": 6}, "values": {"values": kernel.values[:2]}}[wrong]
    )
    with pytest.raises(SparsityError, match="must have a value for each index, and A inside B"):
        matmul(jnp.ones((4, 32)), kernel)


def test_entries_that_cannot_be_multiplied_one_by_one_are_told():
    case = entries_case((16, 16), 0.1, 0.2)
    mesh = jax.make_mesh((2,), ("data",))
    sharded = jax.device_put(
        jnp.ones((4, 16)), jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    with pytest.raises(SparsityError, match=r"must be on one device, found x of"):
        matmul(sharded, case.kernel, backend="native_cpu")
    with options("native_cpu", mesh=mesh), pytest.raises(SparsityError, match="a mesh of 2"):
        matmul(jnp.ones((4, 16)), case.kernel)
    for dtype in (jnp.int32, jnp.float8_e4m3fn):
        x, kernel = jnp.ones((4, 16), dtype), case.kernel.astype(dtype)
        with pytest.raises(SparsityError, match="in float32, bfloat16 or float16, found"):
            matmul(x, kernel, backend="native_cpu")
        assert matmul(x, kernel).dtype == dtype
    with pytest.raises(SparsityError, match="interpret=True with backend 'native_cpu'"):
        options("native_cpu", interpret=True).__enter__()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not loaded the library, with an empty folder for caches."""
    monkeypatch.setattr(native_library, "_registered", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native_library.path.cache_clear()
    yield tmp_path
    native_library.path.cache_clear()


def compiler(folder, text):
    """An executable in place of the compiler."""
    made = folder / "compiler"
    made.write_text(f"#!/bin/sh\n{text}\n")
    made.chmod(made.stat().st_mode | stat.S_IXUSR)
    return str(made)


def test_without_the_library_xla_computes(fresh):
    case = entries_case((64, 64), 0.1, 0.2)
    assert lowered_targets(case) == set()
    for backend in ("native_cpu", ("native_cpu",)):
        with pytest.raises(SparsityError, match=r"not compiled yet \(python -m topkast_jax"):
            matmul(jnp.ones((4, 64)), case.kernel, backend=backend)
    blocks = random_case((64, 64), Block(8, 8), 8, 16)
    assert lowered_targets(blocks, backend=("native_cpu", "xla")) == set()
    with pytest.raises(SparsityError, match="not compiled yet"):
        matmul(jnp.ones((4, 64)), blocks.kernel, backend="native_cpu")


def test_a_library_that_does_not_load_is_told_and_not_used(fresh):
    native_library.path().parent.mkdir(parents=True)
    native_library.path().write_text("no library")
    assert "cannot be loaded" in native_library.unavailable()
    assert lowered_targets(entries_case((64, 64), 0.1, 0.2)) == set()


def test_the_command_replaces_a_library_that_does_not_load(fresh, monkeypatch, capsys):
    native_library.path().parent.mkdir(parents=True)
    native_library.path().write_text("no library")
    monkeypatch.setenv("CXX", compiler(fresh, 'for last; do :; done; echo still none > "$last"'))
    assert build_native.main([]) == 2
    assert "its kernels cannot be loaded" in capsys.readouterr().err


def test_without_its_source_the_library_is_not_used(fresh, monkeypatch, capsys):
    monkeypatch.setattr(native_library, "SOURCES", (fresh / "gone.cc",))
    assert "gone.cc" in native_library.unavailable()
    assert lowered_targets(entries_case((64, 64), 0.1, 0.2)) == set()
    assert build_native.main([]) == 2
    assert "gone.cc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cxx", "says"),
    [
        ("no-such-compiler 'fast", 'found "no-such-compiler \'fast": No closing quotation'),
        ("no-such-compiler --fast", "no C++ compiler in CXX: looked for no-such-compiler --fast"),
        ("echo 'a.h: note'; echo 'x.cc:3: error: bad' >&2; exit 1", "x.cc:3: error: bad"),
        ("exit 7", "status 7"),
    ],
)
def test_a_compiler_that_fails_is_one_line(fresh, monkeypatch, capsys, cxx, says):
    named = cxx if cxx.startswith("no-such") else compiler(fresh, cxx)
    monkeypatch.setenv("CXX", named)
    assert build_native.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
    assert not native_library.path().exists()


def test_no_compiler_at_all(fresh, monkeypatch, capsys):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    assert build_native.main([]) == 2
    assert "no C++ compiler in PATH: looked for c++, g++, clang++" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(fresh, capsys):
    (fresh / "cache").write_text("a file")
    assert build_native.main([]) == 2
    assert "the CPU kernels cannot be compiled: " in capsys.readouterr().err


@pytest.fixture
def compiled():
    """The library that the command made; named before `fresh` gives it another place."""
    return native_library.path()


def test_the_command_compiles_once_with_the_chosen_compiler(compiled, fresh, monkeypatch, capsys):
    log = fresh / "calls"
    copy = f'echo called "$1" >> {log}; for last; do :; done; cp {compiled} "$last"'
    monkeypatch.setenv("CXX", f"{compiler(fresh, copy)} -g0")
    for _ in range(2):
        assert build_native.main([]) == 0
    assert log.read_text() == "called -g0\n"
    assert capsys.readouterr().out.split() == [str(native_library.path())] * 2
    assert os.listdir(native_library.path().parent) == [native_library.path().name]
