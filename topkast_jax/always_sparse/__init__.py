"""Always-sparse training: the device holds only the backward set of each sparse leaf.

A sparse leaf is a `CompactKernel` on the device. Layers call `matmul`, which takes a dense kernel
or a compact one, and `AlwaysSparse` runs a sparsity method on such kernels.
"""

from topkast_jax.always_sparse.export import FORMS, export, to_bcoo, to_bsr
from topkast_jax.always_sparse.fan_in import FanInKernel, by_output
from topkast_jax.always_sparse.host import Reservoir
from topkast_jax.always_sparse.kernel import (
    CompactKernel,
    dense_tile,
    from_masks,
    is_compact,
    to_dense,
    to_masks,
    values_of,
    with_tile,
    with_values,
)
from topkast_jax.always_sparse.lookup import lookup
from topkast_jax.always_sparse.products import BACKENDS, matmul, options
from topkast_jax.always_sparse.training import AlwaysSparse
from topkast_jax.host_memory import keep_freed

__all__ = [
    "BACKENDS",
    "FORMS",
    "AlwaysSparse",
    "CompactKernel",
    "FanInKernel",
    "Reservoir",
    "by_output",
    "dense_tile",
    "export",
    "from_masks",
    "is_compact",
    "keep_freed",
    "lookup",
    "matmul",
    "options",
    "to_bcoo",
    "to_bsr",
    "to_dense",
    "to_masks",
    "values_of",
    "with_tile",
    "with_values",
]
