"""Makes the schedule and the optax optimizer of a config, with the sparsity method around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax
from ml_collections import ConfigDict

from experiments.training.methods import make_method, representation
from topkast_jax.always_sparse import AlwaysSparse
from topkast_jax.always_sparse.host import host_device
from topkast_jax.rules import named_as_vectors
from topkast_jax.sparsify import SparseTransform, with_exploration_decay, with_l2
from topkast_jax.trees import flatten_with_names

Tree = Any
Transform: TypeAlias = optax.GradientTransformationExtraArgs
# The keys that each of them reads; the others are dropped from the config.
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


def optimizer_keys(optimizer: ConfigDict) -> tuple[str, ...]:
    """The keys of `config.optimizer` that an optimizer reads."""
    common = ("learning_rate", "reference_batch_size", "l2", "clip_global_norm", "schedule")
    return (*common, *OPTIMIZERS[optimizer.name])


def schedule_keys(schedule: ConfigDict) -> tuple[str, ...]:
    """The keys of `config.optimizer.schedule` that a schedule reads."""
    return ("warmup_steps", "reference_steps", *SCHEDULES[schedule.name])


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, followed by the schedule of that name."""
    schedule, derived = config.optimizer.schedule, config.derived
    peak, warmup = derived.learning_rate, derived.warmup_steps
    if schedule.name == "cosine":
        main = optax.cosine_decay_schedule(peak, config.steps - warmup, schedule.final_factor)
    elif schedule.name == "step":
        after: dict[int, float] = {}
        for boundary in derived.boundaries:  # In a short run, several may be one step.
            after[boundary - warmup] = after.get(boundary - warmup, 1.0) * schedule.factor
        main = optax.piecewise_constant_schedule(peak, after)
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, warmup - 1), main], [warmup]
    )


def make_dense(config: ConfigDict, params: Tree) -> Transform:
    """The optimizer of a run without sets.

    Args:
        config: a validated config.
        params: the abstract parameters.
    """
    return _with_l2(config, _inner(config, params), _matrices(params))


def make_masked(config: ConfigDict, params: Tree) -> tuple[SparseTransform, Transform]:
    """The sparsity method of a run under masks, and the optimizer around it; see `make_dense`."""
    method = _method(config, params)
    return method, _with_l2(config, method, _dense_matrices(method, params))


def make_compact(
    config: ConfigDict, params: Tree, sharding: Callable[[tuple[int, ...]], jax.sharding.Sharding]
) -> tuple[AlwaysSparse, Transform]:
    """The optimizer of a run that is always sparse, over the tree of values.

    Args:
        config: a validated config.
        params: the abstract dense parameters.
        sharding: the sharding of an array of a given shape.

    Returns:
        The object that starts and refreshes the sets, and the optimizer.
    """
    method = _method(config, params)
    delay = config.method.get("refresh_delay", 0)
    sparse = AlwaysSparse(method, params, delay=delay, place=sharding)
    return sparse, _with_l2(config, sparse.transform, _dense_matrices(method, params))


def check(config: ConfigDict, params: Tree) -> None:
    """Raises UserError or SparsityError unless the config's method can train these parameters.

    Args:
        config: a validated config.
        params: the abstract parameters.
    """
    held = representation(config.method)
    if held == "masked":
        _method(config, params).plan.check(params)
    elif held == "always_sparse":
        host = jax.sharding.SingleDeviceSharding(host_device())
        make_compact(config, params, lambda shape: host)


def _method(config: ConfigDict, params: Tree) -> SparseTransform:
    """The method, with the L2 penalty of sparse leaves unless it has a penalty of its own.

    The penalty comes after the method has seen the gradient: it does not choose by it. A decoupled
    penalty of the method's own follows the learning rate, as that of AdamW does.
    """
    method = make_method(config, _inner(config, params), params)
    if weight := config.method.get("exploration_decay", 0.0):
        rate = make_schedule(config)
        method = with_exploration_decay(method, lambda step: weight * rate(step))
    return method if "exploration_weight" in config.method else with_l2(method, config.optimizer.l2)


def _with_l2(config: ConfigDict, tx: Any, decayed: Tree) -> Transform:
    if not config.optimizer.l2:
        return optax.with_extra_args_support(tx)
    return optax.chain(optax.add_decayed_weights(config.optimizer.l2, decayed), tx)


def _dense_matrices(tx: SparseTransform, params: Tree) -> Tree:
    dense = [leaf is None for leaf in tx.plan.leaves(params).values()]
    return jax.tree.map(
        lambda matrix, rest: matrix and rest,
        _matrices(params),
        jax.tree.unflatten(jax.tree.structure(params), dense),
    )


def _matrices(params: Tree) -> Tree:
    """What is decayed: not biases and scales, which are matrices where layers are stacked."""
    names, arrays, treedef = flatten_with_names(params)
    vectors = named_as_vectors(names)
    rows = zip(names, arrays, strict=True)
    return treedef.unflatten([p.ndim >= 2 and name not in vectors for name, p in rows])


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
        # optax's own decay of Adafactor does not follow the learning rate, as that of AdamW does.
        "adafactor": lambda: optax.chain(
            optax.adafactor(),
            optax.add_decayed_weights(-c.weight_decay, matrices),
            optax.scale_by_learning_rate(rate, flip_sign=False),
        ),
        "rmsprop": lambda: optax.rmsprop(
            rate, c.b2, c.eps, momentum=c.momentum or None, nesterov=c.nesterov
        ),
    }
    inner = make[c.name]()
    if not c.clip_global_norm:
        return inner
    # Clipping is inside the method, so that the norm is that of the gradient that is used.
    return optax.chain(optax.clip_by_global_norm(c.clip_global_norm), inner)
