"""The folder of a run: which files it holds, and which config it belongs to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.errors import UserError
from experiments.records import files

CONFIG, METRICS, FINAL, CHECKPOINTS = "config.json", "metrics.jsonl", "final.json", "checkpoints"
TENSORBOARD, LOCK, SWEEP, SETS = "tensorboard", ".lock", ".sweep.json", "sets"
_OURS = {"name", "task", "seed", "steps", "model", "data", "method"}  # Every config has these keys.
# Keys that may change when a run continues, because they do not change what it computes.
FREE = (
    "name", "command", "mesh", "method.backend", "checkpoint_every", "keep_checkpoints",
    "keep_checkpoints_every", "keep_best_checkpoint", "write_sets_every", "data.threads",
    "data.workers", "data.read_ahead",
)  # fmt: skip


def as_json(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON stores it."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    return plain


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Makes the folder, and keeps every other process from training in it meanwhile.

    The operating system gives the lock back when the process ends, however it ends. A bucket and a
    file system without locks are used without one.

    Raises:
        UserError: another process trains in it, or it is no folder that can be written.
    """
    _check_folder(workdir)
    _check_writable(workdir)
    if jax.process_index() or files.in_bucket(workdir):
        yield
        return
    with open(workdir / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                raise UserError(
                    f"--workdir={workdir}: {file.read() or 'another process'} trains in it; wait "
                    "for it, or choose another folder"
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def claim(workdir: Path, config: ConfigDict) -> None:
    """Writes the config to the folder, or checks that the folder belongs to this config.

    Raises:
        UserError: it is a file, cannot be written, or belongs to another config.
    """
    check(workdir, config)
    _check_writable(workdir)
    if jax.process_index() == 0 and not holds_results(workdir):
        write_json(workdir / CONFIG, as_json(config))


def check(workdir: Path, config: ConfigDict) -> None:
    """Checks that a run of this config may use the folder; nothing is written.

    Raises:
        UserError: it is a file, or it holds something else, or the results of another config.
    """
    _check_folder(workdir)
    if holds_results(workdir):
        _check_same(workdir, read_json(workdir / CONFIG), as_json(config))


def _check_folder(workdir: Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: is a file; must be a folder, or a new name")
    for name in (CHECKPOINTS, TENSORBOARD, SETS):
        if (workdir / name).exists() and not (workdir / name).is_dir():
            raise UserError(f"{workdir / name}: is a file; must be a folder")
    for name in (CONFIG, METRICS, LOCK):
        if (workdir / name).is_dir():
            raise UserError(f"{workdir / name}: is a folder; must be a file")
    _check_ours(workdir)


def _check_ours(workdir: Path) -> None:
    """Refuses the folder of another program, and one of source files."""
    config = workdir / CONFIG
    if config.exists():
        if not _OURS.issubset(read_json(config)):
            raise UserError(f"{config}: is no config of a run; choose another --workdir")
        return
    for name in sorted(path.name for path in files.listed(workdir)):
        if name in (METRICS, FINAL, CHECKPOINTS) or name.endswith(".py"):
            raise UserError(f"--workdir={workdir}: holds {name} but no {CONFIG}; choose another")


def check_no_address(flag: str, path: Path) -> None:
    """Raises UserError if a path is an address such as gs://bucket."""
    if ":/" in str(path):
        raise UserError(f"{flag}={path}: is an address; must be a path, mounted if need be")


def holds_results(workdir: Path) -> bool:
    """Whether something would be lost if another config took over the folder."""
    records = workdir / METRICS
    return (
        finished(workdir)
        or (records.exists() and files.size(records) > 0)
        or bool(files.listed(workdir / CHECKPOINTS))
    )


def holds_run(workdir: Path) -> bool:
    """Whether the folder's `config.json` is that of a run, and not another program's."""
    try:
        return _OURS.issubset(read_json(workdir / CONFIG))
    except UserError:
        return False


def finished(workdir: Path) -> bool:
    """Whether the run in this folder is finished; UserError if what says so cannot be read."""
    return (workdir / FINAL).exists() and bool(read_json(workdir / FINAL))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object."""
    try:
        found = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}; must hold a JSON object")
    return found


def parsed(text: str) -> Any:
    """A value of JSON.

    Raises:
        ValueError: it is no JSON, or it holds what no run writes and what nobody can use: an
            integer beyond every float, half of a surrogate pair, or too many objects in each other.
    """
    try:
        found = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("objects or arrays in too many others") from None
    if "\\ud" in text.lower():
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _integer(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def write_json(path: Path, value: dict[str, Any], shared: bool = False) -> None:
    """Writes a JSON file completely or not at all; `shared` as in `files.replace`."""
    files.replace(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode(), shared)


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Yields a path next to `out` for a new file or folder, and renames it to `out` at the end.

    After an exception, the unfinished file or folder is removed.

    Raises:
        UserError: the file or folder cannot be written.
    """
    at = out.resolve()
    unfinished = at.with_name(f"{at.stem}.unfinished.{os.getpid()}{at.suffix}")
    try:
        yield unfinished
        unfinished.rename(at)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(str(error).replace(str(unfinished), str(out))) from error
    finally:
        _remove(unfinished)


def _remove(path: Path) -> None:
    """Removes a file or a folder, to which Orbax's threads may still write after an error."""
    for _ in range(50):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
        if not path.exists():
            return
        time.sleep(0.1)


def _check_writable(workdir: Path) -> None:
    trial = workdir / f".writable.{jax.process_index()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: cannot be written: {error.strerror or error}"
        ) from error


def _check_same(workdir: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before, now = (
        {key: value for key, value in flat(c).items() if not is_free(key)} for c in (old, new)
    )
    missing = "nothing"
    # An option that is newer than the folder is off, unless this config turns it on.
    now = {key: value for key, value in now.items() if key in before or value}
    different = [
        f"{key} is {before.get(key, missing)!r} there and {now.get(key, missing)!r} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, missing) != now.get(key, missing)
    ]
    if different:
        raise UserError(
            f"--workdir={workdir}: belongs to another config: {'; '.join(different)}; "
            "choose another folder"
        )


def is_free(key: str) -> bool:
    """Whether a key may change, or be missing, when a run continues."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config by key, with dots between the levels."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found
