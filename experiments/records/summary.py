"""`final.json`, the summary of a finished run."""

from __future__ import annotations

import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import topkast_jax as tk
from experiments.processor import processor
from experiments.records import workdir
from experiments.task import Task, make_task
from experiments.training import methods, small_dense
from experiments.training.program import Program
from experiments.training.state import TrainState, abstract_params
from topkast_jax.description import table
from topkast_jax.statistics import LeafCounts

Counts = dict[str, LeafCounts]
PACKAGES = ("topkast-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def summary(
    program: Program,
    state: TrainState,
    over_run: Counts,
    results: dict[str, dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """Everything that a report needs. Densities are counted from the masks.

    Those of `densities`, and the FLOPs of inference, are of the final network; those of
    `densities_over_run`, and the FLOPs of training, are means over the steps, where "backward"
    counts the entries whose gradient a step computed.

    Args:
        program: the program of the run.
        state: the last state.
        over_run: the mean counts over the steps.
        results: the metrics of each split, with their context.
        seconds: the wall time.
    """
    config = program.config
    counts = program.representation.leaf_counts(state)
    test = dict(results.get(program.task.test_split, {}))
    return {
        "name": config.name,
        "task": config.task,
        "seed": config.seed,
        "steps": config.steps,
        "test": {k: v for k, v in test.items() if k != "context"},
        "test_context": test.get("context", {}),
        "results": results,
        "parameters": sum(leaf.entries for leaf in counts.values()),
        "active_parameters": sum(leaf.forward for leaf in counts.values()),
        "densities": _densities(counts)
        | {"leaves": {name: leaf._asdict() for name, leaf in counts.items()}},
        "densities_over_run": _densities(over_run),
        "flops": _flops(config, program.task, counts, over_run),
        "seconds": seconds,
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "versions": _versions(),
        "config": workdir.as_json(config),
    }


def leaf_table(config: ConfigDict, task: Task) -> str:
    """Which leaves are sparse, at which densities: `topkast_jax.describe`, of any run."""
    params = abstract_params(task)
    plan = methods.sparsity_plan(config, params)
    return table(params, plan.sparse_leaves(params) if plan else {})


def description(config: ConfigDict, task: Task) -> dict[str, Any]:
    """The parameters and the FLOPs of a run at the densities that its config asks for.

    Nothing is computed on a device, and no data is read. How a ranking over all layers shares out
    what is kept is known only in a run: here each layer has its own density.
    """
    params = abstract_params(task)
    plan = methods.sparsity_plan(config, params)
    final, over_run = tk.statistics.planned_counts(plan, params, config.steps)
    flops = _flops(config, task, final, over_run)
    return {
        "parameters": sum(leaf.entries for leaf in final.values()),
        "active_parameters": sum(leaf.forward for leaf in final.values()),
        "training_flops_fraction": flops["training_fraction"],
        "inference_flops_fraction": flops["inference_fraction"],
    }


def write(directory: Path, value: dict[str, Any]) -> None:
    """Writes `final.json`, on the first host only."""
    if jax.process_index() == 0:
        workdir.write_json(directory / workdir.FINAL, value)


def _densities(counts: Counts) -> dict[str, Any]:
    """The densities over the sparse leaves (1 if there are none), and over all leaves."""
    sparse = [leaf for leaf in counts.values() if leaf.sparse]

    def share(leaves: list[LeafCounts], kept: str) -> float:
        entries = sum(leaf.entries for leaf in leaves)
        return sum(getattr(leaf, kept) for leaf in leaves) / entries if entries else 1.0

    every = list(counts.values())
    return {
        "forward": share(sparse, "forward"),
        "backward": share(sparse, "backward"),
        "forward_all": share(every, "forward"),
        "backward_all": share(every, "backward"),
    }


def _flops(config: ConfigDict, task: Task, counts: Counts, over_run: Counts) -> dict[str, float]:
    """The FLOPs of the forward pass on one training batch, from shapes alone.

    Fractions are of the dense network; of the one of full width, if this is a narrower one.
    """
    by_leaf = leaf_flops(task)
    found = tk.statistics.flops(by_leaf, counts)
    of_full = 1.0
    if (full := small_dense.full_width(config)) is not None:
        of_full = found.dense / tk.statistics.flops(leaf_flops(make_task(full)), {}).dense
    return {
        "dense_forward_per_step": found.dense,
        "inference_fraction": of_full * found.inference_fraction,
        "training_fraction": of_full * tk.statistics.flops(by_leaf, over_run).training_fraction,
    }


def leaf_flops(task: Task) -> dict[str, float]:
    """The FLOPs of the forward pass on one training batch, by leaf, from shapes alone."""

    def forward(params: Any, model_state: Any, batch: Any) -> Any:
        return task.loss(params, model_state, batch, jax.random.key(0))[0]

    shapes = jax.eval_shape(task.init, jax.random.key(0))
    return tk.statistics.leaf_flops(forward, *shapes, task.example_batch())


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
