"""The training loop of all tasks."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from experiments.errors import UserError
from experiments.records import summary, workdir
from experiments.records.checkpoints import Checkpoints
from experiments.records.metrics import Metrics
from experiments.task import DataIterator
from experiments.training.evaluation import evaluate
from experiments.training.metric_sums import NonFiniteError, Window
from experiments.training.prefetch import Prefetcher
from experiments.training.program import Program, build
from experiments.training.state import TrainState
from experiments.training.stopping import StopRequest

Outcome = Literal["finished", "stopped", "finished before"]


@dataclasses.dataclass
class Session:
    """The part of a run that one process does: what it writes to, and how far it is."""

    program: Program
    directory: Path
    checkpoints: Checkpoints
    metrics: Metrics
    window: Window
    began: float
    saved: int | None

    def seconds(self) -> float:
        """The wall time of the run in seconds, including earlier processes."""
        return time.time() - self.began


def train(config: ConfigDict, directory: Path, stop_at: int | None = None) -> Outcome:
    """Trains from the beginning or from the last checkpoint.

    Args:
        config: a config from `experiments.config.resolve`.
        directory: the folder of the run.
        stop_at: the number of steps after which the run stops, with a checkpoint.

    Returns:
        How the call ended. A stopped run continues when the function is called again.
    """
    if workdir.finished(directory):
        workdir.claim(directory, config)
        return "finished before"
    program = build(config)  # Most mistakes show here, before the folder is touched.
    data = program.task.train_data()
    workdir.claim(directory, config)
    checkpoints = Checkpoints(directory / workdir.CHECKPOINTS, config.keep_checkpoints)
    try:
        return _train_from(program, data, directory, checkpoints, stop_at)
    finally:
        checkpoints.close()


def _train_from(
    program: Program,
    data: DataIterator,
    directory: Path,
    checkpoints: Checkpoints,
    stop_at: int | None,
) -> Outcome:
    restored = checkpoints.restore(program.representation.abstract)
    state, meta = restored or (program.representation.init(), {})
    if restored:
        data.set_state(meta["data"])
    start = int(state.step)
    metrics = Metrics(directory, start, program.config.steps)
    if restored:
        metrics.say(f"going on from the checkpoint of step {start}")
    window = Window(meta.get("first", start + 1), meta.get("sums"))
    began = time.time() - meta.get("seconds", 0.0)
    saved = start if restored else None
    session = Session(program, directory, checkpoints, metrics, window, began, saved)
    try:
        with Prefetcher(data, program.put) as batches, StopRequest() as stop:
            state, stopped = _loop(session, state, batches, stop, stop_at)
        if not stopped:
            _finish(session, state)
        return "stopped" if stopped else "finished"
    except NonFiniteError as error:
        raise UserError(_not_finite(session, error)) from error
    finally:
        metrics.close()


def _loop(
    session: Session,
    state: TrainState,
    batches: Prefetcher,
    stop: StopRequest,
    stop_at: int | None,
) -> tuple[TrainState, bool]:
    """Trains until the last step, or until the process is asked to stop.

    The order of the statements matters. Each step is only dispatched before the sums of the step
    before it are fetched, so that the device never waits for the host. Records are written before
    the checkpoint that relies on them, and both only after a check that all values are finite.
    """
    program, window, config = session.program, session.window, session.program.config
    end = config.steps if stop_at is None else min(config.steps, stop_at)
    step, stopping = int(state.step), False
    while step < end and not stopping:
        state, sums = program.step(state, batches.next())
        step += 1
        window.add(step, sums)
        state = program.representation.between_steps(state, step)
        session.metrics.tick(step)
        if step % config.log_every == 0 or step == config.steps:
            _log(session, state, step, batches)
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:
            window.totals.settled()
            with window.paused():
                values = evaluate(program, state, program.task.eval_split)
                session.metrics.write(step, program.task.eval_split, values)
        stopping = stop.asked()
        due = config.checkpoint_every and step % config.checkpoint_every == 0
        if due or stopping or step == end:
            _save(session, state, step, batches.position)
    return state, step < config.steps


def _log(session: Session, state: TrainState, step: int, batches: Prefetcher) -> None:
    """Writes the records of the window that ends at this step."""
    program, window = session.program, session.window
    totals = window.totals.settled()
    with window.paused():
        values: dict[str, Any] = program.task.final_metrics(totals)
        values = values | {"learning_rate": program.learning_rate(step - 1)}
        units = program.task.unit, program.task.units_per_step
        session.metrics.write(
            step, "train", values | {"timing": window.timing(*units, batches.waited)}
        )
        masks = program.representation.mask_statistics(state)
        if masks:
            session.metrics.write(step, "masks", masks)
        window.next(step + 1)
        batches.waited = 0.0


def _save(session: Session, state: TrainState, step: int, position: Any) -> None:
    """Saves a checkpoint from which the run continues as if it had not been interrupted."""
    window = session.window
    meta = {"data": position, "first": window.first, "sums": window.totals.settled()}
    with window.paused():
        if not session.program.finite(state.params):
            raise NonFiniteError(step, f"the parameters after step {step} are not finite")
        session.metrics.sync()
        state = session.program.representation.settled(state)
        session.checkpoints.save(step, state, meta | {"seconds": session.seconds()})
        session.saved = step


def _finish(session: Session, state: TrainState) -> None:
    """Does the last evaluation and writes `final.json`."""
    program, step = session.program, int(state.step)
    results = {}
    if program.config.eval_at_end:
        for split in dict.fromkeys([program.task.eval_split, program.task.test_split]):
            results[split] = evaluate(program, state, split)
            session.metrics.write(step, split, results[split] | {"final": True})
    value = summary.summary(program, state, results, session.seconds())
    summary.write(session.directory, value)


def _not_finite(session: Session, error: NonFiniteError) -> str:
    kept = f"the last good checkpoint, of step {session.saved}, is kept"
    return (
        f"{error}, in steps {session.window.first} to {error.step}: must be finite; "
        f"{kept if session.saved else 'there is no checkpoint yet'} in {session.directory}"
    )
