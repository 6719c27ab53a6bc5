"""Endless batches that Grain reads, with a position that can be saved.

This module imports no JAX, so that Grain's worker processes start quickly.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import grain

from experiments.errors import UserError


class EndlessBatches:
    """Batches by number, read ahead from the present position.

    Attributes:
        position: how many batches were taken.
    """

    def __init__(
        self, batches: grain.MapDataset, read: Callable[[grain.MapDataset], grain.IterDataset]
    ):
        """Starts at the first batch.

        Args:
            batches: the batches by number.
            read: how they are read ahead, in threads or in processes.
        """
        self.position = 0
        self._batches, self._read = batches, read
        self._iterator: grain.DatasetIterator | None = None
        self._failed = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The iterator is the object itself."""
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch of this host."""
        if self._iterator is None:
            self._iterator = iter(self._read(self._batches[self.position :]))
        try:
            batch = _next(self._iterator)
        except Exception:
            self._failed = True
            raise
        self.position += 1
        return batch

    def go_to(self, position: int) -> None:
        """Continues after that many batches."""
        self.close()
        self.position = position

    def close(self) -> None:
        """Stops the threads or processes that read ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        if self._failed:  # Collecting takes a tenth of a second or more.
            gc.collect()  # What an error left behind refers to itself, and to shared memory.
            self._failed = False


def _next(iterator: grain.DatasetIterator) -> dict[str, Any]:
    """The next batch. A UserError is raised anew, without the frames of Grain that hold batches."""
    try:
        batch: dict[str, Any] = next(iterator)
        return batch
    except UserError as error:
        message = str(error)
    raise UserError(message)
