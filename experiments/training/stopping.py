"""Stops a run cleanly when the process is asked to end."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a request. On one host, the second one acts as usual.

    On many hosts the SIGTERM of any of them reaches all through JAX's preemption service, which
    has a handler of its own.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        signals = _SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in signals}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def asked(self, step: int) -> bool:
        """Whether to stop after so many finished steps; call it after each.

        All hosts stop at the same step, soon after one of them was asked. No host waits for another
        before that.
        """
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True
        self._restore()
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)  # type: ignore[arg-type]
        self._before = {}
