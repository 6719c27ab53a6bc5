"""Block products as Pallas TPU kernels: block indices prefetched as scalars.

`spread` keeps a tile of tokens, all its features, in VMEM and walks the blocks sorted by the output
panel they add to, so each output panel is written once, from a float32 accumulator. `outer` walks
the blocks of B, the columns of tokens it reads in tiles as long as VMEM allows: ascending indices
then load the same panel of x once for all blocks of a row.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from topkast_jax.always_sparse.varying import result_like
from topkast_jax.always_sparse.xla import padded

LANES = 128
TILE_BYTES = 4 * 2**20
"""Budget of one input tile; two are in flight, and v4 has 16 MiB of VMEM."""


def refuses(block: tuple[int, int]) -> str | None:
    """Why these kernels do not take a block, or None."""
    if block[0] % LANES or block[1] % LANES:
        return f"blocks must be multiples of {LANES}x{LANES}, found {block[0]}x{block[1]}"
    return None


def _tile(tokens: int, width: int, itemsize: int) -> int:
    """Tokens of a tile: the most that `TILE_BYTES` hold, in 16s (a bf16 register's rows)."""
    most = max(16, TILE_BYTES // (width * itemsize) // 16 * 16)
    return min(most, -(-tokens // 16) * 16, 1024)


def work_list(target: jax.Array, targets: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The order in which `spread` visits blocks: by target, every target at least once.

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


def spread(
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
      interpret: run on any platform, in TPU interpret mode.

    Returns:
      `[T, width]`, accumulated in float32, in the dtype of x; zero where no block writes.
    """
    tokens, features = x_TxI.shape
    size = values.shape[1:]
    rows, cols = size[::-1] if transposed else size
    tile = _tile(tokens, features, x_TxI.dtype.itemsize)
    x_TxI = padded(x_TxI, tile)
    panel, block, counts = work_list(target, width // cols)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(x_TxI.shape[0] // tile, panel.shape[0]),
        in_specs=[
            pl.BlockSpec((tile, features), lambda t, w, *_: (t, 0)),
            pl.BlockSpec((None, *size), lambda t, w, panel, block, *_: (block[w], 0, 0)),
        ],
        out_specs=pl.BlockSpec((tile, cols), lambda t, w, panel, *_: (t, panel[w])),
        scratch_shapes=[pltpu.VMEM((tile, cols), jnp.float32)],
    )
    y_TxN = pl.pallas_call(
        functools.partial(_spread_kernel, rows=rows, transposed=transposed),
        grid_spec=grid_spec,
        out_shape=result_like((x_TxI.shape[0], width), x_TxI.dtype, x_TxI),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(x_TxI, source.shape[0], size, x_TxI.shape[0] // tile, width),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="block_spread",
    )(panel, block, source[block], counts, x_TxI, values)
    return y_TxN[:tokens]


def _cost(
    x_TxI: jax.Array, blocks: int, size: tuple[int, ...], tiles: int, width: int
) -> pl.CostEstimate:
    """What `spread` does: the blocks are read once a tile of tokens, x and y once."""
    entries = blocks * size[0] * size[1]
    activations = x_TxI.shape[0] * (x_TxI.shape[1] + width)
    return pl.CostEstimate(
        flops=2 * entries * x_TxI.shape[0],
        bytes_accessed=(entries * tiles + activations) * x_TxI.dtype.itemsize,
        transcendentals=0,
    )


def _spread_kernel(  # type: ignore[no-untyped-def]
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


def outer(
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
      interpret: run on any platform, in TPU interpret mode.

    Returns:
      float32 `[b, rows, cols]`.
    """
    rows, cols = block
    tile = _outer_tile(x_TxK.shape[0], max(block), x_TxK.dtype.itemsize)
    x_TxK, dy_TxN = padded(x_TxK, tile), padded(dy_TxN, tile)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(row.shape[0], x_TxK.shape[0] // tile),
        in_specs=[
            pl.BlockSpec((tile, rows), lambda i, t, row, col: (t, row[i])),
            pl.BlockSpec((tile, cols), lambda i, t, row, col: (t, col[i])),
        ],
        out_specs=pl.BlockSpec((None, rows, cols), lambda i, t, row, col: (i, 0, 0)),
    )
    return pl.pallas_call(
        _outer_kernel,
        grid_spec=grid_spec,
        out_shape=result_like((row.shape[0], rows, cols), jnp.float32, x_TxK),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * row.shape[0] * rows * cols * x_TxK.shape[0],
            bytes_accessed=row.shape[0]
            * (4 * rows * cols + (rows + cols) * x_TxK.shape[0] * x_TxK.dtype.itemsize),
            transcendentals=0,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="block_outer",
    )(row, col, x_TxK, dy_TxN)


def _outer_tile(tokens: int, width: int, itemsize: int) -> int:
    """Tokens of a tile, all of them where `TILE_BYTES / 2` hold a panel: then x is loaded once."""
    most = max(16, TILE_BYTES // 2 // (width * itemsize) // 16 * 16)
    return min(most, -(-tokens // 16) * 16)


def _outer_kernel(row, col, x_ref, dy_ref, dw_ref) -> None:  # type: ignore[no-untyped-def]
    del row, col

    @pl.when(pl.program_id(1) == 0)
    def _start() -> None:
        dw_ref[...] = jnp.zeros_like(dw_ref)

    contract = (((0,), (0,)), ((), ()))
    dw_ref[...] += lax.dot_general(
        x_ref[...], dy_ref[...], contract, preferred_element_type=jnp.float32
    )
