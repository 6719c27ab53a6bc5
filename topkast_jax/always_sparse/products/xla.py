"""Block products in plain XLA: the reference, and what a CPU runs without its compiled products.

A few blocks at a time: their panels are gathered, multiplied in one batched dot, and added in place
into the output, which lies in panels (`[panel, token, feature of the panel]`) so that a block
reads and writes contiguous memory. One batched dot of all blocks would keep a gathered copy of the
activations for each of them, and took longer on a CPU; so did one dot a block of 64 or 128.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from topkast_jax.always_sparse.products.settings import Settings, choice, powers
from topkast_jax.varying import varying_like


@dataclasses.dataclass(frozen=True)
class SpmmSettings(Settings):
    """Settings of `spmm`.

    Attributes:
      at_once: blocks in one batched dot; the default was measured on two cores.
    """

    at_once: int = choice(8, allowed=range(1, 257), tried=powers(1, 64))


@dataclasses.dataclass(frozen=True)
class SddmmSettings(Settings):
    """Settings of `sddmm`.

    Attributes:
      at_once: blocks in one batched dot; the default was measured on two cores.
    """

    at_once: int = choice(4, allowed=range(1, 257), tried=powers(1, 64))


SPMM, SDDMM = SpmmSettings(), SddmmSettings()


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
      settings: how many blocks at once.

    Returns:
      `[T, width]`, accumulated in float32 or wider, in the dtype of x; zero where no block writes.
    """
    rows, cols = values.shape[1:][::-1] if transposed else values.shape[1:]
    sums = sums_in(x_TxI.dtype)
    contract = (((2,), (2 if transposed else 1,)), ((0,), (0,)))
    x_PxTxR = panels(x_TxI, rows)

    def add_blocks(start: jax.Array | int, count: int, y: jax.Array) -> jax.Array:
        reads, writes, blocks = (
            lax.dynamic_slice_in_dim(a, start, count) for a in (source, target, values)
        )
        products = lax.dot_general(x_PxTxR[reads], blocks, contract, preferred_element_type=sums)
        for i in range(count):
            y = y.at[writes[i]].add(products[i])
        return y

    # The loop writes in place. A constant zero, shared with the other products of a step, would be
    # copied for each of them; a zero that the compiler cannot see through is not.
    zero = jnp.minimum(source[0], 0).astype(sums)
    y_PxTxC = jnp.full((width // cols, x_TxI.shape[0], cols), zero)
    (y_PxTxC,) = varying_like((y_PxTxC,), x_TxI)
    most = settings.at_once
    whole, rest = divmod(source.shape[0], most)
    if whole:
        y_PxTxC = lax.fori_loop(0, whole, lambda i, y: add_blocks(i * most, most, y), y_PxTxC)
    if rest:
        y_PxTxC = add_blocks(whole * most, rest, y_PxTxC)
    return y_PxTxC.swapaxes(0, 1).reshape(x_TxI.shape[0], width).astype(x_TxI.dtype)


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
      settings: how many blocks at once.

    Returns:
      `[b, rows, cols]`, float32 or wider.
    """
    rows, cols = block
    # Transposed once, each dot is a plain [rows, T] @ [T, cols], the fastest form on a CPU. The
    # narrower of the two is the cheaper one to transpose.
    if x_TxK.shape[1] > dy_TxN.shape[1]:
        return sddmm(dy_TxN, x_TxK, col, row, (cols, rows), settings).swapaxes(1, 2)
    sums = sums_in(x_TxK.dtype)
    x_PxRxT = x_TxK.T.reshape(x_TxK.shape[1] // rows, rows, x_TxK.shape[0])
    dy_PxTxC = panels(dy_TxN, cols)

    def one_block(where: tuple[jax.Array, jax.Array]) -> jax.Array:
        r, c = where
        return jnp.matmul(x_PxRxT[r], dy_PxTxC[c], preferred_element_type=sums)

    return lax.map(one_block, (row, col), batch_size=settings.at_once)


def panels(x_TxI: jax.Array, size: int) -> jax.Array:
    """The features cut into panels: `[I / size, T, size]`."""
    tokens, features = x_TxI.shape
    return x_TxI.reshape(tokens, features // size, size).swapaxes(0, 1)


def padded(x_TxI: jax.Array, tile: int) -> jax.Array:
    """With zeros after the last token, up to a multiple of `tile` tokens."""
    return jnp.pad(x_TxI, ((0, -x_TxI.shape[0] % tile), (0, 0)))


def sums_in(dtype: jnp.dtype) -> jnp.dtype:
    """The type in which products of this type are summed: float32, or the type itself if wider."""
    return jnp.promote_types(dtype, jnp.float32)
