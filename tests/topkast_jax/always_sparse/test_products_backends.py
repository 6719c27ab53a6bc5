"""What every backend of the block products must do, against NumPy: one class, inherited by each.

The Pallas kernels run in interpret mode. A new backend adds a class at the end of this file.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products_oracle import assert_close, make_case, products, random_case

from topkast_jax import Block
from topkast_jax.always_sparse import CompactKernel, matmul, options, to_dense
from topkast_jax.always_sparse.products import BACKENDS

F32, BF16 = jnp.float32, jnp.bfloat16
TOLERANCE = {F32: 1e-5, BF16: 1e-2}


def pytest_generate_tests(metafunc):
    if "block" in metafunc.fixturenames:
        metafunc.parametrize(("block", "dtype"), metafunc.cls.blocks, ids=str)


class Products:
    """The tests; a subclass says what it runs them with."""

    backend: ClassVar[str]
    interpret: ClassVar[bool] = True
    blocks: ClassVar[list[tuple[Block, type]]]
    small: ClassVar[Block]
    """The smallest block that the backend takes."""

    def products(self, case, x, dy):
        """y, dx and the dense dW."""

        def run(x, values, index, dy):
            kernel = CompactKernel(
                values, index, case.kernel.shape, case.kernel.pattern, case.kernel.forward
            )
            y, vjp = jax.vjp(lambda x, v: matmul(x, kernel.with_values(v)), x, values)
            return y, *vjp(dy)

        with options(self.backend, interpret=self.interpret):
            y, dx, dvalues = jax.jit(run)(x, case.kernel.values, case.kernel.index, dy)
        assert (y.dtype, dx.dtype, dvalues.dtype) == (x.dtype, x.dtype, case.kernel.values.dtype)
        return y, dx, to_dense(case.kernel.with_values(dvalues))

    def check(self, case, tokens, dtype=F32):
        rng = np.random.default_rng(1)
        x, dy = (jnp.asarray(rng.standard_normal((*tokens, f)), dtype) for f in case.dense.shape)
        for found, expected in zip(self.products(case, x, dy), products(case, x, dy), strict=True):
            assert_close(found, expected, TOLERANCE[dtype])

    def test_products_match_numpy(self, block, dtype):
        case = random_case((2 * block.rows, 3 * block.cols), block, 3, 4, dtype=dtype)
        self.check(case, (40,), dtype)

    def test_one_token_and_several_axes(self):
        block = self.small
        case = random_case((2 * block.rows, 2 * block.cols), block, 2, 3)
        for tokens in ((1,), (3, 11)):
            self.check(case, tokens)

    @pytest.mark.parametrize("kept", ["one", "row", "column"])
    def test_panels_that_no_block_feeds_are_zero(self, kept):
        """They come out zero, not as whatever the memory held."""
        forward = np.zeros((2, 3), bool)
        where = {"one": (1, 1), "row": (1,), "column": (slice(None), 2)}
        forward[where[kept]] = True
        backward = forward.copy()
        backward[0, 0] = True
        block = self.small
        shape = (2 * block.rows, 3 * block.cols)
        self.check(make_case(shape, block, forward, backward), (17,))

    @pytest.mark.parametrize("seed", range(2))
    def test_any_set_of_blocks(self, seed):
        grid, block, rng = (3, 4), self.small, np.random.default_rng(seed)
        a, b = np.sort(rng.integers(1, 13, 2))
        order = rng.permutation(12)
        sets = [np.isin(np.arange(12), order[:n]).reshape(grid) for n in (a, b)]
        self.check(make_case((3 * block.rows, 4 * block.cols), block, *sets), (5,))

    def test_layers_under_scan(self):
        block = self.small
        side = 2 * block.rows
        cases = [random_case((side, side), Block(block.rows, block.rows), 2, 3, s) for s in (1, 2)]
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(c.kernel for c in cases))
        x = np.random.default_rng(0).standard_normal((4, side)).astype(np.float32)
        with options(self.backend, interpret=self.interpret):
            y, _ = jax.jit(
                lambda x, stack: jax.lax.scan(lambda x, k: (matmul(x, k), None), x, stack)
            )(x, stack)
        expected = x
        for case in cases:
            expected, _, _ = products(case, expected, np.zeros((4, side)))
        assert_close(y, expected, 1e-5)


class TestXla(Products):
    backend, interpret = "xla", False
    blocks: ClassVar = [(Block(16, 16), F32), (Block(16, 16), BF16), (Block(8, 32), F32)]
    small = Block(8, 8)


class TestNativeCpu(Products):
    backend, interpret = "native_cpu", False
    blocks: ClassVar = [
        (Block(128, 128), F32),
        (Block(128, 64), BF16),
        (Block(24, 20), F32),
        (Block(5, 70), F32),
        (Block(1, 4), F32),
    ]
    small = Block(4, 4)

    @pytest.fixture(autouse=True)
    def compiled(self, native_cpu):
        """They are compiled for this processor."""


class TestPallasTpu(Products):
    backend = "pallas_tpu"
    blocks: ClassVar = [(Block(128, 128), BF16), (Block(256, 128), F32)]
    small = Block(128, 128)


class TestPallasGpu(Products):
    backend = "pallas_gpu"
    blocks: ClassVar = [(Block(64, 64), BF16), (Block(256, 16), F32)]
    small = Block(16, 16)


def test_every_backend_is_tested():
    assert {tested.backend for tested in Products.__subclasses__()} == set(BACKENDS)
