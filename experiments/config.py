"""Configs: defaults, overrides, validation and derived values, in one place."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from experiments import optimizers
from experiments import task as tasks
from experiments.errors import UserError
from experiments.validation import finish


def base_config(task: str) -> ConfigDict:
    """The defaults of a task, to be changed by a config file; no keys can be added.

    Args:
        task: a registered task; gives the sections `model` and `data`.
    """
    own = tasks.task_module(task).default_config()
    config = ConfigDict(
        {
            "name": "",
            "task": task,
            "seed": 0,
            "steps": 1000,
            "batch_size": 128,
            "log_every": 100,
            "eval_every": 0,  # 0: only at the end
            "eval_at_end": True,
            "checkpoint_every": 0,  # 0: only at the end
            "keep_checkpoints": 2,
            "model": own.model,
            "data": own.data,
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.1,
                "reference_batch_size": 0,  # learning_rate is for this batch size; 0: for any
                "momentum": 0.9,
                "nesterov": False,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "l2": 0.0,  # in the gradient; where the method has its own penalty, on dense leaves
                "weight_decay": 0.0,  # decoupled from the gradient
                "clip_global_norm": 0.0,  # 0: no clipping
                "schedule": {
                    "name": "constant",
                    "warmup_steps": 0,
                    "boundaries": (),
                    "factor": 0.1,
                    "final_factor": 0.0,
                    "reference_steps": 0,  # warm-up and boundaries are for this many steps; 0: any
                },
            },
            "method": optimizers.method_defaults(),
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )
    return config.lock()


def apply_variant(config: ConfigDict, variant: str, flags: Sequence[str] = ("smoke",)) -> set[str]:
    """Sets the method from a variant, a comma list.

    Args:
        config: changed in place.
        variant: words of `dense`, `F/B` (Top-KAST; forward and backward sparsity in percent) and
            `static-F` (a fixed random mask), and of the flags.
        flags: words that the config file acts on itself.

    Returns:
        The flags that are in the variant.
    """
    found = set()
    for word in filter(None, (word.strip() for word in variant.split(","))):
        if word in flags:
            found.add(word)
        else:
            _apply_method(config.method, word, flags)
    return found


def _apply_method(method: ConfigDict, word: str, flags: Sequence[str]) -> None:
    try:
        if word == "dense":
            method.name = "dense"
        elif word.startswith("static-"):
            method.name = "static_random"
            method.forward_density = _density(word.removeprefix("static-"))
        else:
            forward, backward = word.split("/")
            method.name = "top_kast"
            method.forward_density = _density(forward)
            method.backward_density = _density(backward)
    except ValueError:
        allowed = ", ".join(["dense", "F/B", "static-F", *flags])
        raise UserError(f"variant {word!r}: allowed: {allowed} (F, B: sparsity in %)") from None


def _density(percent: str) -> float:
    return round(1 - float(percent) / 100, 9)


def load(spec: str, function: str = "get_config") -> Any:
    """What a config file's function gives: `path/to/NAME.py:VARIANT`."""
    path, _, variant = spec.partition(":")
    module = load_file(path, f"--config={spec}")
    if not hasattr(module, function):
        raise UserError(f"--config={spec}: {path} defines no {function}()")
    try:
        return getattr(module, function)(*([variant] if variant else []))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--config={spec}: {type(error).__name__}: {error}") from error


def load_file(path: str, flag: str) -> ModuleType:
    """Runs a config file."""
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"{flag}: no such file {path!r}; expected path/to/NAME.py:VARIANT")
    spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{flag}: {type(error).__name__}: {error}") from error
    return module


def resolve(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The config of a run: loaded, overridden, validated, with derived values, frozen.

    Args:
        spec: `path/to/NAME.py:VARIANT`.
        overrides: `KEY=VALUE`, dots between the levels of KEY.
    """
    config = load(spec)
    keys = {override(config, text) for text in overrides}
    path, _, variant = spec.partition(":")
    config.name = Path(path).stem + (f":{variant}" if variant else "")
    finish(config, keys)
    return config


def override(config: ConfigDict, text: str) -> str:
    """Sets one value from `KEY=VALUE`, keeping its type; returns the key."""
    key, equals, value = text.partition("=")
    flag = f"--config.{key}"
    if not equals:
        raise UserError(f"{flag}: no value; expected {flag}=VALUE")
    section: Any = config
    *parents, last = key.split(".")
    for part in [*parents, last]:
        if not isinstance(section, ConfigDict) or part not in section:
            raise UserError(f"{flag}: {_no_key(section, part)}")
        parent, section = section, section[part]
    if isinstance(section, ConfigDict):
        raise UserError(f"{flag}: is a section; set one of {', '.join(section)}")
    parent[last] = _parse(flag, section, value)
    return key


def _no_key(section: Any, key: str) -> str:
    names = list(section) if isinstance(section, ConfigDict) else []
    near = difflib.get_close_matches(key, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no key {key!r}; {hint}allowed: {', '.join(sorted(names)) or 'nothing below'}"


def _parse(flag: str, old: Any, text: str) -> Any:
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        value = text
    if old is None or value is None or type(value) is type(old):
        accepted = old is None or value is not None
    elif isinstance(old, float) and type(value) is int:
        value, accepted = float(value), True
    elif isinstance(old, tuple) and isinstance(value, list | int | float):
        value, accepted = tuple(value) if isinstance(value, list) else (value,), True
    else:
        accepted = False
    if not accepted:
        raise UserError(f"{flag}={text}: expected {type(old).__name__}, like {old!r}")
    return value
