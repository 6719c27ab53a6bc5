"""The matrix product of dense and compact kernels: `api` is public, each backend has one file."""

from topkast_jax.always_sparse.products.api import (
    BACKENDS,
    INTERPRETED,
    KERNELS,
    matmul,
    options,
)

__all__ = ["BACKENDS", "INTERPRETED", "KERNELS", "matmul", "options"]
