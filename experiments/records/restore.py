"""A run that is only read: its config, its newest state, and the same in the other form."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.errors import UserError
from experiments.records import checkpoints, workdir
from experiments.training import methods
from experiments.training.partition import all_devices
from experiments.training.program import Run, build
from experiments.training.representation import Compact
from experiments.training.state import TrainState
from topkast_jax import SparsityError

ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Saved:
    """A run out of its folder, on one device.

    Attributes:
        config: as resolved when it was made, mesh included.
        run: its parts.
        state: of its newest whole checkpoint.
        meta: what is beside the state there.
    """

    config: ConfigDict
    run: Run
    state: TrainState
    meta: dict[str, Any]


def read_config(directory: Path, task: str | None = None) -> ConfigDict:
    """The config of a run.

    Raises:
        UserError: no run there, or one of another task than asked for.
    """
    if not (directory / workdir.CONFIG).is_file():
        raise UserError(f"--workdir={directory}: holds no {workdir.CONFIG}; must be a run's folder")
    config = ConfigDict(workdir.read_json(directory / workdir.CONFIG))
    if task is not None and config.get("task") != task:
        raise UserError(f"--workdir={directory}: holds a run of task {config.get('task')!r}")
    return config


def read(directory: Path, task: str | None = None) -> Saved:
    """A run and its newest state; `read_config`'s errors, and UserError without a checkpoint."""
    config = read_config(directory, task)
    run = build(on_one_device(config), all_devices()[:1])
    state, meta = checkpoints.load(directory / workdir.CHECKPOINTS, run.form.abstract)
    return Saved(config, run, state, meta)


def on_one_device(config: ConfigDict) -> ConfigDict:
    """A copy for a process that reads alone, on whatever platform."""
    copy = config.copy_and_resolve_references()
    copy.mesh = ONE_DEVICE
    if "backend" in copy.method:
        copy.method.backend = None
    return copy


def is_compact(config: ConfigDict) -> bool:
    """Whether a config's run is always sparse."""
    return bool(config.method.get("always_sparse", False))


def other_form(config: ConfigDict) -> ConfigDict:
    """The config whose run is the same in the other form: masks, or always sparse.

    Raises:
        UserError: the run is dense.
    """
    if config.method.name == "dense":
        raise UserError("the run is dense: it has no sets, and one form")
    method = config.method.to_dict() | {"always_sparse": not is_compact(config)}
    filled = {"inner_state": "reset"} | methods.COMPACT | method
    keys = ("name", *methods.method_keys(ConfigDict(method)))
    copy = config.copy_and_resolve_references()
    copy.method = ConfigDict({key: filled[key] for key in keys})
    return copy


def in_compact_form(saved: Saved) -> tuple[Any, Any]:
    """Parameters and optimizer state on the device, always sparse if the run has such a form."""
    state = saved.state
    if saved.config.method.name == "dense" or is_compact(saved.config):
        return state.params, state.opt_state
    try:
        twin = build(on_one_device(other_form(saved.config)), all_devices()[:1])
        assert isinstance(twin.form, Compact)
        params, opt_state, _ = twin.form.sparse.from_masked(state.params, state.opt_state)
    except SparsityError:  # a method, density or optimizer that masks alone can have
        return state.params, state.opt_state
    return params, opt_state
