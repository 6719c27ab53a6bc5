"""What JAX knows of an array's placement inside a traced function: varying axes, explicit axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.typing import DTypeLike


def varying_like(values: Any, x: jax.Array) -> Any:
    """`values`, marked as varying over the axes x varies over; a no-op outside `shard_map`.

    The transpose of the mark is the sum over those axes.
    """

    def mark(value: jax.Array) -> jax.Array:
        missing = tuple(jax.typeof(x).mat.varying - jax.typeof(value).mat.varying)
        return lax.pcast(value, missing, to="varying") if missing else value

    return jax.tree.map(mark, values)


def result_like(shape: tuple[int, ...], dtype: DTypeLike, x: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result that varies over the axes x varies over."""
    typed, whole = jax.typeof(x), None
    if typed.mat.varying:  # `ffi_call` knows the axes by the mesh of the sharding.
        whole = jax.sharding.NamedSharding(typed.sharding.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole, manual_axis_type=typed.mat)


def explicit_sharding(x: Any) -> jax.sharding.NamedSharding | None:
    """The sharding of an array whose mesh has explicit axes, which its type then carries."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return sharding if explicit else None


def let_compiler_partition(
    function: Callable[..., Any], shardings: Callable[[Any], Any], mesh: Any
) -> Callable[..., Any]:
    """`function` with the explicit axes of a mesh left to the compiler inside it.

    Args:
      function: what it computes may cut, reshape and map sharded axes.
      shardings: from the abstract results, how each of them is to be sharded.
      mesh: abstract mesh of the arguments.

    Returns:
      A function of the same arguments.
    """
    explicit = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Explicit
    )

    def partitioned(*args: Any) -> Any:
        plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        results = jax.eval_shape(function, *plain)
        automatic = jax.sharding.auto_axes(function, axes=explicit, out_sharding=shardings(results))
        with jax.sharding.use_abstract_mesh(mesh):
            return automatic(*args)

    return partitioned
