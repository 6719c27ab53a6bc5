"""Sums of metrics over steps, and the time that the steps took."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

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
        host = jax.device_get(sums)
        if LOSS in host and not math.isfinite(host[LOSS]):
            raise NonFiniteError(step, f"the loss of step {step} is {host[LOSS]}")
        for name, (top, bottom) in ((k, v) for k, v in host.items() if k != LOSS):
            old_top, old_bottom = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (old_top + float(top), old_bottom + float(bottom))


class Window:
    """The training steps between two log records.

    Attributes:
        first: the first step of the window.
        totals: the metric sums of its steps.
    """

    def __init__(self, first: int, sums: Mapping[str, Any] | None = None):
        """Starts at a step, with the sums that an interrupted run already had for the window."""
        self.first, self.totals = first, MetricSums(sums)
        self._timed, self._seconds = 0, 0.0
        self._mark = time.perf_counter()
        self._compiled = False

    def add(self, step: int, sums: Any) -> None:
        """Adds a step. The first step of a process compiles the program and is not timed."""
        self.totals.add(step, sums)
        self._timed += self._compiled
        if not self._compiled:
            self._compiled, self._mark = True, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time is not counted."""
        self._seconds += time.perf_counter() - self._mark
        try:
            yield
        finally:
            self._mark = time.perf_counter()

    def timing(self, unit: str, units: int, waited: float) -> dict[str, float]:
        """The speed, and the share of the time spent waiting for data. Call it while paused."""
        if not self._timed:
            return {}
        rate = self._timed / self._seconds
        return {
            "steps_per_second": rate,
            f"{unit}_per_second": rate * units,
            "data_wait": min(1.0, waited / self._seconds),
        }

    def next(self, first: int) -> None:
        """Starts the next window."""
        self.first, self.totals = first, MetricSums()
        self._timed, self._seconds = 0, 0.0
