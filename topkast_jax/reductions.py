"""Reductions over all entries of a leaf, for several probes at once, on each kind of device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from topkast_jax.ranking import row_major

# of(entries, their row-major indices, *parameters), elementwise
Of = Callable[..., jax.Array]
_Parameters = tuple[jax.Array, ...]
_WHOLE: dict[Callable, Callable] = {lax.add: lax.reduce_sum, lax.min: lax.reduce_min}
_FOLD = 32  # entries that _reduce_flat combines into one


def _lone_cpu() -> bool:
    """Whether what runs on a CPU has no other to share a leaf with."""
    try:
        return jax.device_count("cpu") == 1
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return False


def few_probes() -> bool:
    """Whether a probe costs as much as a pass, as in _reduce_at_once."""
    return jax.default_backend() == "cpu" and not _lone_cpu()


def _cells(of: Of, entries: jax.Array, index: jax.Array, parameters: _Parameters) -> jax.Array:
    """of() for every entry, and along trailing axes for every element of the parameters."""
    rank = entries.ndim + max((p.ndim for p in parameters), default=0)
    last = range(entries.ndim, rank)
    rows = (lax.expand_dims(p, range(rank - p.ndim)) for p in parameters)
    return of(lax.expand_dims(entries, last), lax.expand_dims(index, last), *rows)


def _reduce_by_element(
    x: jax.Array, origin: jax.Array, parameters: _Parameters, of: Of, combine: Callable
) -> jax.Array:
    """One reduction for each element of the parameters: accelerators fuse them into one pass.

    One pass for each row, if they have rows: compilers take a time of the order of the square of
    the reductions that they fuse.
    """
    shape = jnp.broadcast_shapes(*(p.shape for p in parameters))
    table = tuple(jnp.broadcast_to(p, shape) for p in parameters)
    if len(shape) > 1:

        def one_row(row: _Parameters) -> jax.Array:
            # The barrier as in reduce_entries.
            here, start, row = lax.optimization_barrier((x, origin, row))
            return _reduce_by_element(here, start, row, of, combine)

        return lax.map(one_row, table)
    index, axes = row_major(x.shape, origin), tuple(range(x.ndim))
    cells = [of(x, index, *(p[i] for p in table)) for i in range(math.prod(shape))]
    return jnp.stack([_WHOLE[combine](cell, axes=axes) for cell in cells]).reshape(shape)


def _reduce_at_once(
    x: jax.Array, origin: jax.Array, parameters: _Parameters, of: Of, combine: Callable
) -> jax.Array:
    """One reduction for all: quick to compile, but a CPU writes out every cell."""
    cells = _cells(of, x, row_major(x.shape, origin), parameters)
    return _WHOLE[combine](cells, axes=tuple(range(x.ndim)))


def _reduce_flat(
    x: jax.Array, origin: jax.Array, parameters: _Parameters, of: Of, combine: Callable
) -> jax.Array:
    """Reduces in elementwise steps: XLA's CPU backend vectorises those, but no reduction."""
    flat = x.reshape(-1)
    even = flat.size // _FOLD * _FOLD
    blocks = flat[:even].reshape(-1, _FOLD)
    first = origin + _FOLD * lax.iota(jnp.int32, blocks.shape[0])
    part = functools.reduce(
        combine, (_cells(of, blocks[:, i], first + i, parameters) for i in range(_FOLD))
    )
    rest = origin + even + lax.iota(jnp.int32, flat.size - even)
    rests = [_cells(of, flat[even:], rest, parameters)]
    while part.shape[0] >= _FOLD:
        even = part.shape[0] // _FOLD * _FOLD
        rests.append(part[even:])
        blocks = part[:even].reshape(-1, _FOLD, *part.shape[1:])
        part = functools.reduce(combine, (blocks[:, i] for i in range(_FOLD)))
    return _WHOLE[combine](jnp.concatenate([part, *rests]), axes=(0,))


def reduce_entries(x: jax.Array, *parameters: jax.Array, of: Of, combine: Callable) -> jax.Array:
    """Combines of(entry, index, *parameters) over all entries, for each element of parameters.

    Only a lone CPU reshapes the leaf: among several devices it may be sharded along any axis, and
    then the other ways leave each shard where it is and all-reduce scalars.
    """
    # The barrier keeps a loop from storing what is the same in every pass, as large as the leaf.
    x, origin, parameters = lax.optimization_barrier((x, np.int32(0), parameters))
    lone = _lone_cpu() and x.size >= _FOLD**3
    return lax.platform_dependent(
        x,
        origin,
        parameters,
        cpu=functools.partial(_reduce_flat if lone else _reduce_at_once, of=of, combine=combine),
        default=functools.partial(_reduce_by_element, of=of, combine=combine),
    )
