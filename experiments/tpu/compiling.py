"""Compiles a run's training step for a TPU topology, without a TPU."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding

from experiments.chips import Chip, chip_of
from experiments.errors import UserError
from experiments.training.partition import BATCH, make_mesh
from experiments.training.program import Program

_TOO_LARGE = (
    r"Used (?P<needed>[\d.]+[KMGT]?) of (?P<available>[\d.]+[KMGT]?) hbm",
    r"required .*?\((?P<needed>[\d.]+[KMGT]?)\) exceeds available HBM "
    r"\((?P<available>[\d.]+[KMGT]?)\)",
)


class TooLarge(Exception):
    """A program does not fit into the memory of a device.

    Attributes:
        needed: the bytes that the program needs; None if the compiler does not say so.
        available: the bytes that the device has; None if the compiler does not say so.
    """

    def __init__(self, needed: int | None, available: int | None):
        super().__init__(f"needs {needed} bytes of {available}")
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices to compile for, each a chip, and the peaks of one."""

    devices: Sequence[jax.Device]
    peaks: Chip


def target(topology: str, count: int | None = None) -> Target:
    """The first `count` devices of a topology such as `v5e:2x2`; None takes all of them."""
    chip = chip_of(topology)
    # Cloud TPU runs the two cores of a v4 chip as one device; the compiler's default does not.
    settings = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **settings
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={topology}: {error}; v4:2x2x1, v5e:2x2, v5e:16x16, v5p:2x2x1 and v6e:2x2 "
            "are good ones, and --devices=1 takes one device"
        ) from error
    if count is not None and count > len(devices):
        raise UserError(f"--devices={count}: {topology} has {len(devices)}")
    used = count or len(devices)
    if not _form_a_mesh(devices[:used]):
        fitting = [n for n in range(1, len(devices) + 1) if _form_a_mesh(devices[:n])]
        raise UserError(
            f"--devices={used}: the first {used} of {topology} form no mesh; must be one of "
            f"{', '.join(map(str, fitting))}"
        )
    return Target(devices[:count], chip)


def _form_a_mesh(devices: Sequence[jax.Device]) -> bool:
    try:
        make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, devices)
    except UserError:
        return False
    return True


def lower(program: Program) -> jax.stages.Lowered:
    """Lowers the training step for an abstract state and an abstract batch."""
    sharding = NamedSharding(program.mesh, BATCH)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        program.task.example_batch(),
    )
    return program.step.lower(program.representation.abstract(), batch)


def compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a lowered step; raises TooLarge if the memory of the device does not suffice."""
    try:
        with warnings.catch_warnings():
            # JAX cannot read programs for absent devices back from its persistent cache.
            warnings.filterwarnings("ignore", message=".*persistent compilation cache")
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # A kernel that needs too much of a core's own memory (VMEM) has the same error code.
        if "RESOURCE_EXHAUSTED" not in str(error) or not re.search(r"(?i)\bhbm\b", str(error)):
            raise
        raise _too_large(str(error)) from error


def _too_large(message: str) -> TooLarge:
    for pattern in _TOO_LARGE:
        if found := re.search(pattern, message):
            return TooLarge(_bytes(found["needed"]), _bytes(found["available"]))
    return TooLarge(None, None)


def _bytes(text: str) -> int:
    unit = "KMGT".find(text[-1]) + 1
    return round(float(text[:-1] if unit else text) * 1024**unit)


def memory(compiled: jax.stages.Compiled) -> dict[str, dict[str, int]]:
    """The bytes that a program needs in the memory of one device and of its host, by purpose.

    `alias` is the part of the output that reuses the memory of arguments. `total` is the least
    amount of memory with which the program runs.
    """
    found: Any = compiled.memory_analysis()
    result = {}
    for where, prefix in (("device_bytes", ""), ("host_bytes", "host_")):
        sizes = {
            name: int(getattr(found, f"{prefix}{field}_size_in_bytes"))
            for name, field in (
                ("arguments", "argument"),
                ("temporaries", "temp"),
                ("output", "output"),
                ("alias", "alias"),
                ("code", "generated_code"),
            )
        }
        total = sizes["arguments"] + sizes["temporaries"] + sizes["output"] - sizes["alias"]
        result[where] = sizes | {"total": total}
    return result
