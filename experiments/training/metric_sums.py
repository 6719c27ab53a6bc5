"""Sums of metrics over steps, and the time that the steps took."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

LOSS = "_loss"


class NonFiniteError(Exception):
    """The loss or the parameters of a step are infinite or not a number.

    Attributes:
        step: the number of the step.
    """

    def __init__(self, step: int, found: str):
        super().__init__(found)
        self.step = step


class MetricSums:
    """Adds numerators and denominators in float64 on the host.

    The sums of a step are fetched when those of the next step are added, so that the host does not
    wait for the device.
    """

    def __init__(self, sums: Mapping[str, Any] | None = None):
        """Starts from zero, or from sums that `settled` returned."""
        self._sums: dict[str, tuple[float, float]] = {
            k: (v[0], v[1]) for k, v in (sums or {}).items()
        }
        self._pending: tuple[int, Any] | None = None

    def add(self, step: int, sums: Any) -> None:
        """Adds the sums of a step that may still run, and fetches those of the step before.

        Raises:
            NonFiniteError: the loss of the step before is not finite.
        """
        self._fetch()
        self._pending = step, sums

    def settled(self) -> dict[str, tuple[float, float]]:
        """The sums over all steps that were added; raises NonFiniteError like `add`."""
        self._fetch()
        return dict(self._sums)

    def _fetch(self) -> None:
        if self._pending is None:
            return
        (step, sums), self._pending = self._pending, None
        # To fetch an array of a program that ran out of memory may wait for ever; this raises.
        host = jax.device_get(jax.block_until_ready(sums))
        if LOSS in host and not math.isfinite(host[LOSS]):
            raise NonFiniteError(step, f"the loss of step {step} is {host[LOSS]}")
        for name, (top, bottom) in ((k, v) for k, v in host.items() if k != LOSS):
            old_top, old_bottom = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (old_top + float(top), old_bottom + float(bottom))


class Window:
    """The training steps between two log records.

    A step is timed from the arrival of the sums of the step before it to that of its own. The
    loop fetches these sums anyway, so timing does not make the host wait for the device.

    Attributes:
        first: the first step of the window.
        totals: the metric sums of its steps.
    """

    def __init__(self, first: int, sums: Mapping[str, Any] | None = None):
        """Starts at a step, with the sums that an interrupted run already had for the window."""
        self.first, self.totals = first, MetricSums(sums)
        self._plain: list[float] = []  # The seconds of steps,
        self._choosing: list[float] = []  # and those of steps in which sets are chosen.
        # When the sums of the last step arrived, or a pause ended; None before the first step.
        self._mark: float | None = None
        self._running: list[float] | None = None  # Where the time of the pending step goes.

    def add(self, step: int, sums: Any, chooses: bool = False) -> None:
        """Adds a step. The first step of a process compiles the program and is not timed.

        Args:
            step: the number of the step.
            sums: its sums, which the device may still compute.
            chooses: whether sets are chosen in the time of this step.
        """
        self.totals.add(step, sums)
        self._arrived()
        self._running = self._choosing if chooses else self._plain

    def _arrived(self) -> None:
        if self._running is None:
            return
        now = time.perf_counter()
        if self._mark is not None:
            self._running.append(now - self._mark)
        self._running, self._mark = None, now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time is not counted. It waits for the pending step first."""
        self.totals.settled()
        self._arrived()
        try:
            yield
        finally:
            if self._mark is not None:
                self._mark = time.perf_counter()

    def timing(self) -> Timing | None:
        """The times of the steps; None if no step was timed. Call it while paused."""
        times = [*self._plain, *self._choosing]
        if not times:
            return None
        refresh: float | None = 0.0
        if self._choosing:
            usual = statistics.median(self._plain) if self._plain else None
            refresh = None if usual is None else sum(self._choosing) - usual * len(self._choosing)
        return Timing(len(times), sum(times), refresh if refresh is None else max(0.0, refresh))

    def next(self, first: int) -> None:
        """Starts the next window."""
        self.first, self.totals = first, MetricSums()
        self._plain, self._choosing = [], []


class Timing(NamedTuple):
    """The times of the steps of a window.

    Attributes:
        steps: how many steps were timed.
        seconds: how long they took together.
        refresh_seconds: by how much those in which sets are chosen took longer than as many of the
            others (their median), at least 0. It is None if every step chooses, because then
            nothing outside the device tells the two apart.
    """

    steps: int
    seconds: float
    refresh_seconds: float | None
