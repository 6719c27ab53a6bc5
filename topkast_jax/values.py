"""Which values a user gave, told apart before anything is computed from them."""

from __future__ import annotations

import numbers
from typing import Any

import jax.numpy as jnp


def is_number(value: Any) -> bool:
    """Whether a value is one real number: Python's, NumPy's or an array without axes."""
    if isinstance(value, numbers.Real):
        return not isinstance(value, bool)
    dtype = getattr(value, "dtype", None)
    if dtype is None or getattr(value, "ndim", None) != 0:
        return False
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def is_integer(value: Any) -> bool:
    """Whether a value is one integer: Python's, NumPy's or an array without axes, also traced."""
    if isinstance(value, numbers.Integral):
        return not isinstance(value, bool)
    return is_number(value) and jnp.issubdtype(jnp.result_type(value), jnp.integer)


def is_whole(value: Any, least: int, most: int = 2**31 - 1) -> bool:
    """Whether a value, which is not traced, is one integer between two bounds."""
    # Through Python's int: an array of int32 does not compare with 2**31.
    return is_integer(value) and least <= int(value) <= most
