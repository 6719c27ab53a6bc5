"""Block products as Pallas GPU (Triton) kernels.

`spmm` gives one program a tile of tokens and a panel of the output: it walks the blocks that feed
the panel, a run of the blocks sorted by target, and writes the panel whether there were any or not.
`sddmm` gives one program one block and walks the tokens. Larger blocks are cut into parts.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from topkast_jax.always_sparse.products.settings import Settings, choice, powers
from topkast_jax.always_sparse.products.xla import padded
from topkast_jax.varying import result_like

SMALLEST = 16
_WARPS, _STAGES = powers(1, 16), range(1, 8)


@dataclasses.dataclass(frozen=True)
class SpmmSettings(Settings):
    """Settings of `spmm`.

    Attributes:
      tokens: tokens of the tile that one program accumulates in registers.
      part: largest number of its columns; a block with more is cut into parts.
      step: largest number of features in one dot.
      num_warps: warps of one program.
      num_stages: depth of the pipeline that loads what the next dots read.
    """

    tokens: int = choice(128, allowed=powers(SMALLEST, 512), tried=(64, 128, 256))
    part: int = choice(128, allowed=powers(SMALLEST, 256), tried=(64, 128))
    step: int = choice(64, allowed=powers(SMALLEST, 256), tried=(32, 64, 128))
    num_warps: int = choice(8, allowed=_WARPS, tried=(4, 8))
    num_stages: int = choice(3, allowed=_STAGES, tried=(2, 3, 4))


@dataclasses.dataclass(frozen=True)
class SddmmSettings(Settings):
    """Settings of `sddmm`.

    Attributes:
      part: largest side of the tile that one program accumulates in registers; a block with a
        longer one is cut into parts.
      step: number of tokens in one dot.
      num_warps: warps of one program.
      num_stages: depth of the pipeline that loads what the next dots read.
    """

    part: int = choice(128, allowed=powers(SMALLEST, 256), tried=(64, 128))
    step: int = choice(64, allowed=powers(SMALLEST, 256), tried=(32, 64, 128))
    num_warps: int = choice(8, allowed=_WARPS, tried=(4, 8))
    num_stages: int = choice(3, allowed=_STAGES, tried=(2, 3, 4))


SPMM, SDDMM = SpmmSettings(), SddmmSettings()


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
    settings: SpmmSettings = SPMM,
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
      settings: sizes of tiles, and how a program runs.
      interpret: run on any platform, in interpret mode.

    Returns:
      `[T, width]`, accumulated in float32, in the dtype of x; zero where no block writes.
    """
    tokens = x_TxI.shape[0]
    x_TxI = padded(x_TxI, settings.tokens)
    rows, cols = values.shape[1:][::-1] if transposed else values.shape[1:]
    part = min(cols, settings.part)
    order = jnp.argsort(target).astype(jnp.int32)
    start = jnp.searchsorted(target[order], jnp.arange(width // cols + 1)).astype(jnp.int32)
    y_TxN = pl.pallas_call(
        functools.partial(
            _spmm_kernel,
            rows=rows,
            step=min(rows, settings.step),
            parts=cols // part,
            transposed=transposed,
        ),
        grid=(width // part, x_TxI.shape[0] // settings.tokens),
        out_specs=pl.BlockSpec((settings.tokens, part), lambda j, t: (t, j)),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 5,
        out_shape=result_like((x_TxI.shape[0], width), x_TxI.dtype, x_TxI),
        compiler_params=_compiler_params(settings),
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
    step: int,
    parts: int,
    transposed: bool,
) -> None:
    panel, inside = pl.program_id(0) // parts, pl.program_id(0) % parts
    tile, part = y_ref.shape
    tokens = pl.ds(pl.program_id(1) * tile, tile)

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

    total = jnp.zeros((tile, part), jnp.float32)
    total = lax.fori_loop(start[panel], start[panel + 1], add, total)
    y_ref[...] = total.astype(y_ref.dtype)


def sddmm(
    x_TxK: jax.Array,
    dy_TxN: jax.Array,
    row: jax.Array,
    col: jax.Array,
    block: tuple[int, int],
    settings: SddmmSettings = SDDMM,
    interpret: bool = False,
) -> jax.Array:
    """Blocks of xᵀ·dy, block i at panel `row[i]` of x and panel `col[i]` of dy.

    Args:
      x_TxK: activations.
      dy_TxN: gradient of the outputs.
      row: int32 `[b]`.
      col: int32 `[b]`.
      block: rows and columns of a block.
      settings: sizes of tiles, and how a program runs.
      interpret: run on any platform, in interpret mode.

    Returns:
      float32 `[b, rows, cols]`.
    """
    step = settings.step
    x_TxK, dy_TxN = padded(x_TxK, step), padded(dy_TxN, step)
    rows, cols = (min(side, settings.part) for side in block)
    return pl.pallas_call(
        functools.partial(_sddmm_kernel, block=block, step=step),
        grid=(row.shape[0], block[0] // rows, block[1] // cols),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
        out_specs=pl.BlockSpec((None, rows, cols), lambda i, r, c: (i, r, c)),
        out_shape=result_like((row.shape[0], *block), jnp.float32, x_TxK),
        compiler_params=_compiler_params(settings),
        interpret=interpret,
        name="block_sddmm",
    )(row, col, x_TxK, dy_TxN)


def _sddmm_kernel(  # type: ignore[no-untyped-def]
    row, col, x_ref, dy_ref, dw_ref, *, block: tuple[int, int], step: int
) -> None:
    i, (rows, cols) = pl.program_id(0), dw_ref.shape
    x_at = pl.ds(row[i] * block[0] + pl.program_id(1) * rows, rows)
    dy_at = pl.ds(col[i] * block[1] + pl.program_id(2) * cols, cols)

    def add(t: jax.Array, total: jax.Array) -> jax.Array:
        tokens = pl.ds(t * step, step)
        return total + plgpu.dot(x_ref[tokens, x_at], dy_ref[tokens, dy_at], trans_a=True)

    total = jnp.zeros((rows, cols), jnp.float32)
    dw_ref[...] = lax.fori_loop(0, x_ref.shape[0] // step, add, total)


def _compiler_params(settings: SpmmSettings | SddmmSettings) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=settings.num_warps, num_stages=settings.num_stages)
