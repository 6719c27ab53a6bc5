"""From `config.method` to the sparsity method around an optimizer."""

from __future__ import annotations

import inspect
import re
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

import topkast_jax as tk
from experiments.errors import UserError
from topkast_jax.sparsify import SparseTransform
from topkast_jax.trees import path_name

Tree = Any
_OWN = ("top_kast", "static_random")  # Their defaults take precedence over those of other methods.
# These replace the defaults of the factories. A seed of None stands for that of the config.
_DEFAULTS = {"forward_density": 0.1, "backward_density": 0.2, "seed": None}
# The keys that only an always-sparse run reads, with their defaults.
COMPACT = {"refresh_delay": 0, "backend": None}


def method_names() -> tuple[str, ...]:
    """Every value that `config.method.name` can have."""
    return ("dense", *tk.methods.names())


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
    keys = (*_arguments(method.name), "distribution", "always_sparse")
    if held == "masked":
        return keys
    own = [key for key in COMPACT if key != "refresh_delay" or "refresh_every" in keys]
    return (*(key for key in keys if key != "inner_state"), *own)


def method_defaults() -> dict[str, Any]:
    """The section `method`, with every argument of every registered method and its default."""
    section: dict[str, Any] = {"name": "dense", "distribution": "uniform"}
    for name in sorted(tk.methods.names(), key=_OWN.__contains__, reverse=True):
        for key, argument in _arguments(name).items():
            empty = argument.default is inspect.Parameter.empty
            section.setdefault(key, _DEFAULTS.get(key, None if empty else argument.default))
    return section | {"pattern": "unstructured", "always_sparse": False} | COMPACT


def _arguments(name: str) -> dict[str, inspect.Parameter]:
    arguments = inspect.signature(tk.methods.get(name)).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {k: p for k, p in list(arguments.items())[1:] if p.kind in named}


def check(config: ConfigDict) -> None:
    """Raises UserError unless the factory of the config's method takes the values of its section.

    The pattern, the rules and the distribution are read as well. Whether they fit the parameters is
    known only when the optimizer of a run is made.
    """
    method = config.method
    if representation(method) != "dense":
        rules = read_rules(method.get("rules"), method.distribution)
        _make_transform(config, optax.identity(), rules)


def make_method(
    config: ConfigDict, inner: optax.GradientTransformationExtraArgs, params: Tree
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
    _check_blocks(tx, params)
    return tx


def _make_transform(
    config: ConfigDict,
    inner: optax.GradientTransformation,
    rules: list[tuple[str, Any]] | None,
) -> optax.GradientTransformation:
    method = config.method
    options = {key: method[key] for key in _arguments(method.name) if key in method}
    if "rules" in options:
        options["rules"] = rules
    if "pattern" in options:
        options["pattern"] = read_pattern(method.pattern)
    if "seed" in options and method.seed is None:
        options["seed"] = config.seed
    try:
        return tk.methods.get(method.name)(inner, **options)
    except tk.SparsityError as error:
        raise UserError(f"config.method.{error}") from error


def _check_blocks(tx: SparseTransform, params: Tree) -> None:
    try:
        tx.plan.leaves(params)
    except tk.SparsityError as error:
        if ": Block(" not in str(error):
            raise
        raise UserError(
            f"{error}; choose another config.method.pattern, or leave that leaf dense by "
            "config.method.rules"
        ) from error


def read_pattern(text: str) -> tk.Pattern:
    """The pattern `unstructured` or `block:RxC`."""
    match = re.fullmatch(r"block:(\d+)x(\d+)", text)
    if text != "unstructured" and not match:
        raise UserError(
            f"config.method.pattern: found {text!r}; must be 'unstructured' or 'block:RxC'"
        )
    try:
        return tk.Block(int(match[1]), int(match[2])) if match else tk.Unstructured()
    except tk.SparsityError as error:
        raise UserError(f"config.method.pattern: found {text!r}; {error}") from error


def has_blocks(method: ConfigDict) -> bool:
    """Whether the pattern of a method, or that of one of its rules, is blocks."""
    specs = [spec for _, spec in read_rules(method.rules) or ()]
    patterns = [spec.pattern for spec in specs if isinstance(spec, tk.Sparse)]
    return any(isinstance(p, tk.Block) for p in (read_pattern(method.pattern), *patterns))


def read_rules(rules: Any, distribution: str = "uniform") -> list[tuple[str, Any]] | None:
    """The library's rules from those of a config.

    Args:
        rules: None, or pairs of a regular expression and `dense`, `sparse` or a dict of arguments
            of `topkast_jax.Sparse`.
        distribution: the distribution of specs that name none.
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
            f"config.method.rules: found {rules!r}; must be None or pairs (regular expression, "
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
    if method.rules is not None or method.distribution == "uniform":
        return read_rules(method.rules, method.distribution)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [
        (re.escape(path_name(path)), _spec("sparse" if leaf.ndim >= 2 else "dense", "erk"))
        for path, leaf in leaves
    ]
