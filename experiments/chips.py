"""Published peaks of chips.

Those of TPUs are from the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of Google Cloud's TPU
documentation. Those of GPUs are from NVIDIA's data sheets of the A100, the H100 and the H200; where
a sheet states the rate with structured sparsity, half of it is the rate without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import jax

from experiments.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peaks of one chip.

    Attributes:
        flops: bfloat16 operations per second; a multiply-add counts as two.
        hbm_bytes: the size of the main memory in bytes.
        hbm_bandwidth: bytes per second to and from the main memory.
        ici_bandwidth: bytes per second that leave the chip over all its links to other chips, which
            is half of what the documentation calls bidirectional.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float

    def seconds(self, flops: float, moved: float, sent: float) -> Mapping[str, float]:
        """The shortest time that each part of the chip needs for its work.

        Args:
            flops: bfloat16 operations.
            moved: bytes to and from the main memory.
            sent: bytes that leave the chip over its links.

        Returns:
            Seconds, by "compute", "memory" and "links".
        """
        return {
            "compute": flops / self.flops,
            "memory": moved / self.hbm_bandwidth,
            "links": sent / self.ici_bandwidth,
        }


CHIPS: Mapping[str, Chip] = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 448e9),
}


# What JAX calls the devices of these chips, and bfloat16 operations per second of one chip.
_FLOPS: Mapping[str, float] = {
    **{f"TPU {kind}": CHIPS["v5e"].flops for kind in ("v5 lite", "v5e")},
    **{f"TPU {kind}": CHIPS["v6e"].flops for kind in ("v6 lite", "v6e")},
    **{f"TPU {kind}": CHIPS["v5p"].flops for kind in ("v5", "v5p")},
    "TPU v4": CHIPS["v4"].flops,
    **{f"NVIDIA A100-{form}": 312e12 for form in ("SXM4-40GB", "SXM4-80GB", "PCIE-40GB")},
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """The bfloat16 operations per second of the device's chip; None if they are not known here."""
    return _FLOPS.get(device.device_kind)


def chip_count(devices: Iterable[jax.Device]) -> int:
    """The number of chips. Some TPUs show more than one device for each chip."""
    return len({_place(device) for device in devices})


def _place(device: jax.Device) -> tuple[int, ...]:
    if device.platform != "tpu":
        return (device.id,)
    return getattr(device, "slice_index", 0), *device.coords


def chip_of(topology: str) -> Chip:
    """The chip that a topology such as "v5e:2x2" names before the colon.

    Raises:
        UserError: the chip is not in `CHIPS`.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise UserError(
            f"--topology={topology}: no chip {name!r}; must be CHIP:SHAPE with a chip of "
            f"{', '.join(CHIPS)}, for example v5e:2x2"
        )
    return CHIPS[name]
