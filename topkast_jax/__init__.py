"""Top-KAST: Top-K Always Sparse Training, for JAX and optax."""

import importlib.metadata

from topkast_jax import errors, methods, statistics, testing
from topkast_jax.description import describe
from topkast_jax.errors import SparsityError
from topkast_jax.initialization import scale_to_fan_in
from topkast_jax.method import Counts, Layer, Leaf, Method, Sets
from topkast_jax.methods.static import static_random
from topkast_jax.patterns import Block, Channel, FanIn, NOfM, Pattern, Unstructured
from topkast_jax.rules import Dense, Sparse
from topkast_jax.selection import counts_of_global_top_k, keep_count, top_k_masks
from topkast_jax.sets import SparsifyState, forward_params, keep_masks, value_and_grad
from topkast_jax.sparsify import sparsify
from topkast_jax.top_kast import top_kast

try:
    __version__ = importlib.metadata.version("topkast-jax")
except importlib.metadata.PackageNotFoundError:  # found on the PYTHONPATH alone
    __version__ = "0+source"

__all__ = [
    "Block",
    "Channel",
    "Counts",
    "Dense",
    "FanIn",
    "Layer",
    "Leaf",
    "Method",
    "NOfM",
    "Pattern",
    "Sets",
    "Sparse",
    "SparsifyState",
    "SparsityError",
    "Unstructured",
    "__version__",
    "counts_of_global_top_k",
    "describe",
    "errors",
    "forward_params",
    "keep_count",
    "keep_masks",
    "methods",
    "scale_to_fan_in",
    "sparsify",
    "static_random",
    "statistics",
    "testing",
    "top_k_masks",
    "top_kast",
    "value_and_grad",
]
