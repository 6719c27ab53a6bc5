"""The training loop of all tasks."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
from ml_collections import ConfigDict

from experiments.errors import FULL, UserError
from experiments.records import summary, workdir
from experiments.records.checkpoints import Checkpoints, Kept
from experiments.records.metrics import Metrics
from experiments.records.set_files import SetFiles
from experiments.records.speed import Speed
from experiments.task import DataIterator
from experiments.training.evaluation import check_data, evaluate, evaluated_splits, metric_names
from experiments.training.metric_sums import NonFiniteError, Window
from experiments.training.prefetch import Prefetcher
from experiments.training.profiling import Profile
from experiments.training.program import Program, build
from experiments.training.set_counts import SetCounts
from experiments.training.state import TrainState
from experiments.training.stopping import Stopped, StopRequest

Outcome = Literal["finished", "stopped", "interrupted", "finished before"]


@dataclasses.dataclass
class Session:
    """The part of a run that one process does: what it writes to, and how far it is.

    Attributes:
        program: what the run compiles, with its task and config.
        directory: the folder of the run.
        checkpoints: its checkpoints.
        metrics: the writer of its records.
        window: the sums and the times of the steps since the last record.
        counts: the sizes of the sets, added up over the steps.
        sets: the writer of the sets (`write_sets_every`).
        speed: computes the values of `timing` in a record.
        began: the time, in seconds since the epoch, at which the run would have begun if it had
            been one process.
        step: the number of finished steps.
        evaluated: the last evaluation during training: after how many steps, and its record.
    """

    program: Program
    directory: Path
    checkpoints: Checkpoints
    metrics: Metrics
    window: Window
    counts: SetCounts
    sets: SetFiles
    speed: Speed
    began: float
    step: int
    evaluated: tuple[int, dict[str, Any]] = (0, {})

    def seconds(self) -> float:
        """The wall time of the run in seconds, including earlier processes."""
        return time.time() - self.began

    def log(self, state: TrainState, step: int, batches: Prefetcher) -> None:
        """Writes the records of the window that ends at this step."""
        self.checkpoints.raise_errors()
        task, totals = self.program.task, self.window.totals.settled()
        with self.window.paused():
            values: dict[str, Any] = task.final_metrics(totals)
            values = values | {"learning_rate": self.program.learning_rate(step - 1)}
            times = self.window.timing()
            timing = self.speed.of(times, batches.waited, self.counts, step) if times else {}
            self.metrics.write(step, "train", values | {"timing": timing})
            if masks := self.program.representation.mask_statistics(state):
                self.metrics.write(step, "masks", masks)
            self.window.next(step + 1)
            batches.waited = 0.0

    def evaluate(self, state: TrainState, step: int) -> None:
        """Writes the record of an evaluation during training."""
        with self.window.paused():
            split = self.program.task.eval_split
            self.evaluated = step, evaluate(self.program, state, split)
            self.metrics.write(step, split, self.evaluated[1])

    def write_sets(self, state: TrainState, step: int) -> None:
        """Writes the sets after this step, and a record of how far they moved."""
        with self.window.paused():
            moved = self.sets.write(step, self.program.representation.flags(state))
            if moved:
                self.metrics.write(step, "sets", moved)

    def save(self, state: TrainState, step: int, position: Any) -> None:
        """Saves a checkpoint from which the run continues as if it had not been interrupted.

        It is written in the background, and is complete when `self.checkpoints.wait()` returns.
        """
        sums = self.window.totals.settled()
        with self.window.paused():
            if not self.program.finite(state.params):
                raise NonFiniteError(step, f"the parameters after step {step} are not finite")
            self.metrics.sync()
            state = self.program.representation.settled(state)
            meta = {"data": position, "first": self.window.first, "sums": sums}
            meta["set_counts"] = self.counts.until(step).saved()
            meta["evaluation"] = self.evaluated[1] if self.evaluated[0] == step else {}
            self.checkpoints.save(step, state, meta | {"seconds": self.seconds()})

    def finish(self, state: TrainState) -> None:
        """Does the last evaluation and writes `final.json`."""
        step, results = int(state.step), {}
        if self.program.config.eval_at_end:
            for split in evaluated_splits(self.program.task, self.program.config):
                results[split] = evaluate(self.program, state, split)
                self.metrics.write(step, split, results[split] | {"final": True})
        value = summary.summary(
            self.program, state, self.counts.until(step).mean(), results, self.seconds()
        )
        self.metrics.sync()
        self.checkpoints.wait()
        summary.write(self.directory, value)

    def not_finite(self, error: NonFiniteError) -> str:
        """The message about a loss or parameters that are not finite."""
        self.checkpoints.wait()
        return (
            f"{error}, in steps {self.window.first} to {error.step}: must be finite; "
            f"{self.checkpoints.kept()} in {self.directory}"
        )


def train(
    config: ConfigDict,
    directory: Path,
    stop_at: int | None = None,
    profile: tuple[int, int] | None = None,
) -> Outcome:
    """Trains from the beginning or from the last checkpoint.

    Args:
        config: a config from `experiments.config.resolve`.
        directory: the folder of the run.
        stop_at: the number of steps after which the run stops, with a checkpoint.
        profile: the first and the last step of a trace, which goes into the folder of the
            TensorBoard events.

    Returns:
        How the call ended: "finished"; "finished before" if there was nothing to do; "stopped" at
        `stop_at`; or "interrupted" if a signal asked the process to end. A run that was stopped or
        interrupted continues when the function is called again.

    Raises:
        UserError: the config, the data or the devices do not fit; the folder belongs to another
            config, is in use by another process, cannot be written or is full; every checkpoint is
            damaged; or a loss or a parameter is not finite.
        SparsityError: the rules or patterns of the method do not fit the parameters.
    """
    with StopRequest() as stop:
        try:
            return _train(config, directory, stop_at, profile, stop)
        except Stopped:
            return "interrupted"


def _train(
    config: ConfigDict,
    directory: Path,
    stop_at: int | None,
    profile: tuple[int, int] | None,
    stop: StopRequest,
) -> Outcome:
    if workdir.finished(directory):
        workdir.claim(directory, config)
        return "finished before"
    if profile and profile[1] > (end := min(config.steps, stop_at or config.steps)):
        raise UserError(f"--profile={profile[0]}:{profile[1]}: must end by step {end}, the last")
    program = build(config)  # Most mistakes show here, before the folder is touched.
    data = program.task.train_data()
    check_data(program.task, config)
    kept = Kept.of(program.config, lambda: metric_names(program))
    with workdir.held(directory):
        workdir.claim(directory, config)
        checkpoints = Checkpoints(directory / workdir.CHECKPOINTS, kept)
        try:
            return _train_from(program, data, directory, checkpoints, stop_at, profile, stop)
        finally:
            checkpoints.close()


def _train_from(
    program: Program,
    data: DataIterator,
    directory: Path,
    checkpoints: Checkpoints,
    stop_at: int | None,
    profile: tuple[int, int] | None,
    stop: StopRequest,
) -> Outcome:
    restored = checkpoints.restore(program.representation.abstract)
    state, meta = restored or (program.representation.init(), {})
    if restored:
        if "set_counts" not in meta:
            raise UserError(f"{directory}: its checkpoints are of an earlier version, without sums")
        data.set_state(meta["data"])
    # A program that ran out of memory raises here; to fetch one of its arrays may wait for ever.
    start = int(jax.block_until_ready(state).step)
    first, last = profile or (0, 0)
    traced = range(max(first, start + 1), last + 1)
    metrics = Metrics(directory, start, program.config.steps, program.config.log_every)
    if restored:
        metrics.say(f"going on from the checkpoint of step {start}")
        if profile and first <= start:
            metrics.say(f"--profile={first}:{last}: no trace of the steps up to {start}")
    else:
        metrics.say(summary.leaf_table(program.config, program.task))
    window = Window(meta.get("first", start + 1), meta.get("sums"))
    began = time.time() - meta.get("seconds", 0.0)
    counts = SetCounts(program.representation, state, meta.get("set_counts"))
    sets = SetFiles(directory, program.config.write_sets_every, program.config.steps)
    session = Session(
        program, directory, checkpoints, metrics, window, counts, sets, Speed(program), began, start
    )
    try:
        with (
            Prefetcher(data, program.put) as batches,
            Profile(directory / workdir.TENSORBOARD, traced) as traces,
            stop.steps(),
        ):
            state, stopped = _loop(session, state, batches, stop, stop_at, traces)
        if not stopped:
            session.finish(state)
        return "stopped" if stopped else "finished"
    except NonFiniteError as error:
        raise UserError(session.not_finite(error)) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        checkpoints.wait()
        raise UserError(
            f"{directory}: cannot be written after step {session.step}: {error.strerror}; "
            f"{checkpoints.kept()}"
        ) from error
    finally:
        metrics.close()


def _loop(
    session: Session,
    state: TrainState,
    batches: Prefetcher,
    stop: StopRequest,
    stop_at: int | None,
    traces: Profile,
) -> tuple[TrainState, bool]:
    """Trains until the last step, or until the process is asked to stop.

    The order of the statements matters. Each step is only dispatched before the sums of the step
    before it are fetched, so that the device never waits for the host. Records are written before
    the checkpoint that relies on them, and both only after a check that all values are finite.
    """
    program, window, config = session.program, session.window, session.program.config
    end = config.steps if stop_at is None else min(config.steps, stop_at)
    step, stopping = int(state.step), False
    if step == 0 and session.sets.due(step):
        session.write_sets(state, step)
    while step < end and not stopping:
        with traces.step(step + 1, window):
            batch = batches.next()
            gradients = program.step.gradients(state, batch, step + 1)
            state, sums = program.step(state, batch)
            step = session.step = step + 1
            window.add(step, sums, program.representation.chooses(step))
            state = program.representation.between_steps(state, step, gradients)
        session.counts.add(state, step)
        session.metrics.tick(step)
        if session.sets.due(step):
            session.write_sets(state, step)
        if step % config.log_every == 0 or step == config.steps:
            session.log(state, step, batches)
        is_last = step == config.steps and config.eval_at_end  # The whole test follows.
        if config.eval_every and step % config.eval_every == 0 and not is_last:
            session.evaluate(state, step)
        stopping = stop.asked(step)
        due = config.checkpoint_every and step % config.checkpoint_every == 0
        if due or stopping or step == end:
            session.save(state, step, batches.position)
    return state, step < config.steps
