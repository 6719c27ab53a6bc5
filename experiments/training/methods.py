"""From `config.method` to the sparsity method around an optimizer."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable
from typing import Any, cast

import optax
from ml_collections import ConfigDict

import topkast_jax as tk
from experiments.errors import UserError
from experiments.registry import Registry
from topkast_jax.rules import default_specs
from topkast_jax.sparsify import Plan, SparseTransform
from topkast_jax.trees import flatten_with_names

Tree = Any
# These stand for arguments that a factory requires.
_DEFAULTS = {"forward_density": 0.1, "backward_density": 0.2, "pattern": "unstructured"}
# The keys that only an always-sparse run reads, with their defaults.
COMPACT = {"refresh_delay": 0, "backend": None}
# The keys that every run with sets reads, with their defaults.
_OF_A_RUN = {"always_sparse": False, "scale_to_fan_in": False}
# Shares of the steps that stand for None, as in the papers of the methods.
_SHARES: dict[str, dict[str, float]] = {
    "pruning": {"begin_at": 0.2, "end_at": 0.8},
    **{name: {"last_choice_at": 0.75} for name in ("rigl", "set", "snfs", "srigl")},
}
_PATTERNS: dict[str, Callable[..., tk.Pattern]] = {
    "unstructured": tk.Unstructured,
    r"block:(\d+)x(\d+)": tk.Block,
    r"(\d+):(\d+)": tk.NOfM,
    "channel": tk.Channel,
    "fan_in": tk.FanIn,
}
_OWN = ("name", "distribution", *_OF_A_RUN, *COMPACT)  # These are no arguments of a factory.


class MethodSection(ConfigDict):
    """The section `method` while a config file runs: the name, and what the file has set.

    What can be set are the arguments of the method that has been named and of registered ones.
    `complete` drops those of other methods than the last, and adds the defaults. An interval that
    was set for another method is forgotten where a method is named that chooses in every step: an
    interval is no default for it (DNW moves all entries as if they were in use).
    """

    def __setitem__(self, key: str, value: Any) -> None:
        """Sets a value, of the type of its default; KeyError if it is no argument."""
        if key != "name" and key not in self:
            known: dict[str, Any] = {}
            for name in (*tk.methods.names(), self.name):
                known |= method_defaults(name)
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise KeyError(
                    f"config.method: {self.name} has no argument {key!r}; {hint}name a method "
                    "before its arguments"
                )
            super().__setitem__(key, known[key])
        super().__setitem__(key, value)
        if key == "name" and "refresh_every" in self and _chooses_in_every_step(value):
            del self["refresh_every"]

    def lock(self) -> MethodSection:
        """Does nothing: `__setitem__` says which keys may be added."""
        return self


def _chooses_in_every_step(name: str) -> bool:
    known = name in tk.methods.names()
    return known and method_defaults(name).get("refresh_every") == 1


def complete(config: ConfigDict) -> None:
    """Makes the section `method` that of the method it names.

    Arguments that the config file has set are kept where the method has them, all others have the
    method's own defaults.

    Raises:
        UserError: there is no such method, or a value is of another type than its default.
    """
    section = ConfigDict(method_defaults(config.method.name))
    for key, value in config.method.items():
        if key in section:
            try:
                section[key] = value
            except TypeError:
                raise UserError(
                    f"config.method.{key}: found {value!r}; must be a "
                    f"{type(section[key]).__name__}, like {section[key]!r}"
                ) from None
    with config.unlocked():
        del config.method
        config.method = section


def representation(method: ConfigDict) -> str:
    """How a run with this section `method` holds its parameters.

    Returns:
        "dense", "masked" or "always_sparse"; see `experiments.training.representation`.
    """
    if method.name == "dense":
        return "dense"
    return "always_sparse" if method.always_sparse else "masked"


def method_keys(method: ConfigDict, held: str | None = None) -> tuple[str, ...]:
    """The keys of `config.method` that a method reads: those of its factory and its representation.

    Args:
        method: the section.
        held: the representation; None stands for that of the section.
    """
    held = held or representation(method)
    if held == "dense":
        return ()
    arguments = _arguments(method.name)
    keys = (*arguments, *(("distribution",) if "rules" in arguments else ()), *_OF_A_RUN)
    if held == "masked":
        return keys
    own = [key for key in COMPACT if key != "refresh_delay" or "refresh_every" in keys]
    return (*(key for key in keys if key != "inner_state"), *own)


def method_defaults(name: str) -> dict[str, Any]:
    """The section `method` for a method: the arguments of its factory with their defaults.

    A seed of None stands for that of the config. None also stands for a default that a config
    cannot hold, such as an object.
    """
    section: dict[str, Any] = {"name": name}
    if name == "dense":
        return section
    for key, argument in _arguments(name).items():
        section[key] = _default(argument)
    if "seed" in section:
        section["seed"] = None
    if section.get("pattern", "") is None and name in tk.methods.names():
        section["pattern"] = _DEFAULTS["pattern"]
    if "rules" in section:
        section["distribution"] = "uniform"
    return section | _OF_A_RUN | COMPACT


def _arguments(name: str) -> dict[str, inspect.Parameter]:
    arguments = inspect.signature(_factory(name)).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {k: p for k, p in list(arguments.items())[1:] if p.kind in named}
    for key in _OWN:
        if key in found:
            raise UserError(f"config.method.name: {name!r} has an argument {key!r}; rename it")
    return found


def _factory(name: str) -> tk.methods.Factory:
    """The factory of a registered name or of an import path."""
    registered: dict[str, Any] = {n: tk.methods.get(n) for n in tk.methods.names()}
    kind = _is_factory, "a factory, called as factory(optimizer, **arguments)"
    found = Registry("config.method.name", {"dense": None, **registered}, kind).get(name)
    return cast(tk.methods.Factory, found)


def _is_factory(found: Any) -> bool:
    """Whether something takes an optimizer first, and says which arguments it takes."""
    try:
        inspect.signature(found).bind_partial("optimizer")
    except (TypeError, ValueError):
        return False
    return True


def _required(argument: inspect.Parameter) -> bool:
    return argument.default is inspect.Parameter.empty


def _default(argument: inspect.Parameter) -> Any:
    """The default of an argument as a config holds it; None if it cannot."""
    if _required(argument):
        return _DEFAULTS.get(argument.name)
    if argument.name == "pattern" and argument.default is not None:
        return pattern_text(argument.default)
    try:
        json.dumps(argument.default)
    except TypeError:
        return None
    return argument.default


def follow_steps(config: ConfigDict) -> None:
    """Fills in the schedule of a method whose sets must change, from the steps of the run.

    Raises:
        UserError: the schedule does not fit the steps.
    """
    method, steps = config.method, config.steps
    every = method.get("refresh_every")
    if method.name not in _SHARES or type(every) is not int or every < 1:
        return
    if every >= steps:
        raise UserError(
            f"config.method.refresh_every: found {every}; must be below steps={steps}, or "
            f"{method.name} never uses a choice"
        )
    last = steps if "last_choice_at" in method else steps // every * every
    for key, share in _SHARES[method.name].items():
        if method[key] is None:
            # A short run has one choice at least.
            least = every + 1 if key == "last_choice_at" else 0
            method[key] = min(max(round(share * steps), least), last)
        elif type(method[key]) is int and method[key] > last:
            why = "" if last == steps else ", the last choice,"
            raise UserError(
                f"config.method.{key}: found {method[key]}; must be at most {last}{why} with "
                f"steps={steps}"
            )


def check(config: ConfigDict) -> None:
    """Raises UserError unless the factory of the config's method takes the values of its section.

    The pattern, the rules and the distribution are read as well. Whether they fit the parameters is
    known only when the optimizer of a run is made.
    """
    method = config.method
    if representation(method) != "dense":
        rules = read_rules(method.get("rules"), method.get("distribution", "uniform"))
        _make_transform(config, optax.identity(), rules)


def make_method(
    config: ConfigDict, inner: optax.GradientTransformation, params: Tree
) -> SparseTransform:
    """The transformation of the method that the config names, around an optimizer.

    Args:
        config: a validated config.
        inner: the optimizer.
        params: the abstract parameters.
    """
    tx = _make_transform(config, inner, _rules(config.method, params))
    if not isinstance(tx, SparseTransform):
        raise UserError(
            f"config.method.name: {config.method.name!r} makes a {type(tx).__name__}; its factory "
            "must return what topkast_jax.sparsify returns"
        )
    if config.method.scale_to_fan_in and tx.plan.method.first_choice != "init":
        raise UserError(
            f"config.method.scale_to_fan_in: found True; must be False with {config.method.name}, "
            "whose first sets are chosen from the first gradient"
        )
    _check_patterns(tx, params)
    return tx


def sparsity_plan(config: ConfigDict, params: Tree) -> Plan | None:
    """What the method of a run was asked for; None of a dense run.

    Args:
        config: a validated config.
        params: the abstract parameters.
    """
    if representation(config.method) == "dense":
        return None
    return make_method(config, optax.identity(), params).plan


def _make_transform(
    config: ConfigDict,
    inner: optax.GradientTransformation,
    rules: list[tuple[str, Any]] | None,
) -> optax.GradientTransformation:
    method = config.method
    options: dict[str, Any] = {}
    for key, argument in _arguments(method.name).items():
        value = method.get(key)
        if key == "rules":
            options[key] = rules
        elif key == "seed":
            options[key] = config.seed if value is None else value
        elif key == "pattern" and value is not None:
            options[key] = read_pattern(value)
        # Elsewhere None stands for the factory's own default, if a config cannot hold that.
        elif value is not None or (key in method and _default(argument) is not None):
            options[key] = value
        elif _required(argument):
            raise UserError(f"config.method.{key}: found None; {method.name} needs a value")
    try:
        return _factory(method.name)(inner, **options)
    except tk.SparsityError as error:
        raise UserError(f"config.method.{error}") from error


def _check_patterns(tx: SparseTransform, params: Tree) -> None:
    try:
        tx.plan.leaves(params)
    except tk.SparsityError as error:
        if not re.search(r"\) (does not divide|needs two axes)", str(error)):
            raise
        raise UserError(
            f"{error}; choose another config.method.pattern, or leave that leaf dense by "
            "config.method.rules"
        ) from error


def read_pattern(text: str) -> tk.Pattern:
    """The pattern of a text: `unstructured`, `block:RxC`, `N:M`, `channel` or `fan_in`."""
    for expression, make in _PATTERNS.items():
        if match := re.fullmatch(expression, str(text), re.ASCII):
            try:
                return make(*map(int, match.groups()))
            except tk.SparsityError as error:
                raise UserError(f"config.method.pattern: found {text!r}; {error}") from error
    raise UserError(
        f"config.method.pattern: found {text!r}; must be 'unstructured', 'block:RxC', 'N:M', "
        "'channel' or 'fan_in'"
    )


def pattern_text(pattern: tk.Pattern) -> str | None:
    """The inverse of `read_pattern`; None for a pattern that has no text."""
    if isinstance(pattern, tk.Block):
        return f"block:{pattern.rows}x{pattern.cols}"
    if isinstance(pattern, tk.NOfM):
        return f"{pattern.n}:{pattern.m}"
    return next((text for text, make in _PATTERNS.items() if type(pattern) is make), None)


def has_blocks(method: ConfigDict) -> bool:
    """Whether the pattern of a method, or that of one of its rules, is blocks."""
    specs = [spec for _, spec in read_rules(method.get("rules")) or ()]
    patterns = [spec.pattern for spec in specs if isinstance(spec, tk.Sparse)]
    own = method.get("pattern")
    return any(isinstance(p, tk.Block) for p in (own and read_pattern(own), *patterns))


def read_rules(
    rules: Any, distribution: str = "uniform", key: str = "config.method.rules"
) -> list[tuple[str, Any]] | None:
    """The library's rules from those of a config.

    Args:
        rules: None, or pairs of a regular expression and `dense`, `sparse` or a dict of arguments
            of `topkast_jax.Sparse`.
        distribution: the distribution of specs that name none.
        key: where the rules are from, for the error message.
    """
    sparse = _spec("sparse", distribution)  # Checks the distribution also where no rule uses it.
    if rules is None:
        return None
    try:
        return [
            (regex, sparse if spec == "sparse" else _spec(spec, distribution))
            for regex, spec in rules
        ]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{key}: found {rules!r}; must be None or pairs (regular expression, "
            "'dense', 'sparse' or a dict of arguments of topkast_jax.Sparse)"
        ) from error


def _spec(spec: Any, distribution: str) -> tk.Dense | tk.Sparse:
    if spec == "dense":
        return tk.Dense()
    options = {} if spec == "sparse" else dict(spec)
    if "pattern" in options:
        options["pattern"] = read_pattern(options["pattern"])
    try:
        return tk.Sparse(**{"distribution": distribution} | options)
    except tk.SparsityError as error:
        raise UserError(f"config.method.{error}") from error


def _rules(method: ConfigDict, params: Tree) -> list[tuple[str, Any]] | None:
    rules, distribution = method.get("rules"), method.get("distribution", "uniform")
    if rules is not None or distribution == "uniform":
        return read_rules(rules, distribution)
    names, leaves, _ = flatten_with_names(params)
    return [
        (re.escape(name), spec if isinstance(spec, tk.Dense) else _spec("sparse", distribution))
        for name, spec in zip(names, default_specs(names, leaves), strict=True)
    ]
