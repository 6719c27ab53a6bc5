"""Block products as Pallas GPU (Triton) kernels.

`spmm` gives one program a tile of tokens and a panel of the output: it walks the blocks that feed
the panel, a run of the blocks sorted by target, and writes the panel whether there were any or not.
`sddmm` gives one program one block and walks the tokens. Blocks larger than 128 are cut into parts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from topkast_jax.always_sparse.products.xla import padded
from topkast_jax.varying import result_like

SMALLEST = 16
PART = 128
"""Largest side of the tile one program accumulates in registers."""
TOKENS = 128
STEP = 64
"""Tokens that `sddmm`, features that `spmm` takes in one dot."""


def refuses(block: tuple[int, int]) -> str | None:
    """Why these kernels do not take a block, or None."""
    if any(side < SMALLEST or side & (side - 1) for side in block):
        return f"blocks must be powers of 2 from {SMALLEST}, found {block[0]}x{block[1]}"
    return None


def spmm(
    x_TxI: jax.Array,
    values: jax.Array,
    source: jax.Array,
    target: jax.Array,
    width: int,
    transposed: bool,
    interpret: bool = False,
) -> jax.Array:
    """Sum over blocks i: panel `target[i]` of the output += panel `source[i]` of x @ block i.

    Args:
      x_TxI: activations, or the gradient of them.
      values: `[>= a, rows, cols]`, blocks; the first a are used.
      source: int32 `[a]`, panel of x that a block reads.
      target: int32 `[a]`, panel of the output that it adds to, in any order.
      width: columns of the output.
      transposed: multiply by each block's transpose.
      interpret: run on any platform, in interpret mode.

    Returns:
      `[T, width]`, accumulated in float32, in the dtype of x; zero where no block writes.
    """
    tokens = x_TxI.shape[0]
    x_TxI = padded(x_TxI, TOKENS)
    rows, cols = values.shape[1:][::-1] if transposed else values.shape[1:]
    part = min(cols, PART)
    order = jnp.argsort(target).astype(jnp.int32)
    start = jnp.searchsorted(target[order], jnp.arange(width // cols + 1)).astype(jnp.int32)
    y_TxN = pl.pallas_call(
        functools.partial(_spmm_kernel, rows=rows, cols=cols, part=part, transposed=transposed),
        grid=(width // part, x_TxI.shape[0] // TOKENS),
        out_specs=pl.BlockSpec((TOKENS, part), lambda j, t: (t, j)),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 5,
        out_shape=result_like((x_TxI.shape[0], width), x_TxI.dtype, x_TxI),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="block_spmm",
    )(start, order, source[order], x_TxI, values)
    return y_TxN[:tokens]


def _spmm_kernel(  # type: ignore[no-untyped-def]
    start,
    order,
    source,
    x_ref,
    values_ref,
    y_ref,
    *,
    rows: int,
    cols: int,
    part: int,
    transposed: bool,
) -> None:
    parts, step = cols // part, min(rows, STEP)
    panel, inside = pl.program_id(0) // parts, pl.program_id(0) % parts
    tokens = pl.ds(pl.program_id(1) * TOKENS, TOKENS)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        block, at = order[i], source[i] * rows
        for k in range(0, rows, step):
            x = x_ref[tokens, pl.ds(at + k, step)]
            if transposed:
                w = values_ref[block, pl.ds(inside * part, part), pl.ds(k, step)]
            else:
                w = values_ref[block, pl.ds(k, step), pl.ds(inside * part, part)]
            total += plgpu.dot(x, w, trans_b=transposed)
        return total

    total = jnp.zeros((TOKENS, part), jnp.float32)
    total = lax.fori_loop(start[panel], start[panel + 1], add, total)
    y_ref[...] = total.astype(y_ref.dtype)


def sddmm(
    x_TxK: jax.Array,
    dy_TxN: jax.Array,
    row: jax.Array,
    col: jax.Array,
    block: tuple[int, int],
    interpret: bool = False,
) -> jax.Array:
    """Blocks of xᵀ·dy, block i at panel `row[i]` of x and panel `col[i]` of dy.

    Args:
      x_TxK: activations.
      dy_TxN: gradient of the outputs.
      row: int32 `[b]`.
      col: int32 `[b]`.
      block: rows and columns of a block.
      interpret: run on any platform, in interpret mode.

    Returns:
      float32 `[b, rows, cols]`.
    """
    x_TxK, dy_TxN = padded(x_TxK, STEP), padded(dy_TxN, STEP)
    rows, cols = (min(side, PART) for side in block)
    return pl.pallas_call(
        functools.partial(_sddmm_kernel, block=block, steps=x_TxK.shape[0] // STEP),
        grid=(row.shape[0], block[0] // rows, block[1] // cols),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
        out_specs=pl.BlockSpec((None, rows, cols), lambda i, r, c: (i, r, c)),
        out_shape=result_like((row.shape[0], *block), jnp.float32, x_TxK),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="block_sddmm",
    )(row, col, x_TxK, dy_TxN)


def _sddmm_kernel(  # type: ignore[no-untyped-def]
    row, col, x_ref, dy_ref, dw_ref, *, block: tuple[int, int], steps: int
) -> None:
    i, (rows, cols) = pl.program_id(0), dw_ref.shape
    x_at = pl.ds(row[i] * block[0] + pl.program_id(1) * rows, rows)
    dy_at = pl.ds(col[i] * block[1] + pl.program_id(2) * cols, cols)

    def add(t: jax.Array, total: jax.Array) -> jax.Array:
        tokens = pl.ds(t * STEP, STEP)
        return total + plgpu.dot(x_ref[tokens, x_at], dy_ref[tokens, dy_at], trans_a=True)

    total = jnp.zeros((rows, cols), jnp.float32)
    dw_ref[...] = lax.fori_loop(0, steps, add, total)
