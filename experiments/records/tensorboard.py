"""Scalars for TensorBoard."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter, register_writer_factory
from tensorboardX.summary import scalar

from experiments.records import files


class _Buckets:
    """Opens event files in buckets for tensorboardX, as all else there is opened."""

    def open(self, path: str) -> files.Growing:
        return files.growing(files.path(path))


for _scheme in files.SCHEMES:
    register_writer_factory(_scheme, _Buckets())


class Board:
    """Writes scalars to a new event file.

    They are written where `flush` is called. The thread of `tensorboardX.SummaryWriter` ends when
    the disk is full, and its caller then waits for ever.
    """

    def __init__(self, directory: Path, start: int):
        """Makes the file.

        Args:
            directory: the folder of the event files.
            start: the number of finished steps; TensorBoard hides scalars of later steps that
                earlier processes wrote.
        """
        directory.mkdir(parents=True, exist_ok=True)
        name = (
            f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{start}"
        )
        self._file = RecordWriter(str(directory / name))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Adds a value of one series."""
        self._write(Event(step=step, summary=scalar(tag, value)))

    def flush(self) -> None:
        """Puts what was added on disk."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())
