"""Exact evaluation: every example once, at any batch size."""

from __future__ import annotations

from typing import Any

from experiments.training.metric_sums import Totals
from experiments.training.program import Run
from experiments.training.state import TrainState


def evaluate(run: Run, state: TrainState, split: str) -> dict[str, Any]:
    """Metrics of a split, with the context they depend on.

    Args:
        run: what evaluates.
        state: the network is run on its forward view, as in training.
        split: a split of the task's data.
    """
    view = run.view(state.params, state.opt_state)
    eval_state = run.eval_state(state.model_state, split)
    totals = Totals()
    for i, batch in enumerate(run.task.eval_data(split)):
        eval_state, sums = run.eval_step(view, eval_state, run.put(batch))
        totals.add(i, sums)
    metrics = run.task.final_metrics(totals.settled())
    return metrics | {"context": run.task.eval_context(split)}
