"""Top-KAST: Top-K Always Sparse Training, for JAX and optax."""

from topkast_jax import errors, methods, statistics
from topkast_jax.errors import SparsityError
from topkast_jax.methods.static import static_random
from topkast_jax.patterns import Block, Pattern, Unstructured
from topkast_jax.rules import Dense, Sparse
from topkast_jax.sparsify import (
    Method,
    Sets,
    SparsifyState,
    forward_params,
    keep_masks,
    sparsify,
)
from topkast_jax.top_kast import top_kast

__all__ = [
    "Block",
    "Dense",
    "Method",
    "Pattern",
    "Sets",
    "Sparse",
    "SparsifyState",
    "SparsityError",
    "Unstructured",
    "errors",
    "forward_params",
    "keep_masks",
    "methods",
    "sparsify",
    "static_random",
    "statistics",
    "top_kast",
]
