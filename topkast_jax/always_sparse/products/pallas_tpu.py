"""Block products as Pallas TPU kernels: block indices prefetched as scalars.

`spmm` keeps a tile of tokens, all its features, in VMEM and walks the blocks sorted by the output
panel they add to, so each output panel is written once, from a float32 accumulator. `sddmm` walks
the blocks of B, the columns of tokens it reads in tiles as long as VMEM allows: ascending indices
then load the same panel of x once for all blocks of a row. Larger blocks are cut into parts, each a
block of its own to the kernels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from topkast_jax.always_sparse.products.settings import Settings, choice, powers
from topkast_jax.always_sparse.products.xla import padded
from topkast_jax.varying import result_like

LANES = 128
VMEM_BYTES = 15 * 2**20
"""Budget of all that a kernel holds at once; the compiler gives it 16 MiB."""
_PARTS, _BYTES = range(LANES, 1025, LANES), range(2**10, VMEM_BYTES + 1)


@dataclasses.dataclass(frozen=True)
class SpmmSettings(Settings):
    """Settings of `spmm`. What VMEM does not hold is made smaller.

    Attributes:
      tokens: largest number of tokens in a tile.
      tile_bytes: largest size of a tile of x; two are in flight.
      part: largest side of what the kernel takes of a block at once.
    """

    tokens: int = choice(1024, allowed=range(16, 8193, 16), tried=powers(256, 2048))
    tile_bytes: int = choice(2**22, allowed=_BYTES, tried=powers(2**20, 2**23))
    part: int = choice(512, allowed=_PARTS, tried=powers(128, 1024))


@dataclasses.dataclass(frozen=True)
class SddmmSettings(Settings):
    """Settings of `sddmm`. What VMEM does not hold is made smaller.

    Attributes:
      tile_bytes: largest size of a tile of x or of dy; two of each are in flight.
      part: largest side of what the kernel takes of a block at once.
    """

    tile_bytes: int = choice(2**21, allowed=_BYTES, tried=powers(2**19, 2**22))
    part: int = choice(512, allowed=_PARTS, tried=powers(128, 1024))


SPMM, SDDMM = SpmmSettings(), SddmmSettings()


def refuses(block: tuple[int, int]) -> str | None:
    """Why these kernels do not take a block, or None."""
    if block[0] % LANES or block[1] % LANES:
        return f"blocks must be multiples of {LANES}x{LANES}, found {block[0]}x{block[1]}"
    return None


def _part(block: tuple[int, ...], most: int) -> tuple[int, int]:
    """The largest parts of at most `most` into which a block is cut evenly."""
    rows, cols = (
        max(n for n in range(LANES, min(side, most) + 1, LANES) if side % n == 0) for side in block
    )
    return rows, cols


def _cut(row: jax.Array, col: jax.Array, down: int, across: int) -> tuple[jax.Array, jax.Array]:
    """Panels of the parts of each block, row-major: a block has `down` x `across`."""
    part = jnp.arange(down * across, dtype=jnp.int32)[None]
    rows = row[:, None] * down + part // across
    cols = col[:, None] * across + part % across
    return rows.reshape(-1), cols.reshape(-1)


def _place(part: jax.Array, down: int, across: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where a part lies: its block, and which of the block's rows and columns of parts."""
    # The compiler takes places in int32 alone; under jax_enable_x64 Python integers are int64.
    part, of_block, of_row = jnp.int32(part), jnp.int32(down * across), jnp.int32(across)
    inside = lax.rem(part, of_block)
    return lax.div(part, of_block), lax.div(inside, of_row), lax.rem(inside, of_row)


def _tile(tokens: int, most: int) -> int:
    """Tokens of a tile, in 16s (a bf16 register's rows): tiles of at most so many, all alike.

    Up to twice as many as need be where they hold the tokens exactly: to be padded, x is copied.
    """
    least = -(-tokens // max(16, most // 16 * 16))
    tiles = next((n for n in range(least, 2 * least + 1) if tokens % (16 * n) == 0), least)
    return -(-tokens // (16 * tiles)) * 16


def work_list(target: jax.Array, targets: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The order in which `spmm` visits blocks: by target, every target at least once.

    Args:
      target: int32 `[a]`, output panel of each block.
      targets: number of output panels.

    Returns:
      Three int32 `[a + targets]`: the output panel of each visit, ascending; the block; and
      whether the block counts. A visit that does not count names the block before it, so that
      nothing is fetched for it: it is there to write a panel that no block feeds, or pads the end.
    """
    a = target.shape[0]
    panel = jnp.arange(targets, dtype=jnp.int32)
    fed = jnp.zeros(targets, bool).at[target].set(True)
    keys = jnp.concatenate([target, jnp.where(fed, targets, panel)])
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    counts = order < a
    nearest = lax.cummax(jnp.where(counts, jnp.arange(a + targets), -1))
    block = order[jnp.maximum(nearest, jnp.argmax(counts))]
    return jnp.minimum(keys[order], targets - 1), block, counts.astype(jnp.int32)


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
      settings: sizes of tiles.
      interpret: run on any platform, in TPU interpret mode.

    Returns:
      `[T, width]`, accumulated in float32, in the dtype of x; zero where no block writes.
    """
    tokens, features = x_TxI.shape
    part = _part(values.shape[1:], settings.part)
    down, across = values.shape[1] // part[0], values.shape[2] // part[1]
    if transposed:
        target, source = _cut(target, source, down, across)
    else:
        source, target = _cut(source, target, down, across)
    rows, cols = part[::-1] if transposed else part
    tile = _spmm_tile(settings, tokens, features, rows, cols, x_TxI.dtype.itemsize)
    x_TxI = padded(x_TxI, tile)
    panel, block, counts = work_list(target, width // cols)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(x_TxI.shape[0] // tile, panel.shape[0]),
        in_specs=[
            pl.BlockSpec((tile, features), lambda t, w, *_: (t, jnp.int32(0))),
            pl.BlockSpec(
                (None, *part), lambda t, w, panel, block, *_: _place(block[w], down, across)
            ),
        ],
        out_specs=pl.BlockSpec((tile, cols), lambda t, w, panel, *_: (t, panel[w])),
        scratch_shapes=[pltpu.VMEM((tile, cols), jnp.float32)],
    )
    y_TxN = pl.pallas_call(
        functools.partial(_spmm_kernel, rows=rows, transposed=transposed),
        grid_spec=grid_spec,
        out_shape=result_like((x_TxI.shape[0], width), x_TxI.dtype, x_TxI),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        **_spmm_cost(x_TxI, panel.shape[0], source.shape[0], part, tile, width),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="block_spmm",
    )(panel, block, source[block], counts, x_TxI, values)
    return y_TxN[:tokens]


def _spmm_tile(
    settings: SpmmSettings, tokens: int, features: int, rows: int, cols: int, itemsize: int
) -> int:
    """x, blocks and y are double-buffered, the float32 sum is not."""
    each = 2 * (features + cols) * itemsize + 4 * cols
    rest = 2 * rows * cols * itemsize
    held = settings.tile_bytes // (features * itemsize), (VMEM_BYTES - rest) // each
    return _tile(tokens, min(settings.tokens, *held))


def _spmm_cost(
    x_TxI: jax.Array, visits: int, blocks: int, size: tuple[int, int], tile: int, width: int
) -> dict[str, Any]:
    """What `spmm` does: blocks are read once a tile of tokens, x, y and the work list once."""
    tokens, features = x_TxI.shape
    reads = blocks if blocks == 1 else blocks * (tokens // tile)  # a single one stays
    entries = tokens * features, reads * size[0] * size[1], tokens * width
    moved = [4 * visits] * 4 + [n * x_TxI.dtype.itemsize for n in entries]
    return _cost(2 * blocks * size[0] * size[1] * tokens, sum(moved), moved, moved)


def _cost(flops: int, moved: int, least: Sequence[int], most: Sequence[int]) -> dict[str, Any]:
    """A kernel's costs, for `pallas_call`.

    Args:
      flops: of its products.
      moved: bytes in and out of main memory, at the least.
      least: of these, those of each operand and of the result. What the compiler keeps on the chip
        does not move, and it alone knows which arrays those are.
      most: the same where the indices are the worst.
    """
    estimate = pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)
    each = {"least_bytes": least, "most_bytes": most}
    metadata = {name: " ".join(map(str, sizes)) for name, sizes in each.items()}
    return {"cost_estimate": estimate, "metadata": metadata}


def _spmm_kernel(  # type: ignore[no-untyped-def]
    panel, block, source, counts, x_ref, values_ref, y_ref, sum_ref, *, rows: int, transposed: bool
) -> None:
    del block
    w, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when((w == 0) | (panel[w] != panel[jnp.maximum(w - 1, 0)]))
    def _start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(counts[w] == 1)
    def _add() -> None:
        at = pl.multiple_of(source[w] * rows, LANES)
        contract = (((1,), (1 if transposed else 0,)), ((), ()))
        sum_ref[...] += lax.dot_general(
            x_ref[:, pl.ds(at, rows)],
            values_ref[...],
            contract,
            preferred_element_type=jnp.float32,
        )

    @pl.when((w == last) | (panel[w] != panel[jnp.minimum(w + 1, last)]))
    def _write() -> None:
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


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
      settings: sizes of tiles.
      interpret: run on any platform, in TPU interpret mode.

    Returns:
      float32 `[b, rows, cols]`.
    """
    rows, cols = _part(block, settings.part)
    down, across = block[0] // rows, block[1] // cols
    blocks = row.shape[0]
    row, col = _cut(row, col, down, across)
    tile = _sddmm_tile(settings, x_TxK.shape[0], rows, cols, x_TxK.dtype.itemsize)
    x_TxK, dy_TxN = padded(x_TxK, tile), padded(dy_TxN, tile)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(row.shape[0], x_TxK.shape[0] // tile),
        in_specs=[
            pl.BlockSpec((tile, rows), lambda i, t, row, col: (t, row[i])),
            pl.BlockSpec((tile, cols), lambda i, t, row, col: (t, col[i])),
        ],
        out_specs=pl.BlockSpec((None, rows, cols), lambda i, t, row, col: _place(i, down, across)),
    )
    return pl.pallas_call(
        _sddmm_kernel,
        grid_spec=grid_spec,
        out_shape=result_like((blocks, *block), jnp.float32, x_TxK),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        **_sddmm_cost(x_TxK, dy_TxN, row.shape[0], (rows, cols), tile),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="block_sddmm",
    )(row, col, x_TxK, dy_TxN)


def _sddmm_tile(settings: SddmmSettings, tokens: int, rows: int, cols: int, itemsize: int) -> int:
    """All tokens where `tile_bytes` hold a panel: then x is loaded once.

    The panels and the float32 output are double-buffered, x's transpose and the product are not.
    """
    each = (3 * rows + 2 * cols) * itemsize
    rest = 3 * 4 * rows * cols
    panel = max(rows, cols) * itemsize
    return _tile(tokens, min(settings.tile_bytes // panel, (VMEM_BYTES - rest) // each))


def _sddmm_cost(
    x_TxK: jax.Array, dy_TxN: jax.Array, blocks: int, size: tuple[int, int], tile: int
) -> dict[str, Any]:
    """What `sddmm` does; how often a panel is read is known only where it runs.

    It is once for each block, but where one tile holds all tokens it stays for the next block of
    the same row or column: no two blocks share both, and none are more than a row or column has.
    """
    tokens, (rows, cols) = x_TxK.shape[0], size
    row_bytes, col_bytes = (tokens * side * x_TxK.dtype.itemsize for side in size)
    x_reads = dy_reads = blocks
    if tile == tokens:
        x_reads = -(-blocks // (dy_TxN.shape[1] // cols))
        dy_reads = -(-blocks // (x_TxK.shape[1] // rows))
    more = max(0, blocks + 1 - x_reads - dy_reads) * min(row_bytes, col_bytes)
    places, result = [4 * blocks] * 2, 4 * blocks * rows * cols
    least = [*places, x_reads * row_bytes, dy_reads * col_bytes, result]
    most = [*places, blocks * row_bytes, blocks * col_bytes, result]
    return _cost(2 * blocks * rows * cols * tokens, sum(least) + more, least, most)


def _sddmm_kernel(row, col, x_ref, dy_ref, dw_ref) -> None:  # type: ignore[no-untyped-def]
    del row, col

    @pl.when(pl.program_id(1) == 0)
    def _start() -> None:
        dw_ref[...] = jnp.zeros_like(dw_ref)

    contract = (((0,), (0,)), ((), ()))
    dw_ref[...] += lax.dot_general(
        x_ref[...], dy_ref[...], contract, preferred_element_type=jnp.float32
    )
