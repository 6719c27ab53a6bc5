"""Products of compact kernels on a CPU, by the compiled functions of `native_cpu.cc`.

They compute in float32; operands in a smaller type are converted, as XLA does on a CPU. Blocks of
any shape, and single entries: `entry_spmm` and `entry_sddmm` make no dense tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.always_sparse.products import native_library
from topkast_jax.always_sparse.products.settings import Settings, choice

_TOKENS = range(16, 4097)
# As in native_cpu.cc.
_INPUTS, _COLUMNS, _TILE = 1024, 128, 64


@dataclasses.dataclass(frozen=True)
class SpmmSettings(Settings):
    """Settings of `spmm`.

    Attributes:
      tokens: the most tokens that one thread multiplies by a block before it takes the next one,
        rounded up to whole register tiles.
    """

    tokens: int = choice(240, allowed=_TOKENS, tried=(96, 240, 480, 960))


@dataclasses.dataclass(frozen=True)
class SddmmSettings(Settings):
    """Settings of `sddmm`.

    Attributes:
      tokens: the most tokens that are summed in registers before a block is added to.
    """

    tokens: int = choice(256, allowed=_TOKENS, tried=(128, 256, 512, 1024))


SPMM, SDDMM = SpmmSettings(), SddmmSettings()


def refuses(block: tuple[int, ...]) -> str | None:
    """Why these functions do not take a block, or None; all shapes are equal to them."""
    del block
    return native_library.unavailable()


def spmm(
    x_TxI: jax.Array,
    values: jax.Array,
    source: jax.Array,
    target: jax.Array,
    width: int,
    transposed: bool,
    settings: SpmmSettings = SPMM,
) -> jax.Array:
    """Sum over blocks i: panel `target[i]` of the output += panel `source[i]` of x @ block i.

    Args:
      x_TxI: activations, or the gradient of them.
      values: `[>= a, rows, cols]`, blocks; the first a are used.
      source: int32 `[a]`, panel of x that a block reads.
      target: int32 `[a]`, panel of the output that it adds to, in any order.
      width: columns of the output.
      transposed: multiply by each block's transpose.
      settings: how many tokens at a time.

    Returns:
      `[T, width]`, accumulated in float32, in the dtype of x; zero where no block writes. Each
      thread keeps working memory of one block for its next product.
    """

    def product(x_TxI: jax.Array, *arrays: jax.Array) -> jax.Array:
        (y_TxN,) = native_library.call(
            "topkast_block_spmm",
            [((x_TxI.shape[0], width), jnp.float32)],
            (x_TxI, *arrays),
            transposed=transposed,
            most_tokens=np.int64(settings.tokens),
        )
        return y_TxN

    arrays = _float32(x_TxI), _float32(values), _int32(source), _int32(target)
    return _mapped_over_tokens(product, *arrays).astype(x_TxI.dtype)


def sddmm(
    x_TxK: jax.Array,
    dy_TxN: jax.Array,
    row: jax.Array,
    col: jax.Array,
    block: tuple[int, int],
    settings: SddmmSettings = SDDMM,
) -> jax.Array:
    """Blocks of xᵀ·dy, block i at panel `row[i]` of x and panel `col[i]` of dy.

    Args:
      x_TxK: activations.
      dy_TxN: gradient of the outputs.
      row: int32 `[b]`.
      col: int32 `[b]`.
      block: rows and columns of a block.
      settings: how many tokens at a time.

    Returns:
      float32 `[b, rows, cols]`. Each thread keeps about `settings.tokens` × (rows + cols) floats of
      working memory for its next product.
    """
    (blocks,) = native_library.call(
        "topkast_block_sddmm",
        [((row.shape[0], *block), jnp.float32)],
        (_float32(x_TxK), _float32(dy_TxN), _int32(row), _int32(col)),
        most_tokens=np.int64(settings.tokens),
    )
    return blocks


def entry_spmm(
    x_TxI: jax.Array, values: jax.Array, index: jax.Array, width: int, transposed: bool
) -> jax.Array:
    """x·W, or x·Wᵀ, for a W of single entries.

    Args:
      x_TxI: activations, or the gradient of them.
      values: `[a]`, the entries.
      index: int32 `[a]`, their row-major numbers in W, ascending.
      width: columns of the output.
      transposed: multiply by the transpose of W.

    Returns:
      `[T, width]`, accumulated in float32, in the dtype of x. Each thread keeps working memory of
      inputs times 64 tokens (128 with AVX-512) for its next product.
    """
    runs = -(-x_TxI.shape[1] // _INPUTS) * width

    def product(x_TxI: jax.Array, *arrays: jax.Array) -> jax.Array:
        y_TxN, _, _ = native_library.call(
            "topkast_entry_spmm",
            [
                ((x_TxI.shape[0], width), jnp.float32),
                ((values.shape[0], 2), jnp.float32),  # An index and a value each.
                ((runs + 2,), jnp.int32),
            ],
            (x_TxI, *arrays),
            transposed=transposed,
        )
        return y_TxN

    arrays = _float32(x_TxI), _float32(values), _int32(index)
    return _mapped_over_tokens(product, *arrays).astype(x_TxI.dtype)


def entry_sddmm(x_TxK: jax.Array, dy_TxN: jax.Array, index: jax.Array, forward: int) -> jax.Array:
    r"""Entries of xᵀ·dy.

    Args:
      x_TxK: activations.
      dy_TxN: gradient of the outputs.
      index: int32 `[b]`, row-major numbers in `[K, N]`; ascending in A and in B\A.
      forward: how many of them, the first ones, are A.

    Returns:
      float32 `[b]`. Its working memory is that of x and dy once more, and each thread keeps
      one vector of sums for each entry in its part of the kernel (256 rows by 128 columns).
    """
    (tokens, k), n = x_TxK.shape, dy_TxN.shape[1]
    tiles = -(-tokens // _TILE)
    runs = k * -(-n // _COLUMNS) + 1
    entries, *_ = native_library.call(
        "topkast_entry_sddmm",
        [
            (index.shape, jnp.float32),
            ((tiles, k, _TILE), jnp.float32),
            ((tiles, n, _TILE), jnp.float32),
            ((2, runs), jnp.int32),
        ],
        (_float32(x_TxK), _float32(dy_TxN), _int32(index)),
        forward=np.int64(forward),
    )
    return entries


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _int32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.int32)


def _mapped_over_tokens(
    product: Callable[..., jax.Array], x_TxI: jax.Array, *arrays: jax.Array
) -> jax.Array:
    """`product(x, *arrays)`, which `vmap` over x alone calls once, with all tokens together."""
    called = jax.custom_batching.custom_vmap(product)

    @called.def_vmap
    def mapped(
        size: int, is_mapped: Sequence[bool], x: jax.Array, *arrays: jax.Array
    ) -> tuple[jax.Array, bool]:
        del size
        if not any(is_mapped[1:]):
            y = _mapped_over_tokens(product, x.reshape(-1, x.shape[-1]), *arrays)
            return y.reshape(*x.shape[:-1], y.shape[-1]), True

        def one(parts: list[jax.Array]) -> jax.Array:
            given, rest = zip(is_mapped, (x, *arrays), strict=True), iter(parts)
            all_arrays = [next(rest) if each else array for each, array in given]
            return _mapped_over_tokens(product, *all_arrays)

        several = [a for a, each in zip((x, *arrays), is_mapped, strict=True) if each]
        return jax.lax.map(one, several), True

    y: jax.Array = called(x_TxI, *arrays)
    return y
