"""Checkpoints: Orbax stores the arrays, and a list of checksums says which saves are complete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from math import isfinite
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from experiments.errors import UserError, warn
from experiments.records import files, workdir

MANIFEST = "MANIFEST.json"
ASIDE = "damaged"
DELETED = ".deleted"  # ends the name of a checkpoint that is being deleted
_UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of one that Orbax is writing
Tree = Any


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which checkpoints are kept: the last ones, those of every so many steps, and the best one.

    Attributes:
        last: how many of the last checkpoints are kept, at least 1.
        every: the checkpoints of all multiples of this number of steps are kept; 0 for none.
        best: "max NAME" or "min NAME" keeps the checkpoint at whose step an evaluation during
            training found the largest or smallest value of that metric; "" for none.
    """

    last: int
    every: int = 0
    best: str = ""

    @classmethod
    def of(cls, config: ConfigDict, metrics: Callable[[], Collection[str]]) -> Kept:
        """What a config asks for.

        Args:
            config: a validated config.
            metrics: gives the names of the metrics of an evaluation.

        Raises:
            UserError: the config makes no checkpoints of that kind, or has nothing to rank them by.
        """
        every, best = config.keep_checkpoints_every, config.keep_best_checkpoint
        save, evaluate = config.checkpoint_every, config.eval_every
        if every and (not save or every % save):
            raise UserError(
                f"config.keep_checkpoints_every: found {every}; must be a multiple of "
                f"checkpoint_every={save}"
            )
        if not best:
            return cls(config.keep_checkpoints, every)
        found = f"config.keep_best_checkpoint: found {best!r}"
        direction, _, metric = best.partition(" ")
        if direction not in ("max", "min") or not metric:
            raise UserError(f"{found}; must be 'max NAME' or 'min NAME' of a metric, or ''")
        if not save or not evaluate or save % evaluate:
            raise UserError(
                f"{found} and nothing to rank by: checkpoint_every={save} must be a multiple of "
                f"eval_every={evaluate}, both above 0"
            )
        if metric not in metrics():
            raise UserError(f"{found}; must name one of {', '.join(sorted(metrics()))}")
        return cls(config.keep_checkpoints, every, best)

    @property
    def metric(self) -> str:
        """The metric that ranks the checkpoints; empty if none does."""
        return self.best.partition(" ")[2]

    def among(self, values: dict[int, float | None]) -> set[int]:
        """The steps that are kept.

        Args:
            values: of each step that has a checkpoint, the value of the metric, if it has one.
        """
        kept = set(sorted(values)[-self.last :])
        kept |= {step for step in values if self.every and step % self.every == 0}
        ranked = {s: value for s, value in values.items() if value is not None and isfinite(value)}
        if self.best and ranked:
            best = (max if self.best.startswith("max") else min)(ranked.values())
            kept.add(min(step for step, value in ranked.items() if value == best))
        return kept


class Checkpoints:
    """The checkpoints of one run, in `directory/STEP`. Only undamaged ones are used.

    They are written in the background, one at a time. A checkpoint is complete when its list of
    checksums is on disk, which is written last; until then the one before it is in use.
    """

    def __init__(self, directory: Path, kept: Kept):
        """Opens the folder, and makes it if it is missing.

        Args:
            directory: the folder of the checkpoints.
            kept: which of them are kept.
        """
        self.directory = directory if files.in_bucket(directory) else directory.absolute()
        self._kept = kept
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(self.directory)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler("state", "meta"))
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: tuple[int, Future[None]] | None = None
        self._values: dict[int, float | None] = {}
        self._last: int | None = None

    def save(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Saves the state, and `meta` of every host as JSON.

        The call returns when the state is copied to the host, so that the caller may change or
        donate it; the rest is done in the background. It first waits for the save before it.

        Raises:
            UserError: the save before it failed.
        """
        self.wait()
        value = meta.get("evaluation", {}).get(self._kept.metric)
        items = {
            "state": ocp.args.StandardSave(state),
            "meta": ocp.args.JsonSave({"hosts": _of_all_hosts(meta)}),
        }
        self._orbax.save(self.directory / str(step), ocp.args.Composite(**items))
        self._pending = step, self._background.submit(self._complete, step, value)

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
            UserError: it cannot be written.
        """
        if self._pending is not None:
            step, saving = self._pending
            try:
                saving.result()
            except (OSError, ValueError) as error:  # of the file system, and of TensorStore
                raise UserError(
                    f"{self.directory}: the checkpoint of step {step} cannot be written: "
                    f"{_reason(error)}; {self.kept()}"
                ) from error
            finally:
                self._pending = None
            self._last = step

    def kept(self) -> str:
        """The words that say which checkpoint a run goes on from."""
        if self._last is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint, of step {self._last}, is kept"

    def raise_errors(self) -> None:
        """Raises UserError if a save has failed meanwhile; does not wait."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def restore(self, abstract: Callable[[int], Tree]) -> tuple[Tree, dict[str, Any]] | None:
        """Reads the newest undamaged state directly into its shards, and the meta of this host.

        Damaged ones that are newer are named in a warning and moved to `directory/damaged`. Older
        ones are not looked at.

        Args:
            abstract: gives the shapes, types and shardings of the state after so many steps.

        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        self.wait()
        if jax.process_index() == 0:
            _set_damaged_aside(self.directory)
        _sync("damaged checkpoints moved")
        steps = _steps(self.directory)
        if not steps:
            return None
        self._last = steps[-1]
        state, hosts = _restore(self.directory / str(self._last), abstract(self._last))
        try:
            return state, meta_of(hosts, jax.process_index(), jax.process_count())
        except UserError as error:
            raise UserError(f"{self.directory}: {error}") from error

    def close(self) -> None:
        """Waits for the last save, and ends the background work; raises UserError like `wait`."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()

    def _complete(self, step: int, value: float | None) -> None:
        """The part of a save that runs in the background."""
        self._orbax.wait_until_finished()
        if jax.process_index() == 0:
            _write_manifest(self.directory / str(step))
            self._delete_old(step, value)

    def _delete_old(self, step: int, value: float | None) -> None:
        self._values[step] = value
        steps = _steps(self.directory)
        for old in set(steps) - self._values.keys():  # of earlier processes
            self._values[old] = _value(self.directory / str(old), self._kept.metric)
        kept = self._kept.among({step: self._values[step] for step in steps})
        for old in set(steps) - kept:
            _delete(self.directory / str(old))


def load(directory: Path, abstract: Callable[[int], Tree]) -> tuple[Tree, list[dict[str, Any]]]:
    """Reads the newest undamaged checkpoint of a run, and the meta of its hosts.

    Raises:
        UserError: there is no such checkpoint.
    """
    steps = _steps(directory)
    directory = directory if files.in_bucket(directory) else directory.absolute()
    for step in reversed(steps):
        checkpoint = directory / str(step)
        if (why := damage(checkpoint)) is None:
            return _restore(checkpoint, abstract(step))
        warn(f"checkpoint {directory / str(step)} is damaged: {why}")
    raise UserError(f"{directory}: no whole checkpoint; found steps {steps}")


def newest(directory: Path) -> int:
    """The step of the newest checkpoint whose save was finished; 0 if there is none."""
    steps = _steps(directory) if directory.is_dir() else []
    return max((step for step in steps if (directory / str(step) / MANIFEST).exists()), default=0)


def meta_of(hosts: list[dict[str, Any]], index: int, count: int) -> dict[str, Any]:
    """The meta from which a host goes on.

    Args:
        hosts: the meta of all hosts that saved.
        index: the number of this host.
        count: the number of hosts now.

    Raises:
        UserError: there are more or fewer hosts than before, and each had a position of its own in
            the data.
    """
    if count == len(hosts):
        return hosts[index]
    if any(meta.get("data") != hosts[0].get("data") for meta in hosts):
        raise UserError(
            f"saved by {len(hosts)} hosts, each with a position of its own in the data, which can "
            f"only continue on as many; found {count}"
        )
    return hosts[0]


def damage(checkpoint: Path) -> str | None:
    """A description of what is wrong with a checkpoint; None if nothing is."""
    try:
        listed = workdir.parsed((checkpoint / MANIFEST).read_text())
        listed = {
            str(name): (int(size), str(checksum)) for name, (size, checksum) in listed.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"
    if not {"state", "meta"} <= {name.partition("/")[0] for name in listed}:
        return f"{MANIFEST} lists no state or no meta"
    for name, (size, checksum) in listed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if files.size(path) != size:
            return f"{name} has {files.size(path)} bytes instead of {size}"
        if _checksum(path) != checksum:
            return f"{name} has another checksum"
    return None


def _restore(checkpoint: Path, abstract: Tree) -> tuple[Tree, list[dict[str, Any]]]:
    items = {"state": ocp.args.StandardRestore(abstract), "meta": ocp.args.JsonRestore()}
    handler = ocp.CompositeCheckpointHandler(*items)
    try:
        with ocp.Checkpointer(handler) as orbax:
            restored = orbax.restore(checkpoint, args=ocp.args.Composite(**items))
    except ValueError as error:
        raise UserError(
            f"{checkpoint}: holds another state than this config makes, or was "
            f"saved by another version: {str(error).strip().splitlines()[0]}"
        ) from error
    return restored["state"], restored["meta"]["hosts"]


def _value(checkpoint: Path, metric: str) -> float | None:
    """The value of a metric that a checkpoint was saved with."""
    if not metric or not (checkpoint / MANIFEST).is_file():
        return None
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as orbax:
            meta = orbax.restore(checkpoint / "meta", args=ocp.args.JsonRestore())
        return meta["hosts"][0]["evaluation"][metric]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _steps(directory: Path) -> list[int]:
    names = [path.name for path in files.listed(directory)]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def _set_damaged_aside(directory: Path) -> None:
    """Moves away what is damaged and newer than the newest undamaged checkpoint."""
    damaged, steps = {}, _steps(directory)
    for step in reversed(steps):
        why = damage(directory / str(step))
        if why is None:
            break
        damaged[step] = why
    # The first save of a run may have been cut off; a later one leaves those before it whole.
    unfinished = len(steps) == 1 and not (directory / str(steps[0]) / MANIFEST).exists()
    if damaged and len(damaged) == len(steps) and not unfinished:
        each = "; ".join(f"{step}: {damaged[step]}" for step in steps)
        raise UserError(
            f"{directory}: every checkpoint is damaged ({each}); move it away to begin anew"
        )
    for step, why in damaged.items():
        aside = directory / ASIDE
        aside.mkdir(exist_ok=True)
        taken = sum(p.name.split(".")[0] == str(step) for p in files.listed(aside))
        target = aside / (f"{step}.{taken}" if taken else str(step))
        files.move(directory / str(step), target)
        warn(f"checkpoint {directory / str(step)} is not used and moved to {target}: {why}")


def _delete(checkpoint: Path) -> None:
    """Deletes a checkpoint so that half of it, left by a process that was killed, is none."""
    if files.in_bucket(checkpoint):  # where no folder has a name that could be changed
        (checkpoint / MANIFEST).unlink(missing_ok=True)
    else:
        checkpoint = checkpoint.rename(checkpoint.with_name(checkpoint.name + DELETED))
    files.remove(checkpoint)


def _remove_unfinished(directory: Path) -> None:
    """Removes what a process that was killed had half written or half deleted."""
    for path in files.listed(directory):
        if path.name.endswith((DELETED, _UNFINISHED)):
            files.remove(path)


def _write_manifest(checkpoint: Path) -> None:
    """Writes the list of checksums at the very end, so that an interrupted save has none."""
    paths = {name: checkpoint / name for name in files.below(checkpoint)}
    listed = {name: (files.size(path), _checksum(path)) for name, path in paths.items()}
    files.replace(checkpoint / MANIFEST, json.dumps(listed).encode())


def _checksum(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):  # hashlib.file_digest refuses the files of some buckets.
            found.update(part)
    return found.hexdigest()


def _reason(error: Exception) -> str:
    """The reason that the operating system gave, also where TensorStore wraps it in a long text."""
    found = re.search(r"([^:]*) \[os_error_code=", str(error))
    if found:
        return found[1].strip()
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:300]


def _of_all_hosts(meta: dict[str, Any]) -> list[dict[str, Any]]:
    if jax.process_count() == 1:
        return [meta]
    text = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
    padded = np.pad(text, (0, int(sizes.max()) - text.size))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
