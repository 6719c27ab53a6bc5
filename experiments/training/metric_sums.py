"""Sums of numerators and denominators over steps, and how long the steps took."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

LOSS = "_loss"


class NonFiniteError(Exception):
    """Something of a step is infinite or no number.

    Attributes:
        step: which step.
    """

    def __init__(self, step: int, found: str):
        super().__init__(found)
        self.step = step


class MetricSums:
    """Adds device scalars in float64 on the host, one step behind so as not to wait for them."""

    def __init__(self, sums: Mapping[str, Any] | None = None):
        """Starts from nothing, or from what `settled` gave."""
        self._sums: dict[str, tuple[float, float]] = {
            k: (v[0], v[1]) for k, v in (sums or {}).items()
        }
        self._pending: tuple[int, Any] | None = None

    def add(self, step: int, sums: Any) -> None:
        """Takes the sums of a step that may still be running, and fetches those of the one before.

        Raises:
            NonFiniteError: the step before has a loss that is not finite.
        """
        self._fetch()
        self._pending = step, sums

    def settled(self) -> dict[str, tuple[float, float]]:
        """The totals with every step in; raises as `add` does."""
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
    """The training steps from one log record to the next.

    Attributes:
        first: the first step of the window.
        totals: their sums.
    """

    def __init__(self, first: int, sums: Mapping[str, Any] | None = None):
        """Begins at a step, with what an interrupted run had summed up of its window."""
        self.first, self.totals = first, MetricSums(sums)
        self._timed, self._seconds = 0, 0.0
        self._mark = time.perf_counter()
        self._compiled = False

    def add(self, step: int, sums: Any) -> None:
        """One more step; the process's first, which compiles, is not timed."""
        self.totals.add(step, sums)
        self._timed += self._compiled
        if not self._compiled:
            self._compiled, self._mark = True, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time of what is done inside."""
        self._seconds += time.perf_counter() - self._mark
        try:
            yield
        finally:
            self._mark = time.perf_counter()

    def timing(self, unit: str, units: int, waited: float) -> dict[str, float]:
        """Speed, and the part of the time spent waiting for data; call it while paused."""
        if not self._timed:
            return {}
        rate = self._timed / self._seconds
        return {
            "steps_per_second": rate,
            f"{unit}_per_second": rate * units,
            "data_wait": min(1.0, waited / self._seconds),
        }

    def next(self, first: int) -> None:
        """Begins anew."""
        self.first, self.totals = first, MetricSums()
        self._timed, self._seconds = 0, 0.0
