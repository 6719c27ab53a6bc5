"""Stops a run cleanly when the process is asked to end."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a request. The second one acts as usual."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def asked(self) -> bool:
        """Whether to stop. If one host was asked, all hosts stop at the same step."""
        if jax.process_count() == 1:
            return self._asked
        return bool(np.any(multihost_utils.process_allgather(np.bool_(self._asked))))

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)  # type: ignore[arg-type]
        self._before = {}
