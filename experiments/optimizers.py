"""Config → schedule, optax optimizer, and the sparsity method around it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax
from ml_collections import ConfigDict

import topkast_jax as tk
from experiments.errors import UserError
from topkast_jax.always_sparse import AlwaysSparse
from topkast_jax.sparsify import SparseTransform
from topkast_jax.trees import path_name

Tree = Any
Transform: TypeAlias = optax.GradientTransformationExtraArgs
View = Callable[[Tree, Tree], Tree]

# What each reads of its config section; sections are cut down to this.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "nesterov"),
    "adam": ("b1", "b2", "eps"),
    "adamw": ("b1", "b2", "eps", "weight_decay"),
    "lamb": ("b1", "b2", "eps", "weight_decay"),
    "adafactor": ("weight_decay",),
    "rmsprop": ("b2", "eps", "momentum", "nesterov"),
}
SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "cosine": ("final_factor",),
    "step": ("boundaries", "factor"),
}
_OWN = ("top_kast", "static_random")  # whose defaults come before those of methods added
# Whatever a method's own default: a seed of None is that of the config.
_DEFAULTS = {"forward_density": 0.1, "backward_density": 0.2, "seed": None}
# What a method holds of its leaves: all of them and masks, or their backward sets alone.
COMPACT = {"refresh_delay": 0, "backend": None}


def optimizer_keys(optimizer: ConfigDict) -> tuple[str, ...]:
    """What an optimizer reads of `config.optimizer`."""
    common = ("learning_rate", "reference_batch_size", "l2", "clip_global_norm", "schedule")
    return (*common, *OPTIMIZERS[optimizer.name])


def schedule_keys(schedule: ConfigDict) -> tuple[str, ...]:
    """What a schedule reads of `config.optimizer.schedule`."""
    return ("warmup_steps", "reference_steps", *SCHEDULES[schedule.name])


def method_names() -> tuple[str, ...]:
    """Every value of `config.method.name`."""
    return ("dense", *tk.methods.names())


def method_keys(method: ConfigDict, compact: bool | None = None) -> tuple[str, ...]:
    """What a method reads of `config.method`: the arguments of its factory, and how it is held.

    Args:
        method: the section.
        compact: as if it were always sparse, or not; None: as it is.
    """
    if method.name == "dense":
        return ()
    keys = (*_arguments(method.name), "distribution", "always_sparse")
    if not (method.always_sparse if compact is None else compact):
        return keys
    held = [key for key in COMPACT if key != "refresh_delay" or "refresh_every" in keys]
    return (*(key for key in keys if key != "inner_state"), *held)


def method_defaults() -> dict[str, Any]:
    """The section `method`: every argument of every registered method, with its default."""
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


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then what the name says."""
    schedule, derived = config.optimizer.schedule, config.derived
    peak, warmup = derived.learning_rate, derived.warmup_steps
    if schedule.name == "cosine":
        main = optax.cosine_decay_schedule(peak, config.steps - warmup, schedule.final_factor)
    elif schedule.name == "step":
        after = {b - warmup: schedule.factor for b in derived.boundaries}
        main = optax.piecewise_constant_schedule(peak, after)
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, warmup - 1), main], [warmup]
    )


def make_optimizer(config: ConfigDict, params: Tree) -> Transform:
    """The optimizer of a run whose parameters are dense arrays, masked or not.

    Args:
        config: validated.
        params: abstract parameters, to see what is sparse.
    """
    inner = _inner(config, params)
    if config.method.name == "dense":
        return _with_l2(config, inner, _matrices(params))
    tx = _sparsified(config, inner, params)
    return _with_l2(config, tx, _penalised(config, tx, params))


def make_always_sparse(
    config: ConfigDict, params: Tree, place: Callable[[tuple[int, ...]], jax.sharding.Sharding]
) -> tuple[AlwaysSparse, Transform]:
    """The optimizer of a run that is always sparse, over the tree of values.

    Args:
        config: validated.
        params: abstract dense parameters.
        place: shape → where it lies.

    Returns:
        What starts and refreshes, and the optimizer.
    """
    tx = _sparsified(config, _inner(config, params), params)
    delay = config.method.get("refresh_delay", 0)
    sparse = AlwaysSparse(tx, params, delay=delay, place=place)
    return sparse, _with_l2(config, sparse.transform, _penalised(config, tx, params))


def _with_l2(config: ConfigDict, tx: Any, decayed: Tree) -> Transform:
    if not config.optimizer.l2:
        return optax.with_extra_args_support(tx)
    # Before the method: what it drops of the gradient, it drops of this too.
    return optax.chain(optax.add_decayed_weights(config.optimizer.l2, decayed), tx)


def _penalised(config: ConfigDict, tx: SparseTransform, params: Tree) -> Tree:
    """Which leaves get the L2 penalty: matrices, but for those with the method's own penalty."""
    matrices = _matrices(params)
    if "exploration_weight" not in config.method:
        return matrices
    dense = [leaf is None for leaf in tx.plan.leaves(params)]
    return jax.tree.map(
        lambda matrix, rest: matrix and rest,
        matrices,
        jax.tree.unflatten(jax.tree.structure(matrices), dense),
    )


def forward_view(config: ConfigDict) -> View:
    """What the network runs on, from parameters and optimizer state."""
    if config.method.name == "dense":
        return lambda params, opt_state: params
    return tk.forward_params


def _matrices(params: Tree) -> Tree:
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _inner(config: ConfigDict, params: Tree) -> Transform:
    c, rate = config.optimizer, make_schedule(config)
    moments = {k: c[k] for k in ("b1", "b2", "eps") if k in c}
    matrices = _matrices(params)
    decay = {"weight_decay": c.get("weight_decay"), "mask": matrices}
    make: dict[str, Callable[[], Any]] = {
        "sgd": lambda: optax.sgd(rate, c.momentum or None, c.nesterov),
        "adam": lambda: optax.adam(rate, **moments),
        "adamw": lambda: optax.adamw(rate, **moments, **decay),
        "lamb": lambda: optax.lamb(rate, **moments, **decay),
        "adafactor": lambda: optax.adafactor(
            rate, weight_decay_rate=c.weight_decay or None, weight_decay_mask=matrices
        ),
        "rmsprop": lambda: optax.rmsprop(
            rate, c.b2, c.eps, momentum=c.momentum or None, nesterov=c.nesterov
        ),
    }
    inner = make[c.name]()
    if not c.clip_global_norm:
        return inner
    # Inside the method: the norm is that of the gradient that is used.
    return optax.chain(optax.clip_by_global_norm(c.clip_global_norm), inner)


def _sparsified(config: ConfigDict, inner: Transform, params: Tree) -> SparseTransform:
    method = config.method
    own = ("name", "distribution", "always_sparse", *COMPACT)
    options = {k: v for k, v in method.items() if k not in own}
    options["rules"] = _rules(method, params)
    options["pattern"] = read_pattern(method.pattern)
    if "seed" in options and method.seed is None:
        options["seed"] = config.seed
    tx = tk.methods.get(method.name)(inner, **options)
    if not isinstance(tx, SparseTransform):
        raise UserError(
            f"config.method.name: {method.name!r} makes a {type(tx).__name__}; its factory must "
            "return what topkast_jax.sparsify returns"
        )
    _check_blocks(tx, params)
    return tx


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
    """`unstructured` or `block:RxC` as a pattern."""
    if text == "unstructured":
        return tk.Unstructured()
    match = re.fullmatch(r"block:(\d+)x(\d+)", text)
    if not match:
        raise UserError(f"pattern {text!r}: allowed: 'unstructured', 'block:RxC'")
    return tk.Block(int(match[1]), int(match[2]))


def has_blocks(method: ConfigDict) -> bool:
    """Whether a method's pattern, or that of one of its rules, is blocks."""
    specs = [spec for _, spec in read_rules(method.rules) or ()]
    patterns = [spec.pattern for spec in specs if isinstance(spec, tk.Sparse)]
    return any(isinstance(p, tk.Block) for p in (read_pattern(method.pattern), *patterns))


def read_rules(rules: Any, distribution: str = "uniform") -> list[tuple[str, Any]] | None:
    """Rules of a config, where a spec is `dense`, `sparse` or a dict, as the library's."""
    if rules is None:
        return None
    return [(regex, _spec(spec, distribution)) for regex, spec in rules]


def _spec(spec: Any, distribution: str) -> tk.Dense | tk.Sparse:
    if spec == "dense":
        return tk.Dense()
    options = {} if spec == "sparse" else dict(spec)
    if "pattern" in options:
        options["pattern"] = read_pattern(options["pattern"])
    try:
        return tk.Sparse(**{"distribution": distribution} | options)
    except TypeError as error:
        raise UserError(f"rule {spec!r}: {error}") from error


def _rules(method: ConfigDict, params: Tree) -> list[tuple[str, Any]] | None:
    if method.rules is not None or method.distribution == "uniform":
        return read_rules(method.rules, method.distribution)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [
        (re.escape(path_name(path)), _spec("sparse" if leaf.ndim >= 2 else "dense", "erk"))
        for path, leaf in leaves
    ]
