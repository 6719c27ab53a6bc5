"""Prepares batches while the device computes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from experiments.task import Batch, DataIterator

AHEAD = 2


class Prefetcher:
    """Reads batches ahead, in a thread.

    Attributes:
        position: the position of the data after the last batch that `next` returned.
        waited: the seconds spent waiting in `next`, but for the first batch, for which the first
            step waits, which is not timed either; a caller may set it back to zero.
    """

    def __init__(self, data: DataIterator, put: Callable[[Batch], Any]):
        """Starts at the present position of the data.

        Args:
            data: the batches; from now on, only the thread may read them. At the exit they are
                closed, if they can be: processes that read ahead leave shared memory otherwise.
            put: brings a batch to the devices.
        """
        self.position = data.get_state()
        self.waited = 0.0
        self._first = True
        self._data, self._put = data, put
        self._ready: queue.Queue[tuple[Any, Any, BaseException | None]] = queue.Queue(AHEAD)
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            if not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(0.01)
        if close := getattr(self._data, "close", None):
            close()

    def next(self) -> Any:
        """The next batch, on the devices. An error from reading it is raised here, every time."""
        start = time.perf_counter()
        if self._error is None:
            batch, position, self._error = self._ready.get()
        self.waited += 0.0 if self._first else time.perf_counter() - start
        self._first = False
        if self._error is not None:
            raise self._error
        self.position = position
        return batch

    def _read(self) -> None:
        try:
            while not self._stop.is_set():
                batch = next(self._data)
                position = self._data.get_state()
                self._ready.put((self._put(batch), position, None))
        except BaseException as error:
            self._ready.put((None, None, error))
