"""The rules of a config, and the values that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ml_collections import ConfigDict

from experiments import task as tasks
from experiments.config.checks import Check, check_values, integer, number, one_of, optional
from experiments.errors import UserError
from experiments.training import methods, optimizers
from topkast_jax.always_sparse import BACKENDS
from topkast_jax.always_sparse.products import INTERPRETED

_MESH: Check = (lambda v: type(v) is int and (v == -1 or v >= 1)), "an integer of at least 1, or -1"
_BOUNDARIES: Check = (
    lambda v: all(type(b) is int and b > 0 for b in v) and list(v) == sorted(set(v)),
    "ascending integers above 0",
)
# The arguments of a method are missing here, because its factory checks them.
_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("steps", "batch_size", "log_every", "keep_checkpoints"), integer(1)),
    **dict.fromkeys(("eval_every", "checkpoint_every", "keep_checkpoints_every"), integer(0)),
    "write_sets_every": integer(0),
    "seed": integer(0, 2**32),
    **dict.fromkeys(("mesh.data", "mesh.fsdp", "mesh.tensor"), _MESH),
    "method.seed": optional(integer(0, 2**32)),
    "method.refresh_delay": integer(0),
    "method.backend": one_of(None, *BACKENDS),
    "optimizer.learning_rate": number(0, above=True),
    "optimizer.reference_batch_size": integer(0),
    "optimizer.momentum": number(0, 1),
    # The corrections of the first steps divide by 1 - b1 and 1 - b2.
    **{f"optimizer.{key}": number(0, 1, below=True) for key in ("b1", "b2")},
    **{f"optimizer.{k}": number(0) for k in ("eps", "l2", "weight_decay", "clip_global_norm")},
    **{f"optimizer.schedule.{key}": integer(0) for key in ("warmup_steps", "reference_steps")},
    **{f"optimizer.schedule.{key}": number(0, 1) for key in ("factor", "final_factor")},
    "optimizer.schedule.boundaries": _BOUNDARIES,
}


def finish(config: ConfigDict, overridden: Iterable[str] = ()) -> None:
    """Validates a config, drops the keys that its choices do not read, and adds `derived`.

    Args:
        config: the config; it is changed in place and locked.
        overridden: the keys that the user set; it is an error if nothing reads one of them.
    """
    with config.unlocked():
        drop_unread(config, frozenset(overridden))
        check_values(config, _CHECKS)
        methods.follow_steps(config)
        methods.check(config)
        _check_together(config)
        tasks.task_module(config.task).validate(config)
        config.derived = _derived(config)
    config.lock()


def check(config: ConfigDict) -> None:
    """Raises UserError for what no run of any task can have; each task has rules of its own."""
    check_values(config, _CHECKS)
    methods.check(config)
    _check_together(config)


def drop_unread(config: ConfigDict, overridden: frozenset[str] = frozenset()) -> None:
    """Drops the keys that the chosen method, optimizer and schedule do not read.

    Raises:
        UserError: there is no such choice, or nothing reads a key that was overridden.
    """
    for section, known, read in (
        ("method", (config.method.name,), methods.method_keys),
        ("optimizer", optimizers.OPTIMIZERS, optimizers.optimizer_keys),
        ("optimizer.schedule", optimizers.SCHEDULES, optimizers.schedule_keys),
    ):
        part = config
        for name in section.split("."):
            part = part[name]
        if part.name not in known:
            raise UserError(
                f"config.{section}.name: found {part.name!r}; must be one of {', '.join(known)}"
            )
        for key in sorted(set(part) - {"name", *read(part)}):
            if f"{section}.{key}" in overridden:
                raise UserError(f"config.{section}.{key}: {_why_unread(part, key, read(part))}")
            del part[key]


def _why_unread(part: ConfigDict, key: str, read: Iterable[str]) -> str:
    if "always_sparse" in part and part.name != "dense":
        if key in methods.method_keys(part, "masked"):
            return f"always sparse always resets; leave {key} out"
        if key in methods.method_keys(part, "always_sparse"):
            return "is read only with config.method.always_sparse=True"
    return f"{part.name} does not read it; it reads {', '.join(read) or 'nothing'}"


def _check_together(config: ConfigDict) -> None:
    method, schedule = config.method, config.optimizer.schedule
    delay, every = method.get("refresh_delay", 0), method.get("refresh_every") or math.inf
    if delay >= every:
        raise UserError(
            f"config.method.refresh_delay: found {delay}; must be below refresh_every={every}, so "
            "that one choice is in use before the next begins"
        )
    small = config.model.get("small_dense")
    if small is not None:
        methods.read_rules(small.rules, key="config.model.small_dense.rules")
        if 0 < small.get("forward_density", 1) < 1 and method.name != "dense":
            raise UserError(
                f"config.model.small_dense.forward_density: found {small.forward_density!r}; must "
                f"be 1 with config.method.name={method.name}, because a narrow network is dense"
            )
        if small.rules and small.get("forward_density") == 1:
            raise UserError(
                f"config.model.small_dense.rules: found {small.rules!r}; must be empty, because "
                "only a config.model.small_dense.forward_density below 1 reads them"
            )
    if method.get("backend") in INTERPRETED and not methods.has_blocks(method):
        raise UserError(
            f"config.method.backend: found {method.backend!r} and no pattern of blocks; "
            "must be None, 'xla' or 'native_cpu', which take single entries too"
        )
    if schedule.name == "step" and not schedule.boundaries:
        raise UserError(
            "config.optimizer.schedule.boundaries: found none; 'step' needs one or more"
        )
    early = [b for b in schedule.get("boundaries", ()) if b <= schedule.warmup_steps]
    if schedule.name == "step" and early:
        raise UserError(
            f"config.optimizer.schedule.boundaries: found {early[0]}; must be above "
            f"warmup_steps={schedule.warmup_steps}"
        )
    if sum(v == -1 for v in config.mesh.values()) > 1:
        raise UserError(f"config.mesh: found {dict(config.mesh)}; at most one of them may be -1")
    if _scaled(config, schedule.warmup_steps) >= config.steps:
        raise UserError(
            f"config.optimizer.schedule.warmup_steps: found {schedule.warmup_steps}; "
            f"must be below steps={config.steps}"
        )


def _scaled(config: ConfigDict, steps: int) -> int:
    reference = config.optimizer.schedule.reference_steps
    return round(steps * config.steps / reference) if reference else steps


def _derived(config: ConfigDict) -> ConfigDict:
    """The values that follow from others, once all overrides are applied."""
    reference = config.optimizer.reference_batch_size
    scale = config.batch_size / reference if reference else 1.0
    schedule = config.optimizer.schedule
    return ConfigDict(
        {
            "learning_rate": config.optimizer.learning_rate * scale,
            "warmup_steps": _scaled(config, schedule.warmup_steps),
            "boundaries": tuple(_scaled(config, b) for b in schedule.get("boundaries", ())),
        }
    )
