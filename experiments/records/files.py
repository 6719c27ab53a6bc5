"""Files of a run on a file system or in a bucket.

A path of a bucket is an `etils.epath.Path`. Everything else about runs uses only what it shares
with `pathlib.Path`; what differs between the two is here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from etils import epath

from experiments.errors import UserError

SCHEMES = ("gs",)  # of the addresses that both epath and TensorStore open
_UPLOAD_EVERY = 60.0  # seconds


class Growing(Protocol):
    """A file that grows."""

    def write(self, data: bytes, /) -> object:
        """Adds data."""

    def flush(self) -> None:
        """Lets others see what was added, in a bucket after a minute at most."""

    def close(self) -> None:
        """Stores what was added, and closes the file."""


def path(address: str) -> Path:
    """The path of an address: gs://BUCKET/NAME, or a path of the file system.

    Raises:
        UserError: it is an address of another kind, or the bucket cannot be opened.
    """
    scheme, separator, _ = address.partition("://")
    if not separator:
        return Path(address)
    if scheme not in SCHEMES:
        raise UserError(f"{address}: must be gs://BUCKET/NAME, or a path; mount others if need be")
    found = epath.Path(address)
    try:
        found.exists()
    except Exception as error:  # Each backend has errors of its own; a missing one is ImportError.
        raise UserError(f"{address}: cannot be opened: {error}") from error
    return found


def in_bucket(path: Path) -> bool:
    """Whether a path is the address of something in a bucket."""
    return "://" in os.fspath(path)


def growing(path: Path) -> Growing:
    """Opens a file to add to it; `sync` stores what was added."""
    return _Object(path) if in_bucket(path) else open(path, "ab")


def sync(file: Growing) -> None:
    """Stores what was added to a file, so that neither a crash nor a power cut loses it."""
    if isinstance(file, _Object):
        file.upload()
    else:
        os.fsync(file.fileno())  # type: ignore[attr-defined]


class _Object:
    """An object of a bucket, to which nothing can be added: all of it is stored anew."""

    def __init__(self, path: Path):
        self._path = path
        self._data = bytearray(path.read_bytes() if path.exists() else b"")
        self._stored, self._at = len(self._data), time.monotonic()

    def write(self, data: bytes) -> None:
        self._data += data

    def flush(self) -> None:
        if time.monotonic() - self._at >= _UPLOAD_EVERY:
            self.upload()

    def upload(self) -> None:
        if self._stored != len(self._data):
            self._path.write_bytes(bytes(self._data))
        self._stored, self._at = len(self._data), time.monotonic()

    def close(self) -> None:
        self.upload()


def replace(path: Path, data: bytes, shared: bool = False) -> None:
    """Writes a file completely or not at all; it is on disk when the call returns.

    Args:
        path: the file.
        data: its new content.
        shared: whether other processes may replace it at the same time. Each then has an unfinished
            file of its own; otherwise what a killed process left is overwritten.
    """
    if in_bucket(path):
        path.write_bytes(data)
        return
    own = f".{socket.gethostname()}.{os.getpid()}" if shared else ""
    unfinished = path.with_name(f"{path.name}{own}.tmp")
    unfinished.unlink(missing_ok=True)  # a link would be followed
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def size(path: Path) -> int:
    """The size of a file in bytes."""
    found = path.stat()
    return int(found.length if in_bucket(path) else found.st_size)  # type: ignore[attr-defined]


def below(folder: Path) -> Iterator[str]:
    """The names of all files in a folder and in the folders below, relative to it, in order."""
    if not in_bucket(folder):
        yield from sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        return
    # TensorStore writes past fsspec, which remembers what it listed. TensorFlow does not.
    with contextlib.suppress(ImportError):
        epath.backend.fsspec_backend.fs(folder).invalidate_cache()
    root, found = None, []
    for top, _, names in epath.Path(folder).walk():
        at = os.fspath(top).rstrip("/")  # without the scheme, in fsspec
        root = root or at
        found += [f"{at}/{name}"[len(root) + 1 :] for name in names]
    yield from sorted(found)


def named(folder: Path, pattern: str) -> list[Path]:
    """All files whose name fits a pattern, in a folder and in the folders below, links included."""
    if in_bucket(folder):
        names = (name for name in below(folder) if fnmatch(name.rpartition("/")[2], pattern))
        return [folder / name for name in names]
    found: list[Path] = []
    seen: set[str] = set()
    for at, folders, here in os.walk(folder, followlinks=True):
        place = os.path.realpath(at)
        if place in seen:  # A link may lead back to a folder above it.
            folders.clear()
            continue
        seen.add(place)
        found += [Path(place, name).resolve() for name in here if fnmatch(name, pattern)]
    return found


def listed(folder: Path) -> list[Path]:
    """What a folder holds; in a bucket, an empty folder is not there."""
    return list(folder.iterdir()) if folder.is_dir() else []


def move(folder: Path, target: Path) -> None:
    """Gives a folder another name, in a bucket file by file."""
    if not in_bucket(folder):
        folder.rename(target)
        return
    for name in below(folder):
        epath.Path(folder / name).copy(epath.Path(target / name))
    remove(folder)


def remove(folder: Path) -> None:
    """Removes a folder and all that is in it."""
    if in_bucket(folder):
        epath.Path(folder).rmtree()
    else:
        shutil.rmtree(folder)
