"""The memory of a compiled program and of its device."""

from __future__ import annotations

from typing import Any

import jax

from experiments.tpu.compiling import memory as sizes_of


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """What a program needs, and the most that its process has had.

    Returns:
        "program_bytes", of its arguments, results and temporaries by the compiler's account; and
        "device_peak_bytes" where the device counts: the peak since the process began, so that it
        belongs to a program only if it is larger than those before it.
    """
    found: dict[str, int] = {"program_bytes": sizes_of(compiled)["device_bytes"]["total"]}
    stats: Any = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        found["device_peak_bytes"] = int(stats["peak_bytes_in_use"])
    return found
