"""Exact evaluation: every example once, at any batch size."""

from __future__ import annotations

from typing import Any

from experiments.training.metric_sums import MetricSums
from experiments.training.program import Program
from experiments.training.state import TrainState


def evaluate(program: Program, state: TrainState, split: str) -> dict[str, Any]:
    """Metrics of a split, with the context they depend on.

    Args:
        program: what evaluates.
        state: the network is run on its forward view, as in training.
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
