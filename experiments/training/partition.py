"""The device mesh, and the sharding of every array on it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from experiments.errors import UserError
from topkast_jax.trees import flatten_with_names

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
Rules = Sequence[tuple[str, int | None]]  # (regular expression over a path, axis)
WHOLE: Rules = ((r".*", None),)  # Nothing goes over `tensor`.
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


def check_devices(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a validated config, over which a batch of its size is split evenly.

    Args:
        config: its `mesh` and its `batch_size`.
        devices: the devices; all devices of all hosts if None.

    Raises:
        UserError: as `make_mesh` and `check_batch_size`; or processes share a part of a batch.
    """
    mesh = make_mesh(config.mesh, devices)
    check_batch_size("config.batch_size", config.batch_size, mesh)
    check_processes(mesh)
    return mesh


def check_processes(mesh: Mesh) -> None:
    """Raises UserError unless every process has as large a part of a batch, of its own.

    Each process reads its part. If processes shared one, copies of an array would differ.
    """
    parts: dict[int, set[tuple[int, ...]]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        parts.setdefault(device.process_index, set()).add(place[:2])
    if any(len(own) * len(parts) != batch_shards(mesh) for own in parts.values()):
        shape = {axis: mesh.shape[axis] for axis in AXES}
        raise UserError(
            f"config.mesh: found {shape}, with which processes share a part of a batch; "
            f"data * fsdp must be a multiple of the {len(parts)} processes"
        )


def check_batch_size(name: str, size: int, mesh: Mesh) -> None:
    """Raises UserError unless a batch of this size is split evenly."""
    if size % batch_shards(mesh):
        shape = {axis: mesh.shape[axis] for axis in AXES}
        raise UserError(
            f"{name}: found {size}; must be a multiple of data * fsdp = {batch_shards(mesh)} "
            f"of the mesh {shape}"
        )


class Split(NamedTuple):
    """How the rules of a model split one parameter.

    Attributes:
        shape: the shape of the parameter.
        tensor: the axis over which `tensor` may go; None leaves the parameter whole there.
    """

    shape: tuple[int, ...]
    tensor: int | None


def splits(params: Tree, rules: Rules, mesh: Mesh) -> dict[str, Split]:
    """The axis of each parameter that goes over the mesh axis `tensor`.

    Args:
        params: the abstract parameters.
        rules: (regular expression over the whole path, axis), of which the first match counts.
        mesh: the devices.

    Raises:
        UserError: no rule has a parameter, or the mesh has a `tensor` axis that splits none.
    """
    found = {}
    names, leaves, _ = flatten_with_names(params)
    for name, leaf in zip(names, leaves, strict=True):
        axes = [axis for pattern, axis in rules if re.fullmatch(pattern, name)]
        if not axes:
            raise UserError(f"tensor_axes: no rule has {name!r}; the last one must have all paths")
        found[name] = Split(leaf.shape, axes[0])
    size = mesh.shape["tensor"]
    fits = [s.tensor is not None and s.shape[s.tensor] % size == 0 for s in found.values()]
    if size > 1 and not any(fits):
        raise UserError(
            f"config.mesh.tensor: found {size}; must be 1, because the model's rules split no "
            f"parameter in {size}"
        )
    return found


def spec(shape: tuple[int, ...], mesh: Mesh, split: Split | None = None) -> P:
    """The sharding of an array.

    By the rule of its parameter, its axis goes over `tensor`, if the size of `tensor` divides it.
    Of the other axes, the largest that the size of `fsdp` divides goes over `fsdp`. Without a rule,
    as for the values of an always-sparse run, `fsdp` comes first, and the largest of the other axes
    that fits goes over `tensor`. Of axes of one size it is the last.
    """
    axes: list[str | None] = [None] * len(shape)
    order = ("fsdp", "tensor") if split is None else ("tensor", "fsdp")
    for name in order:
        size = mesh.shape[name]
        allowed: Sequence[int] = range(len(shape))
        if split is not None and name == "tensor":
            allowed = () if split.tensor is None else (allowed[split.tensor],)
        fits = [i for i in allowed if axes[i] is None and shape[i] and shape[i] % size == 0]
        if size > 1 and fits:
            axes[max(fits, key=lambda i: (shape[i], i))] = name
    return P(*axes)


def shardings(shapes: Tree, mesh: Mesh, split: Mapping[str, Split] | None = None) -> Tree:
    """The sharding of each leaf of a tree, by `spec`.

    Args:
        shapes: abstract arrays: parameters, or a state that holds trees like that of them.
        mesh: the devices.
        split: by the path of a parameter; an array at that path, of the same shape, follows it.
            None goes by the shapes alone.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # The path of a moment or a set ends with that of its parameter.
        keys = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        ends = ("/".join(keys[i:]) for i in range(len(keys)))
        known = next((split[end] for end in ends if end in split), None) if split else None
        own = known if known is None or known.shape == leaf.shape else None
        return NamedSharding(mesh, spec(leaf.shape, mesh, own))

    return jax.tree_util.tree_map_with_path(place, shapes)


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
