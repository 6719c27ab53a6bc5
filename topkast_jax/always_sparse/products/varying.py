"""Mesh axes over which a value differs, inside `jax.shard_map`: the one place that asks JAX."""

from __future__ import annotations

import jax
from jax import lax
from jax.typing import DTypeLike


def varying_like(values: tuple[jax.Array, ...], x: jax.Array) -> tuple[jax.Array, ...]:
    """`values`, marked as varying over the axes x varies over; a no-op outside `shard_map`.

    The transpose of the mark is the sum over those axes.
    """
    missing = tuple(jax.typeof(x).mat.varying - jax.typeof(values[0]).mat.varying)
    return lax.pcast(values, missing, to="varying") if missing else values


def result_like(shape: tuple[int, ...], dtype: DTypeLike, x: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result that varies over the axes x varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).mat)
