"""Does the runs that one file describes, and then their report.

python -m experiments.sweep --config=configs/sweeps/NAME.py:VARIANT --workdir=DIR [--list]
    [--only=i,j] [--jobs=N] [--slurm] [--seeds=N] [--config.KEY=VALUE …]

The file defines `get_sweep()` or `get_sweep(variant)`, which yields (run name, config
file:variant, overrides as a dict), and as a fourth item what the paper reports, if there is
something. Where the name is None, it is made of the variant and the overrides: sweeps that share
such a row and DIR share its runs. The folder of a run is DIR/NAME/seed-K. Overrides on the command
line apply to all runs and take precedence over those of the file; a warning names the rows whose
name and paper's number then belong to another value.

A finished run is not done again, and an interrupted one continues. Nothing is run or written if one
of the runs would be refused: for its config, its data, or the results in its folder. With
`--jobs=N`, N runs are done at a time, each by a process of its own on its share of the CPU cores,
which writes its output to DIR/NAME/seed-K.log. DIR/FILE.sweep.json (FILE+VARIANT.sweep.json) has
the rows and their commands for a report. The exit status is 0; 1 if a run failed; 2 for a mistake
in the command, a config or the data; 75 if a signal stopped the sweep, and the same command
continues it.
"""

from __future__ import annotations

import sys

from experiments import signals

if __name__ == "__main__":
    signals.end_at_once()  # What is imported below takes seconds.

import argparse
import json
import os
import shlex
import signal
import subprocess
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, BinaryIO

from experiments.config import command_line, resolve
from experiments.config.planned import Planned, plan
from experiments.errors import UserError
from experiments.loop import Outcome, train
from experiments.records import plans, workdir
from experiments.records.checkpoints import Kept
from experiments.records.plans import Plan
from experiments.report import report
from experiments.signals import ASK, RESUMABLE
from experiments.task import make_task
from experiments.training import methods, optimizers, partition
from experiments.training.evaluation import check_data, metric_names
from experiments.training.program import build
from experiments.training.state import abstract_params
from topkast_jax import SparsityError


@command_line.command
def main(argv: list[str]) -> int:
    """Runs the command line."""
    args, overrides = command_line.parse(_parser(), argv)
    for text in overrides:
        if text.partition("=")[0] == "seed":
            raise UserError(f"--config.{text}: a sweep sets the seeds itself; use --seeds=N")
    runs, directory = plan(args.config, args.seeds, overrides), Path(args.workdir)
    workdir.check_no_address("--workdir", directory)
    chosen = _choose(args.only, len(runs))
    todo = [runs[i] for i in chosen]
    if args.list or args.slurm:
        _check_configs(todo)
        lines = [f"{i}  {_listed(runs[i])}" for i in chosen]
        print("\n".join(lines) if args.list else _slurm(args, overrides, chosen))
        return 0
    platform = partition.all_devices()[0].platform
    if args.jobs > 1 and platform != "cpu":
        raise UserError(
            f"--jobs={args.jobs}: must be 1 on devices of {platform}, all of which each run takes "
            "(JAX_PLATFORMS=cpu leaves them alone, and --slurm prints a job for each run)"
        )
    check(todo, directory)
    rows = [_row(run) for run in runs if run.seed == 0]
    plans.record(directory, Plan(args.config, args.seeds, rows), {run.row for run in todo})
    status = run_all(todo, directory, args.jobs)
    finished = status == 0 or any((directory / run.name / workdir.FINAL).exists() for run in runs)
    if args.only is None and status != RESUMABLE and finished:
        print(report([directory], directory / "report"))
    return status


def check(runs: Sequence[Planned], directory: Path) -> None:
    """Finds what any of the runs would be refused for, before the first of them.

    Args:
        runs: the runs.
        directory: the folder of the sweep. The results that it holds of a row, of any seed, must be
            those of the row's config.

    Raises:
        UserError: a config, a method, the data or a folder does not fit; it names the row.
    """
    rows = {run.row: [other for other in runs if other.row == run.row] for run in runs}
    read: set[str] = set()
    for row, own in rows.items():
        try:
            _check_row(own, directory, read)
        except (UserError, SparsityError) as error:
            raise UserError(f"{row}: {error}") from error


def _check_configs(runs: Sequence[Planned]) -> None:
    """Raises UserError, which names the row, if a config or an override would be refused."""
    for run in {run.row: run for run in runs}.values():
        try:
            resolve(run.config, run.overrides)
        except (UserError, SparsityError) as error:
            raise UserError(f"{run.row}: {error}") from error


# The keys of a config on which it depends what data a run reads.
_DATA = ("task", "data", "model", "batch_size", "eval_every", "eval_at_end")


def _check_row(runs: Sequence[Planned], directory: Path, read: set[str]) -> None:
    """Checks the runs of one row; `read` has the data that was read for earlier rows."""
    config = resolve(runs[0].config, runs[0].overrides)
    folders = {directory / run.name for run in runs}
    for folder in folders.union(plans.results(directory / runs[0].row)):
        config.seed = int(folder.name.removeprefix("seed-"))
        workdir.check(folder, config)
    if all(workdir.finished(folder) for folder in folders):
        return
    task = make_task(config)
    params, mesh = abstract_params(task), partition.check_devices(config)
    partition.splits(params, task.tensor_axes, mesh)
    if methods.representation(config.method) == "always_sparse":
        build(config)  # It checks the backend too.
    else:
        optimizers.check(config, params)
    Kept.of(config, lambda: metric_names(build(config)))
    values = workdir.as_json(config)
    data = json.dumps([values[key] for key in _DATA])
    if data not in read:
        task.train_data()
        check_data(task, config)
    read.add(data)


def run_all(runs: Sequence[Planned], directory: Path, jobs: int = 1) -> int:
    """Does all runs; a failure is printed, and the others are still done.

    Args:
        runs: the runs.
        directory: the folder of the sweep.
        jobs: how many runs at a time. Several are done by processes of their own.

    Returns:
        0, or 1 if a run failed, or RESUMABLE if a signal stopped them.
    """
    failed = []
    outcomes = _one_by_one(runs, directory) if jobs == 1 else _Processes(jobs).do(runs, directory)
    for run, outcome in outcomes:
        if outcome == "interrupted":
            print(f"stopped in {run.name}; the same command goes on")
            return RESUMABLE
        if outcome is None:
            failed.append(run.name)
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


# Runs and how they ended; None stands for a failure that has been printed.
Outcomes = Iterator[tuple[Planned, Outcome | None]]


def _one_by_one(runs: Sequence[Planned], directory: Path) -> Outcomes:
    for i, run in enumerate(runs):
        print(f"run {i + 1}/{len(runs)}: {run.name}", flush=True)
        try:
            yield run, train(resolve(run.config, run.overrides), directory / run.name)
            continue
        except Exception as error:
            if (mistake := command_line.in_one_line(error)) is not None:
                command_line.fail(UserError(f"{run.name}: {mistake}"))
            else:
                print(f"error: {run.name}:", file=sys.stderr)
                traceback.print_exc()
        yield run, None


class _Processes:
    """Does several runs at a time, each in a process on its own share of the cores."""

    def __init__(self, jobs: int):
        self._jobs = jobs
        self._shares: SimpleQueue[list[int]] = SimpleQueue()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        for i in range(jobs):
            self._shares.put(cores[i::jobs] or cores)
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopping = False

    def do(self, runs: Sequence[Planned], directory: Path) -> Outcomes:
        """Does the runs, in their order; a signal of `ASK` stops all of them with checkpoints."""
        before = {s: signal.signal(s, self._stop) for s in ASK}
        try:
            with ThreadPoolExecutor(self._jobs) as pool:
                ends = [pool.submit(self._do, run, directory / run.name) for run in runs]
                try:
                    for run, end in zip(runs, ends, strict=True):
                        yield run, signals.result(end)
                finally:
                    # If one run was stopped alone, the others are not waited for. A second signal
                    # would end those that a first one has reached before they have saved.
                    if not self._stopping:
                        self._stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _do(self, run: Planned, directory: Path) -> Outcome | None:
        share, log = self._shares.get(), directory.with_name(f"{directory.name}.log")
        try:
            if self._stopping:
                return "interrupted"
            print(f"run {run.name}: {log}\n", end="", flush=True)  # Threads do not cut it in two.
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as file:
                status = self._wait([*run.arguments, f"--workdir={directory}"], file, share)
        finally:
            self._shares.put(share)
        if status == RESUMABLE or (self._stopping and status == -signal.SIGTERM):
            return "interrupted"
        if status:
            *_, last = [f"status {status}", *log.read_text(errors="replace").splitlines()]
            if status < 0:  # The log does not know of it.
                last = f"ended by {signal.Signals(-status).name}; the same command goes on"
            print(f"error: {run.name}: {last.removeprefix('error: ')}", file=sys.stderr)
            return None
        return "finished"

    def _wait(self, arguments: list[str], log: BinaryIO, share: list[int]) -> int:
        command = [sys.executable, "-m", "experiments.main", *arguments]
        # In a session of its own, a process gets the signals of the terminal through this one.
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        if share:
            os.sched_setaffinity(process.pid, share)
        self._running.append(process)
        if self._stopping:
            process.terminate()
        try:
            return process.wait()
        finally:
            self._running.remove(process)

    def _stop(self, number: int = 0, frame: FrameType | None = None) -> None:
        del number, frame
        self._stopping = True
        for process in list(self._running):
            process.terminate()


def _row(run: Planned) -> dict[str, Any]:
    """A row of the plan; the last override is the seed."""
    overrides = list(run.overrides[:-1])
    return {"row": run.row, "config": run.config, "overrides": overrides, "paper": run.paper}


def _listed(run: Planned) -> str:
    paper = f"  # paper: {run.paper}" if run.paper else ""
    words = [run.name, run.config, *run.arguments[1:]]
    return " ".join(map(shlex.quote, words)) + paper


def _choose(only: str | None, runs: int) -> list[int]:
    if only is None:
        return list(range(runs))
    chosen = [int(part) if part.isascii() and part.isdigit() else -1 for part in only.split(",")]
    if not all(0 <= i < runs for i in chosen) or len({*chosen}) < len(chosen):
        raise UserError(
            f"--only={only}: must be different numbers from 0 to {runs - 1}, joined by commas"
        )
    return chosen


def _slurm(args: argparse.Namespace, overrides: Sequence[str], chosen: Sequence[int]) -> str:
    workdir = Path(args.workdir)
    flags = [f"--{name}={getattr(args, name)}" for name in ("config", "workdir", "seeds")]
    flags += [f"--config.{text}" for text in overrides]
    command = " ".join(["python -m experiments.sweep", *map(shlex.quote, flags)])
    return f"""#!/bin/bash
#SBATCH --job-name={shlex.quote(workdir.name)}
#SBATCH --array={",".join(map(str, chosen))}
#SBATCH --output=slurm-%A-%a.out
#SBATCH --signal=B:TERM@120
# When all are done: python -m experiments.report {shlex.quote(str(workdir))} --out=OUT
exec {command} --only="$SLURM_ARRAY_TASK_ID\""""


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(prog="experiments.sweep", description=__doc__)
    parser.add_argument("--config", required=True, help="configs/sweeps/NAME.py:VARIANT")
    parser.add_argument(
        "--workdir", type=command_line.path, required=True, help="folder of all runs"
    )
    parser.add_argument("--only", help="numbers of the runs to do, like 0,3; no report")
    way = parser.add_mutually_exclusive_group()  # Slurm decides how many run at a time.
    way.add_argument(
        "--jobs", type=command_line.positive, default=1, help="how many runs at a time"
    )
    way.add_argument("--list", action="store_true", help="print the numbered runs")
    way.add_argument("--slurm", action="store_true", help="print an sbatch array script")
    parser.add_argument(
        "--seeds", type=command_line.positive, default=1, help="runs of each, by seed"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
