"""What a config may say, and what follows from it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import ConfigDict

from experiments import task as tasks
from experiments.errors import UserError
from experiments.training import methods, optimizers
from topkast_jax.always_sparse import BACKENDS

Check = tuple[Callable[[Any], bool], str]


def finish(config: ConfigDict, overridden: Iterable[str] = ()) -> None:
    """Validates a config, drops what its choices do not read, and adds `derived`.

    Args:
        config: changed in place and locked.
        overridden: keys that the user set, an error if nothing reads them.
    """
    with config.unlocked():
        _drop_unread(config, frozenset(overridden))
        _check_values(config)
        _check_together(config)
        tasks.task_module(config.task).validate(config)
        config.derived = _derived(config)
    config.lock()


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Check:
    def fits(v: Any) -> bool:
        real = isinstance(v, numbers.Real) and not isinstance(v, bool) and math.isfinite(v)
        return real and (low < v if above else low <= v) and v <= high

    text = f"a number {'above' if above else 'of at least'} {low:g}"
    return fits, text + (f" and at most {high:g}" if math.isfinite(high) else "")


def _integer(low: int) -> Check:
    return (lambda v: type(v) is int and v >= low), f"an integer of at least {low}"


def _optional(check: Check) -> Check:
    return (lambda v: v is None or check[0](v)), f"None or {check[1]}"


def _one_of(*allowed: Any) -> Check:
    return (lambda v: v in allowed), "one of " + ", ".join(map(repr, allowed))


def _parses(read: Callable[[Any], Any], rule: str) -> Check:
    def fits(v: Any) -> bool:
        try:
            read(v)
        except (UserError, ValueError):
            return False
        return True

    return fits, rule


_BOOLEAN: Check = (lambda v: isinstance(v, bool)), "True or False"
_MESH: Check = (lambda v: type(v) is int and (v == -1 or v >= 1)), "an integer of at least 1, or -1"
_BOUNDARIES: Check = (
    lambda v: all(type(b) is int and b > 0 for b in v) and list(v) == sorted(set(v)),
    "ascending integers above 0",
)

_VALUES: dict[str, Check] = {
    "seed": _integer(0),
    "steps": _integer(1),
    "batch_size": _integer(1),
    "log_every": _integer(1),
    "eval_every": _integer(0),
    "eval_at_end": _BOOLEAN,
    "checkpoint_every": _integer(0),
    "keep_checkpoints": _integer(1),
    "optimizer.learning_rate": _number(0, above=True),
    "optimizer.reference_batch_size": _integer(0),
    "optimizer.momentum": _number(0, 1),
    "optimizer.nesterov": _BOOLEAN,
    "optimizer.b1": _number(0, 1),
    "optimizer.b2": _number(0, 1),
    "optimizer.eps": _number(0),
    "optimizer.l2": _number(0),
    "optimizer.weight_decay": _number(0),
    "optimizer.clip_global_norm": _number(0),
    "optimizer.schedule.warmup_steps": _integer(0),
    "optimizer.schedule.boundaries": _BOUNDARIES,
    "optimizer.schedule.factor": _number(0, 1),
    "optimizer.schedule.final_factor": _number(0, 1),
    "optimizer.schedule.reference_steps": _integer(0),
    "method.forward_density": _number(0, 1, above=True),
    "method.backward_density": _number(0, 1, above=True),
    "method.refresh_every": _integer(1),
    "method.exploration_weight": _number(0),
    "method.exploration_norm": _one_of("l1", "l2"),
    "method.stop_exploring_at": _optional(_integer(0)),
    "method.inner_state": _one_of("keep", "reset"),
    "method.distribution": _one_of("uniform", "erk"),
    "method.pattern": _parses(
        methods.read_pattern, "'unstructured' or 'block:RxC' with integers R and C above 0"
    ),
    "method.rules": _parses(
        methods.read_rules,
        "None or pairs (regular expression, 'dense', 'sparse' or a dict of "
        "forward_density, backward_density, pattern, distribution, stacked)",
    ),
    "method.seed": _optional(_integer(0)),
    "method.always_sparse": _BOOLEAN,
    "method.refresh_delay": _integer(0),
    "method.backend": _one_of(None, *BACKENDS),
    "mesh.data": _MESH,
    "mesh.fsdp": _MESH,
    "mesh.tensor": _MESH,
}


def _drop_unread(config: ConfigDict, overridden: frozenset[str]) -> None:
    """Leaves in the choosing sections only what the chosen thing reads."""
    for section, known, read in (
        ("method", methods.method_names(), methods.method_keys),
        ("optimizer", optimizers.OPTIMIZERS, optimizers.optimizer_keys),
        ("optimizer.schedule", optimizers.SCHEDULES, optimizers.schedule_keys),
    ):
        part = _get(config, section)
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


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part)
    return config


def _check_values(config: ConfigDict) -> None:
    for key, (fits, rule) in _VALUES.items():
        section, _, last = key.rpartition(".")
        parent = _get(config, section) if section else config
        if last in parent and not fits(parent[last]):
            raise UserError(f"config.{key}: found {parent[last]!r}; must be {rule}")


def _check_together(config: ConfigDict) -> None:
    method, schedule = config.method, config.optimizer.schedule
    forward, backward = method.get("forward_density"), method.get("backward_density")
    if forward and backward and backward < forward:
        raise UserError(
            f"config.method.backward_density: found {backward}, below forward_density {forward}; "
            "must be at least that, since the backward set contains the forward set"
        )
    delay, every = method.get("refresh_delay", 0), method.get("refresh_every", math.inf)
    if type(delay) is int and delay >= every:
        raise UserError(
            f"config.method.refresh_delay: found {delay}; must be below refresh_every={every}, so "
            "that one choice is in use before the next begins"
        )
    if method.get("backend") and not methods.has_blocks(method):
        raise UserError(
            f"config.method.backend: found {method.backend!r} and no pattern of blocks; "
            "must be None, for blocks alone have kernels"
        )
    if schedule.name == "step" and not schedule.boundaries:
        raise UserError(
            "config.optimizer.schedule.boundaries: found none; 'step' needs one or more"
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
    """Values that follow from others, after overrides."""
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
