"""Stops a run cleanly when the process is asked to end."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from experiments.signals import ASK, end


class Stopped(BaseException):
    """The process was asked to end, and no step is under way. No Exception, as an interrupt.

    Attributes:
        number: the signal that asked.
    """

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__()
        self.number = number


class StopRequest:
    """Turns the first signal of `ASK` into a request; the second one acts as before.

    Within `steps`, a request waits until the step is done and saved; Stopped is raised at the end.
    Elsewhere it is raised at once, for there is nothing to save.

    On many hosts the SIGTERM of any of them reaches all through JAX's preemption service, which
    has a handler of its own; the run then stops after a step that is the same on all, and without a
    step under way only when the next one is done.
    """

    def __init__(self) -> None:
        self._asked = self._in_steps = False
        self._before: dict[signal.Signals, object] = {}
        self._hook = sys.unraisablehook

    def __enter__(self) -> StopRequest:
        # To ask for the number of processes would start the devices, which may not be there.
        own = (signal.SIGTERM,) if jax.distributed.is_initialized() else ()
        signals = [s for s in ASK if s not in own]
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in signals}
        sys.unraisablehook = self._swallowed
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        sys.unraisablehook = self._hook

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """A context in which a request waits; raises Stopped at its end if there was one."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False
        if self._asked:
            raise Stopped

    def asked(self, step: int) -> bool:
        """Whether to stop after so many finished steps; call it after each.

        All hosts stop at the same step, soon after one of them was asked. No host waits for another
        before that.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._asked = True
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._restore()
        if jax.distributed.is_initialized():
            signal.raise_signal(signal.SIGTERM)
            return
        self._asked = True
        if not self._in_steps:
            raise Stopped(number)

    def _swallowed(self, unraisable: Any) -> None:
        """Ends the process where Stopped was raised in a callback, from which nothing is raised."""
        if isinstance(unraisable.exc_value, Stopped):
            end(unraisable.exc_value.number)
        self._hook(unraisable)

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)  # type: ignore[arg-type]
        self._before = {}
