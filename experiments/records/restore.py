"""Reads a run that is not trained further: its config and its newest state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.config import base_config
from experiments.config.validation import check, drop_unread
from experiments.errors import UserError
from experiments.records import checkpoints, workdir
from experiments.training import methods
from experiments.training.partition import all_devices
from experiments.training.program import Program, build
from experiments.training.state import TrainState

ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Saved:
    """A run read from its folder, on one device.

    Attributes:
        config: the config as resolved when the run was made, mesh included.
        program: what the run compiles.
        state: the state of its newest undamaged checkpoint.
        hosts: what is stored next to the state, by host.
    """

    config: ConfigDict
    program: Program
    state: TrainState
    hosts: list[dict[str, Any]]


def read_config(directory: Path, task: str | None = None) -> ConfigDict:
    """The config of a run.

    Raises:
        UserError: there is no run in the folder, or one of another task.
    """
    if not (directory / workdir.CONFIG).is_file():
        raise UserError(f"--workdir={directory}: holds no {workdir.CONFIG}; must be a run's folder")
    config = ConfigDict(workdir.read_json(directory / workdir.CONFIG))
    if task is not None and config.get("task") != task:
        raise UserError(f"--workdir={directory}: holds a run of task {config.get('task')!r}")
    try:
        _check(config)
    except UserError as error:
        raise UserError(f"{directory / workdir.CONFIG}: {error}") from error
    return config


def _check(config: ConfigDict) -> None:
    """Checks a config that another version of this code may have written.

    It may lack what does not change what a run computes (`workdir.FREE`).
    """
    saved = workdir.flat(config.to_dict())
    # A model or a data set from a user's own file reads keys of its own.
    own = [part for part in ("model", "data") if ":" in str(saved.get(f"{part}.name"))]
    needed = _needed(saved)
    sections = {key for key in needed if isinstance(needed[key], ConfigDict)}
    for key in sections.intersection(config):
        if not isinstance(config[key], ConfigDict):
            raise UserError(f"config.{key}: found {config[key]!r}; must be a section with keys")
    for key, like in workdir.flat(needed.to_dict()).items():
        if key.partition(".")[0] in own or (key not in saved and workdir.is_free(key)):
            continue
        kinds = {float: (int, float), tuple: (list,), type(None): (object,)}
        may_be_none = key.startswith("method.") and key != "method.always_sparse"
        if key not in saved:
            raise UserError(f"config.{key}: is missing; a run of this version has it")
        if saved[key] is None and may_be_none:
            continue
        if not isinstance(saved[key], kinds.get(type(like), (type(like),))):
            raise UserError(f"config.{key}: found {saved[key]!r}; must be like {like!r}")
    check(config)


def _needed(saved: dict[str, Any]) -> ConfigDict:
    """The default config, with the keys that a saved config's choices read."""
    config = base_config(str(saved.get("task")))
    config.method.name = str(saved.get("method.name"))
    methods.complete(config)
    if "always_sparse" in config.method:
        config.method.always_sparse = saved.get("method.always_sparse") is True
    config.optimizer.name = str(saved.get("optimizer.name"))
    config.optimizer.schedule.name = str(saved.get("optimizer.schedule.name"))
    with config.unlocked():
        drop_unread(config)
        config.derived = {"learning_rate": 0.0, "warmup_steps": 0, "boundaries": ()}
    return config


def read(directory: Path, task: str | None = None) -> Saved:
    """A run and its newest state; raises UserError if there is no run or no checkpoint."""
    config = read_config(directory, task)
    program = build(on_one_device(config), all_devices()[:1])
    abstract = program.representation.abstract
    return Saved(config, program, *checkpoints.load(directory / workdir.CHECKPOINTS, abstract))


def on_one_device(config: ConfigDict) -> ConfigDict:
    """A copy of a config for a process that only reads, on one device of any platform."""
    copy = config.copy_and_resolve_references()
    copy.mesh = ONE_DEVICE
    if "backend" in copy.method:
        copy.method.backend = None
    return copy


def with_representation(config: ConfigDict, to: str) -> ConfigDict:
    """The config of the same run in another representation, "masked" or "always_sparse".

    Raises:
        UserError: the run is dense.
    """
    if methods.representation(config.method) == "dense":
        raise UserError("the run is dense: it has no sets, and no other representation")
    method = config.method.to_dict() | {"always_sparse": to == "always_sparse"}
    filled = {"inner_state": "reset"} | methods.COMPACT | method
    keys = ("name", *methods.method_keys(ConfigDict(method)))
    copy = config.copy_and_resolve_references()
    copy.method = ConfigDict({key: filled[key] for key in keys})
    with copy.unlocked():
        copy.command = ()  # That of the run makes its own representation.
    return copy
