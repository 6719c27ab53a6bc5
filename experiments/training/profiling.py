"""Traces of steps, for TensorBoard's profile plugin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from experiments.training.metric_sums import Window


class Profile:
    """Traces a range of steps with `jax.profiler`. At its exit, an unfinished trace is written."""

    def __init__(self, folder: Path, steps: range):
        """Nothing happens before the first of the steps.

        Args:
            folder: where the trace goes, in `plugins/profile/` and the time.
            steps: the numbers of the steps; empty for no trace.
        """
        self._folder, self._steps, self._running = folder, steps, False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def step(self, step: int, window: Window) -> Iterator[None]:
        """A context for all that happens in a step. Starting and writing are not timed."""
        if step not in self._steps:
            yield
            return
        if step == self._steps[0]:
            with window.paused():
                jax.profiler.start_trace(self._folder)
                self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step == self._steps[-1]:
            with window.paused():
                self.__exit__()
