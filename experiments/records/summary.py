"""`final.json`, the summary of a finished run."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import topkast_jax as tk
from experiments.records import workdir
from experiments.task import Task
from experiments.training.methods import sparse_leaves
from experiments.training.program import Program
from experiments.training.state import TrainState, abstract_params
from topkast_jax.description import table
from topkast_jax.statistics import LeafCounts
from topkast_jax.trees import flatten_with_names

PACKAGES = ("topkast-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def summary(
    program: Program, state: TrainState, results: dict[str, dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """Everything that a report needs. Densities are counted from the masks.

    Args:
        program: the program of the run.
        state: the last state.
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
        "densities": _densities(counts),
        "flops": _flops(program.task, counts),
        "seconds": seconds,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "versions": _versions(),
        "config": workdir.as_json(config),
    }


def leaf_table(config: ConfigDict, task: Task) -> str:
    """Which leaves are sparse, at which densities: `topkast_jax.describe`, of any run."""
    params = abstract_params(task)
    return table(params, sparse_leaves(config, params))


def description(config: ConfigDict, task: Task) -> dict[str, Any]:
    """The parameters and the FLOPs of a network at the densities that its config asks for.

    Nothing is computed on a device, and no data is read.
    """
    params = abstract_params(task)
    leaves, counts = sparse_leaves(config, params), {}
    for name, array in zip(*flatten_with_names(params)[:2], strict=True):
        entries = forward = backward = math.prod(array.shape)
        if name in leaves:
            forward, backward = (leaves[name].entries_in(int(n)) for n in leaves[name].counts)
        counts[name] = LeafCounts(entries, forward, backward, name in leaves)
    flops = _flops(task, counts)
    return {
        "parameters": sum(leaf.entries for leaf in counts.values()),
        "active_parameters": sum(leaf.forward for leaf in counts.values()),
        "training_flops_fraction": flops["training_fraction"],
        "inference_flops_fraction": flops["inference_fraction"],
    }


def write(directory: Path, value: dict[str, Any]) -> None:
    """Writes `final.json`, on the first host only."""
    if jax.process_index() == 0:
        workdir.write_json(directory / workdir.FINAL, value)


def _densities(counts: dict[str, LeafCounts]) -> dict[str, Any]:
    """The densities over the sparse leaves (1 if there are none), over all leaves, and of each."""
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
        "leaves": {name: leaf._asdict() for name, leaf in counts.items()},
    }


def _flops(task: Task, counts: dict[str, LeafCounts]) -> dict[str, float]:
    """The FLOPs of the forward pass on one training batch, from shapes alone."""

    def forward(params: Any, model_state: Any, batch: Any) -> Any:
        return task.loss(params, model_state, batch, jax.random.key(0))[0]

    shapes = jax.eval_shape(task.init, jax.random.key(0))
    by_leaf = tk.statistics.leaf_flops(forward, *shapes, task.example_batch())
    found = tk.statistics.flops(by_leaf, counts)
    return {
        "dense_forward_per_step": found.dense,
        "inference_fraction": found.inference_fraction,
        "training_fraction": found.training_fraction,
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
