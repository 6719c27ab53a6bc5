"""Reads a config file, applies overrides to it, and makes the config of a run."""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import os
import runpy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.config.validation import finish
from experiments.errors import UserError, VariantError
from experiments.training import methods


def load(spec: str, function: str = "get_config") -> Any:
    """Calls a function of a config file; an error inside the file keeps its traceback.

    Args:
        spec: `path/to/NAME.py:VARIANT`; the function gets the variant if there is one.
        function: the name of the function.

    Raises:
        UserError: there is no such file, or the function is missing or takes no variant.
    """
    path, _, variant = spec.partition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"--config={spec}: no such file {path!r}; expected path/to/NAME.py:VARIANT")
    try:
        found = runpy.run_path(path).get(function)
        if found is None:
            raise UserError(f"--config={spec}: {path} defines no {function}()")
        if variant and not inspect.signature(found).parameters:
            raise UserError(f"--config={spec}: {function}() of {path} takes no variant")
        with named(spec):
            return found(variant) if variant else found()
    except SystemExit as error:
        raise UserError(f"--config={spec}: {path} ends the process: {error!r}") from error


@contextlib.contextmanager
def named(spec: str) -> Iterator[None]:
    """Says in an error about a variant which file does not have it."""
    try:
        yield
    except VariantError as error:
        raise UserError(f"--config={spec}: {error}") from None


def resolve(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The config of a run: loaded, overridden, validated, with derived values, and locked.

    The method's name is overridden first, since it decides which other keys there are.

    Args:
        spec: `path/to/NAME.py:VARIANT`.
        overrides: texts `KEY=VALUE`, with dots between the levels of KEY.
    """
    config, overrides = load(spec), list(overrides)
    if not isinstance(config, ConfigDict) or not {"task", "method", "name"} <= set(config):
        raise UserError(
            f"--config={spec}: get_config() returned a {type(config).__name__}; must be what "
            "experiments.config.base_config() returns"
        )
    for text in overrides:
        key = text.partition("=")[0]
        if key in ("task", "name", "command"):
            which = "records its own" if key == "command" else f"has the {key} of its config file"
            raise UserError(f"--config.{key}: cannot be overridden: a run {which}")
        if text.startswith("method.name="):
            override(config, text)
    methods.complete(config)
    keys = {override(config, text) for text in overrides}
    path, _, variant = spec.partition(":")
    own = [text for text in overrides if not text.startswith("seed=")]
    with config.unlocked():
        config.name = Path(path).stem + (f":{variant}" if variant else "")
        config.command = (f"--config={spec}", *(f"--config.{text}" for text in own))
    finish(config, keys)
    return config


def override(config: ConfigDict, text: str) -> str:
    """Sets one value from the text `KEY=VALUE`, keeping its type; returns the key."""
    key, equals, value = text.partition("=")
    flag = f"--config.{key}"
    if not equals:
        raise UserError(f"{flag}: no value; expected {flag}=VALUE")
    section: Any = config
    *parents, last = key.split(".")
    for part in [*parents, last]:
        if not isinstance(section, ConfigDict) or part not in section:
            lacks = f"no key {part!r}"
            if parents == ["method"]:
                lacks = f"{section.name} does not read it"
            raise UserError(f"{flag}: {lacks}; {_allowed(section, part)}")
        parent, section = section, section[part]
    if isinstance(section, ConfigDict):
        raise UserError(f"{flag}: is a section; set one of {', '.join(section)}")
    parent[last] = _parse(flag, section, value)
    return key


def _allowed(section: Any, key: str) -> str:
    names = list(section) if isinstance(section, ConfigDict) else []
    near = difflib.get_close_matches(key, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(sorted(names)) or 'nothing below'}"


def _parse(flag: str, old: Any, text: str) -> Any:
    if isinstance(old, str):
        return os.path.expanduser(text)  # of a path; a shell leaves the ~ of --flag=~/folder
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    if old is None or value is None or type(value) is type(old):
        accepted = old is None or value is not None
    elif isinstance(old, float) and type(value) is int and abs(value) <= sys.float_info.max:
        value, accepted = float(value), True
    elif isinstance(old, tuple) and isinstance(value, list | int | float):
        value, accepted = tuple(value) if isinstance(value, list) else (value,), True
    else:
        accepted = False
    if not accepted:
        raise UserError(f"{flag}={text}: expected {type(old).__name__}, like {old!r}")
    return value
