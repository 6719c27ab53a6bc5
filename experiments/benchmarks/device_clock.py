"""How long a compiled function keeps its device busy, by the device's own clock.

The function runs inside a trace of JAX's profiler, and the trace is read: the kernels on the planes
of GPUs and TPUs ("device"), or XLA's operations on the host's plane, where the CPU is the device
("host"). Time in which the device waits for its host does not count, nor does the time of kernels
that run at the same time as others. A profile without any of these (a driver may not let a user
read it) leaves the time between the first call and the last result, which is marked as "wall".
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

_DEVICES = ("/device:GPU:", "/device:TPU:")
# The lines of a device that hold the same work: as it was queued, or as XLA names it.
_LINES = ("Stream #", "XLA Ops", "XLA Modules")
_HOST = "/host:CPU"
_OPERATION = "hlo_op"  # what XLA's own events on the host have among their stats
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one run.

    Attributes:
        seconds: the mean over the runs, to four digits.
        clock: "device", "host" or "wall"; see the top of this file.
    """

    seconds: float
    clock: str


def measure(run: Callable[[], Any], repeats: int) -> Timing:
    """Times a function that runs one compiled program and returns arrays.

    Args:
        run: called once before the trace, to compile and to warm up.
        repeats: the number of runs in the trace, at least 1.
    """
    jax.block_until_ready(run())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter()
            for _ in range(repeats):
                result = run()
            jax.block_until_ready(result)
            wall = time.perf_counter() - start
        on_host = jax.devices()[0].platform == "cpu"
        profiles = [ProfileData.from_file(str(p)) for p in Path(folder).rglob("*.xplane.pb")]
        found = [busy for profile in profiles if (busy := busy_seconds(profile, on_host))]
    seconds, clock = found[0] if found else (wall, "wall")
    return Timing(float(f"{seconds / repeats:.4g}"), clock)


def busy_seconds(profile: ProfileData, on_host: bool) -> tuple[float, str] | None:
    """The time in which the device of a profile was busy, and whose clock says so.

    Args:
        profile: of a process that uses one device; the times of several are added up.
        on_host: the device is the CPU. Else what the host's plane tells of XLA are its launches.

    Returns:
        Seconds, and "device" or "host"; None if the profile has no work of XLA.
    """
    planes = list(profile.planes)
    devices = [list(plane.lines) for plane in planes if plane.name.startswith(_DEVICES)]
    for name in _LINES:
        kernels = [
            [event for line in lines if line.name.startswith(name) for event in line.events]
            for lines in devices
        ]
        if any(kernels):
            return sum(_union(map(_interval, events)) for events in kernels) / 1e9, "device"
    if not on_host:
        return None
    host = [event for plane in planes if plane.name == _HOST for event in _operations(plane)]
    return (_union(map(_interval, host)) / 1e9, "host") if host else None


def _operations(plane: Any) -> Iterator[Any]:
    for line in plane.lines:
        for event in line.events:
            if any(name == _OPERATION for name, _ in event.stats):
                yield event


def _interval(event: Any) -> Interval:
    return event.start_ns, event.start_ns + event.duration_ns


def _union(intervals: Iterable[Interval]) -> float:
    """The length of a union of intervals: loops hold their operations, and streams overlap."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
