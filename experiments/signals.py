"""Signals that ask a process to end, and the status with which it does. Imports nothing slow."""

from __future__ import annotations

import contextlib
import os
import signal
from concurrent.futures import Future, wait
from types import FrameType
from typing import NoReturn, TypeVar

T = TypeVar("T")
# SIGHUP comes when a terminal is closed, and is ignored under `nohup`.
_ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ASK = tuple(s for s in _ALL if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN)
# The exit status of a run that was asked to end and goes on from there: EX_TEMPFAIL in sysexits.h.
RESUMABLE = 75


def end_at_once() -> None:
    """Lets the signals of `ASK` end this process with `RESUMABLE`; there is nothing to save yet."""
    for number in ASK:
        signal.signal(number, _end)


def end(number: int) -> NoReturn:
    """Ends this process at once, with a line that names the signal."""
    told = f"stopped by {signal.Signals(number).name}; the same command goes on\n"
    with contextlib.suppress(OSError):  # The terminal may be closed.
        os.write(1, told.encode())
    os._exit(RESUMABLE)


def result(future: Future[T]) -> T:
    """Waits for a future, and lets Python's signal handlers run meanwhile.

    A handler runs between two steps of the main thread. A signal that comes just before the thread
    blocks would be handled when the wait is over, so the function waits for 0.2 s at a time.

    Returns:
        The result of the future. An exception of the future is raised here.
    """
    while not future.done():
        wait([future], timeout=0.2)
    return future.result()


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    end(number)
