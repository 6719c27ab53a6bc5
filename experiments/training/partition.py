"""The device mesh, and the sharding of every array on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
Tree = Any


def all_devices() -> list[jax.Device]:
    """All devices of all hosts; raises UserError if JAX_PLATFORMS names devices that are absent."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 without CUDA asserts.
        found = jax.config.jax_platforms  # type: ignore[attr-defined, unused-ignore]
        raise UserError(
            f"JAX_PLATFORMS={found!r}: no such devices here; must name some that there are, or be "
            f"unset ({str(error) or 'JAX says no more'})"
        ) from error


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over some devices.

    Args:
        sizes: the size of each of `AXES`; one of them may be -1 and takes the remaining devices.
        devices: the devices; all devices of all hosts if None.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or do not fit the topology
            of the devices.
    """
    shape = [sizes[axis] for axis in AXES]
    devices = all_devices() if devices is None else devices
    known = math.prod(size for size in shape if size != -1)
    full = [len(devices) // known if size == -1 else size for size in shape]
    if math.prod(full) != len(devices):
        found = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise UserError(
            f"config.mesh: found {found}; must multiply to the {len(devices)} devices there are"
        )
    try:
        return jax.make_mesh(full, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    except (AssertionError, NotImplementedError) as error:  # JAX raises these for TPUs.
        raise UserError(
            f"config.mesh: found {dict(zip(AXES, full, strict=True))}; must fit the topology of "
            f"the {len(devices)} devices: {str(error)[:200]}"
        ) from error


def batch_shards(mesh: Mesh) -> int:
    """The number of devices over which a batch is split."""
    return int(mesh.shape["data"] * mesh.shape["fsdp"])


def check_batch_size(name: str, size: int, mesh: Mesh) -> None:
    """Raises UserError unless a batch of this size is split evenly."""
    if size % batch_shards(mesh):
        shape = {axis: mesh.shape[axis] for axis in AXES}
        raise UserError(
            f"{name}: found {size}; must be a multiple of data * fsdp = {batch_shards(mesh)} "
            f"of the mesh {shape}"
        )


def spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """The sharding rule of parameters and of all arrays with their shapes; it reads only the shape.

    The largest axis that the size of `fsdp` divides is sharded over `fsdp`, and the largest of the
    others that the size of `tensor` divides over `tensor`. Of axes of one size it is the last.
    """
    axes: list[str | None] = [None] * len(shape)
    for name in ("fsdp", "tensor"):
        size = mesh.shape[name]
        fits = [i for i, n in enumerate(shape) if axes[i] is None and n and n % size == 0]
        if size > 1 and fits:
            axes[max(fits, key=lambda i: (shape[i], i))] = name
    return P(*axes)


def shardings(shapes: Tree, mesh: Mesh) -> Tree:
    """The sharding of each leaf of a tree, by `spec`."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf.shape, mesh)), shapes)


def from_specs(specs: Tree, mesh: Mesh) -> Tree:
    """The shardings of a tree of PartitionSpecs."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, P())


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays, split over the devices, from this host's part of a batch."""
    sharding = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
