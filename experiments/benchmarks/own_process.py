"""A process for what must not share the memory of this one."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from experiments.errors import UserError


@contextlib.contextmanager
def own_process(what: str) -> Iterator[ProcessPoolExecutor]:
    """A new process that runs what is submitted to it, one after the other.

    Args:
      what: names the process in an error.

    Raises:
      UserError: the process ended by itself.
    """
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield process
    except BrokenProcessPool as error:
        raise UserError(f"the process of {what} ended; is there memory for it?") from error
