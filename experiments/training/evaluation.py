"""Exact evaluation: every example is counted once, at any batch size."""

from __future__ import annotations

from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.errors import UserError
from experiments.task import Task
from experiments.training.metric_sums import MetricSums
from experiments.training.program import Program
from experiments.training.state import TrainState


def evaluated_splits(task: Task, config: ConfigDict) -> list[str]:
    """The splits that a run evaluates, during training or at its end."""
    splits = [task.eval_split] if config.eval_every or config.eval_at_end else []
    return list(dict.fromkeys([*splits, *([task.test_split] if config.eval_at_end else [])]))


def check_data(task: Task, config: ConfigDict) -> None:
    """Reads the first batch of each split that the run evaluates.

    Raises:
        UserError: a split cannot be read or holds nothing.
    """
    for split in evaluated_splits(task, config):
        if next(iter(task.eval_data(split)), None) is None:
            raise UserError(f"the {split} split of the data is empty: must hold an example")


def metric_names(program: Program) -> list[str]:
    """The names of the metrics of an evaluation during training, from shapes alone."""
    task, state = program.task, program.representation.abstract()
    batch = program.put(next(iter(task.eval_data(task.eval_split))))
    view = jax.eval_shape(program.view, state.params, state.opt_state)
    start = jax.eval_shape(lambda s: task.eval_state(s, task.eval_split), state.model_state)
    _, sums = jax.eval_shape(program.eval_step, view, start, batch)
    return list(task.final_metrics(dict.fromkeys(sums, (1.0, 1.0))))


def evaluate(program: Program, state: TrainState, split: str) -> dict[str, Any]:
    """The metrics of a split, with the context on which they depend.

    Args:
        program: the program of the run.
        state: the state whose forward view is evaluated.
        split: a split of the task's data.
    """
    view = program.view(state.params, state.opt_state)
    eval_state = program.eval_state(state.model_state, split)
    totals = MetricSums()
    for i, batch in enumerate(program.task.eval_data(split)):
        eval_state, sums = program.eval_step(view, eval_state, program.put(batch))
        totals.add(i, sums)
    metrics = program.task.final_metrics(totals.settled())
    return metrics | {"context": program.task.eval_context(split)}
