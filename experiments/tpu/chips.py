"""Published peaks of TPU chips.

From the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of Google Cloud's TPU documentation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from experiments.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peaks of one chip.

    Attributes:
        flops: bfloat16 operations per second.
        hbm_bytes: the size of the main memory.
        hbm_bandwidth: bytes per second to and from the main memory.
        ici_bandwidth: bytes per second that leave the chip over all its links to other chips, which
            is half of what the documentation calls bidirectional.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float

    def shared_by(self, devices: int) -> Chip:
        """The peaks of one of several devices on a chip. JAX sees two devices on each v4 chip."""
        return Chip(
            self.flops / devices,
            self.hbm_bytes // devices,
            self.hbm_bandwidth / devices,
            self.ici_bandwidth / devices,
        )

    def seconds(self, flops: float, moved: float, sent: float) -> Mapping[str, float]:
        """The shortest time that each part of the chip needs for its work."""
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


def chip_of(topology: str) -> Chip:
    """The chip that a topology names before the colon."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise UserError(
            f"--topology={topology}: no chip {name!r}; must be CHIP:SHAPE with a chip of "
            f"{', '.join(CHIPS)}, for example v5e:2x2"
        )
    return CHIPS[name]
