"""A limit on the time of a bench: rows that no longer fit are left out, by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax


class Budget:
    """Makes rows for as long as the time lasts.

    Attributes:
        left_out: the names of the rows for which there was no time.
        failed: the name of each row that raised an error, and the error's first line.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        """The time begins now.

        Args:
            seconds: how long it lasts.
            clock: a clock in seconds.
        """
        self._clock, self._end = clock, clock() + seconds
        self._longest: dict[str, float] = {}
        self.left_out: list[str] = []
        self.failed: list[dict[str, str]] = []

    def left(self) -> float:
        """Seconds; below 0 when they are over."""
        return self._end - self._clock()

    def row(
        self, kind: str, name: str, make: Callable[[], dict[str, Any]], first: float = 0.0
    ) -> dict[str, Any] | None:
        """Makes a row, if the time left is that of the longest row of its kind, or `first`.

        An error of a row is no end of the bench: what runs after it may be right.

        Args:
            kind: rows of one kind take about the same time.
            name: stands for the row in `left_out` and `failed`.
            make: makes the row.
            first: seconds that a row is expected to take as long as no longer one has been made.
        """
        if self.left() < max(first, self._longest.get(kind, 0.0)):
            self.left_out.append(name)
            return None
        start = self._clock()
        try:
            return make()
        except Exception as error:
            line = next(iter(str(error).splitlines()), "")
            self.failed.append({"row": name, "error": f"{type(error).__name__}: {line[:300]}"})
            jax.clear_caches()  # What an error of memory left behind.
            return None
        finally:
            self._longest[kind] = max(self._longest.get(kind, 0.0), self._clock() - start)
