"""Checkpoints: Orbax stores the arrays, and a list of checksums says which saves are complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from experiments.errors import UserError, warn

MANIFEST = "MANIFEST.json"
ASIDE = "damaged"
DELETED = ".deleted"  # ends the name of a checkpoint that is being deleted
Tree = Any


class Checkpoints:
    """The checkpoints of one run, in `directory/STEP`. Only undamaged ones are used."""

    def __init__(self, directory: Path, keep: int):
        """Opens them. Damaged ones are named in a warning and moved to `directory/damaged`.

        Args:
            directory: the folder of the checkpoints, which is made if it is missing.
            keep: the number of checkpoints to keep.

        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        self.directory = directory.absolute()
        self._keep = keep
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            _remove_deleted(self.directory)
            _set_damaged_aside(self.directory)
        _sync("damaged checkpoints moved")
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Saves the state, and `meta` of every host as JSON; returns when all of it is on disk."""
        items = {
            "state": ocp.args.StandardSave(state),
            "meta": ocp.args.JsonSave({"hosts": _of_all_hosts(meta)}),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))
        if jax.process_index() == 0:
            _write_manifest(self.directory / str(step))
        _sync("manifest written")
        old = sorted(self._manager.all_steps())[: -self._keep]
        if old and jax.process_index() == 0:
            for step in old:
                (self.directory / str(step)).rename(self.directory / f"{step}{DELETED}")
            _remove_deleted(self.directory)
        if old:
            _sync("old checkpoints deleted")
            self._manager.reload()

    def restore(self, abstract: Callable[[int], Tree]) -> tuple[Tree, dict[str, Any]] | None:
        """Reads the newest state directly into its shards, and the meta of this host.

        Args:
            abstract: gives the shapes, types and shardings of the state after so many steps.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        state, hosts = _restore(self._manager, step, abstract(step))
        if len(hosts) != jax.process_count():
            raise UserError(
                f"{self.directory}: saved by {len(hosts)} hosts, and the data can only continue on "
                f"as many; found {jax.process_count()}"
            )
        return state, hosts[jax.process_index()]

    def close(self) -> None:
        """Ends the background work of Orbax."""
        self._manager.close()


def load(directory: Path, abstract: Callable[[int], Tree]) -> tuple[Tree, dict[str, Any]]:
    """Reads the newest undamaged checkpoint of a run, and the meta of its first host.

    Raises:
        UserError: there is no such checkpoint.
    """
    steps = _steps(directory) if directory.is_dir() else []
    for step in reversed(steps):
        if damage(directory / str(step)) is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
            with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
                state, hosts = _restore(manager, step, abstract(step))
                return state, hosts[0]
        warn(f"checkpoint {directory / str(step)} is damaged: {damage(directory / str(step))}")
    raise UserError(f"{directory}: no whole checkpoint; found steps {steps}")


def newest(directory: Path) -> int:
    """The step of the newest checkpoint whose save was finished; 0 if there is none."""
    steps = _steps(directory) if directory.is_dir() else []
    return max((step for step in steps if (directory / str(step) / MANIFEST).exists()), default=0)


def damage(checkpoint: Path) -> str | None:
    """A description of what is wrong with a checkpoint; None if nothing is."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())
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
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _checksum(path) != checksum:
            return f"{name} has another checksum"
    return None


def _restore(manager: Any, step: int, abstract: Tree) -> tuple[Tree, list[dict[str, Any]]]:
    items = {"state": ocp.args.StandardRestore(abstract), "meta": ocp.args.JsonRestore()}
    try:
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    except ValueError as error:
        raise UserError(
            f"{manager.directory / str(step)}: holds another state than this config makes, or was "
            f"saved by another version: {str(error).strip().splitlines()[0]}"
        ) from error
    return restored["state"], restored["meta"]["hosts"]


def _steps(directory: Path) -> list[int]:
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isascii() and p.name.isdigit())


def _set_damaged_aside(directory: Path) -> None:
    steps = _steps(directory)
    damaged = {step: why for step in steps if (why := damage(directory / str(step)))}
    # The first save of a run may have been cut off; a later one leaves those before it whole.
    unfinished = len(steps) == 1 and not (directory / str(steps[0]) / MANIFEST).exists()
    if damaged and len(damaged) == len(steps) and not unfinished:
        each = "; ".join(f"{step}: {why}" for step, why in damaged.items())
        raise UserError(
            f"{directory}: every checkpoint is damaged ({each}); move it away to begin anew"
        )
    for step, why in damaged.items():
        aside = directory / ASIDE
        aside.mkdir(exist_ok=True)
        taken = sum(p.name.split(".")[0] == str(step) for p in aside.iterdir())
        target = aside / (f"{step}.{taken}" if taken else str(step))
        (directory / str(step)).rename(target)
        warn(f"checkpoint {directory / str(step)} is not used and moved to {target}: {why}")


def _remove_deleted(directory: Path) -> None:
    """Ends deletions, also those of a process that was killed meanwhile."""
    for path in directory.glob(f"*{DELETED}"):
        shutil.rmtree(path)


def _write_manifest(checkpoint: Path) -> None:
    """Writes the list of checksums at the very end, so that an interrupted save has none."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    listed = {str(p.relative_to(checkpoint)): (p.stat().st_size, _checksum(p)) for p in files}
    unfinished = checkpoint / (MANIFEST + ".tmp")
    with open(unfinished, "w") as file:
        json.dump(listed, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(checkpoint / MANIFEST)


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
