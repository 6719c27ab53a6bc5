"""Exact evaluation: every example is counted once, at any batch size."""

from __future__ import annotations

from typing import Any

from experiments.training.metric_sums import MetricSums
from experiments.training.program import Program
from experiments.training.state import TrainState


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
