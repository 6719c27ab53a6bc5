"""The CPU of this machine, as Linux tells it."""

from __future__ import annotations

from pathlib import Path

_VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}


def processor() -> str:
    """The name of the CPU and its widest vectors, such as `AMD EPYC, AVX2`."""
    lines = (line.partition(":") for line in _cpuinfo().splitlines())
    names = (value.strip() for key, _, value in lines if key.strip() == "model name")
    return ", ".join(filter(None, (next(names, ""), instruction_set())))


def instruction_set() -> str:
    """The widest vectors that this CPU has instructions for, or `unknown`."""
    flags = _cpuinfo().split()
    return next((name for flag, name in _VECTORS.items() if flag in flags), "unknown")


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
