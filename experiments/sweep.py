"""Does the runs that one file describes, and then their report.

    python -m experiments.sweep --config=configs/sweeps/NAME.py --workdir=DIR [--list]
        [--only=i,j] [--slurm] [--seeds=N] [--config.KEY=VALUE …]

The file defines `get_sweep()`, which yields (run name, config file:variant, overrides as a dict).
The folder of a run is DIR/NAME/seed-K. Overrides on the command line apply to all runs and take
precedence over those of the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.config import command_line, load, resolve
from experiments.errors import UserError
from experiments.loop import Outcome, train
from experiments.report import report
from topkast_jax import SparsityError


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a sweep: its folder in that of the sweep, its config file and its overrides."""

    name: str
    config: str
    overrides: tuple[str, ...]

    def line(self) -> str:
        """The line that `--list` prints."""
        return " ".join([self.name, self.config, *(f"--config.{o}" for o in self.overrides)])


@command_line.command
def main(argv: list[str]) -> int:
    """Runs the command line."""
    args, overrides = command_line.parse(_parser(), argv)
    for text in overrides:
        if text.partition("=")[0] == "seed":
            raise UserError(f"--config.{text}: a sweep sets the seeds itself; use --seeds=N")
    runs = plan(args.config, args.seeds, overrides)
    chosen = _choose(args.only, len(runs))
    if args.list:
        print("\n".join(f"{i}  {runs[i].line()}" for i in chosen))
        return 0
    if args.slurm:
        print(_slurm(args, overrides, chosen))
        return 0
    for i in chosen:
        resolve(
            runs[i].config, runs[i].overrides
        )  # A mistake in any config is found before the first run.
    status = run_all([runs[i] for i in chosen], Path(args.workdir))
    if args.only is None and status != STOPPED:
        print(report([Path(args.workdir)], Path(args.workdir) / "report"))
    return 0 if status == STOPPED else status


STOPPED = -1


def plan(spec: str, seeds: int, overrides: Sequence[str] = ()) -> list[Planned]:
    """The runs of a sweep file, first all with seed 0, then all with seed 1, and so on."""
    entries = list(_entries(spec))
    names = [name for name, _, _ in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not entries:
        raise UserError(
            f"--config={spec}: {f'two runs named {twice[0]!r}' if twice else 'no runs'}"
        )
    for name in names:
        # Anything else could name a folder outside the sweep's, or one folder in two ways.
        if not re.fullmatch(r"[\w+-][\w.+-]*", name):
            raise UserError(
                f"--config={spec}: found a run named {name!r}; a name must be letters, digits and "
                "'_-+.', without a point in front"
            )
    return [
        Planned(f"{name}/seed-{seed}", config, (*_merged(_texts(own), overrides), f"seed={seed}"))
        for seed in range(seeds)
        for name, config, own in entries
    ]


def _merged(own: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Overrides of a run and of the command line, which come later and win."""
    return list({text.partition("=")[0]: text for text in (*own, *overrides)}.values())


def run_all(runs: Sequence[Planned], workdir: Path) -> int:
    """Does one run after another; a failure is printed, and the others are still done.

    Returns:
        0, or 1 if a run failed, or STOPPED.
    """
    failed = []
    for i, run in enumerate(runs):
        print(f"run {i + 1}/{len(runs)}: {run.name}", flush=True)
        outcome = _run(run, workdir)
        if outcome == "stopped":
            print(f"stopped in {run.name}; the same command goes on")
            return STOPPED
        if outcome is None:
            failed.append(run.name)
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _run(run: Planned, workdir: Path) -> Outcome | None:
    try:
        return train(resolve(run.config, run.overrides), workdir / run.name)
    except (UserError, SparsityError) as error:
        command_line.fail(UserError(f"{run.name}: {error}"))
    except Exception:
        print(f"error: {run.name}:", file=sys.stderr)
        traceback.print_exc()
    return None


def _entries(spec: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for entry in load(spec, "get_sweep"):
        try:
            name, config, overrides = entry
            yield str(name), str(config), dict(overrides)
        except (TypeError, ValueError):
            raise UserError(
                f"--config={spec}: found {entry!r}; get_sweep() must yield "
                "(name, config, overrides)"
            ) from None


def _texts(overrides: dict[str, Any]) -> tuple[str, ...]:
    if "seed" in overrides:
        raise UserError("sweep: an override sets 'seed'; use --seeds=N")
    return tuple(f"{k}={v if isinstance(v, str) else repr(v)}" for k, v in overrides.items())


def _choose(only: str | None, runs: int) -> list[int]:
    if only is None:
        return list(range(runs))
    chosen = [int(part) if part.isascii() and part.isdigit() else -1 for part in only.split(",")]
    if not all(0 <= i < runs for i in chosen):
        raise UserError(f"--only={only}: must be numbers from 0 to {runs - 1}, joined by commas")
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
#SBATCH --signal=TERM@120
# When all are done: python -m experiments.report {shlex.quote(str(workdir))} --out=OUT
exec {command} --only="$SLURM_ARRAY_TASK_ID\""""


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(prog="experiments.sweep", description=__doc__)
    parser.add_argument("--config", required=True, help="configs/sweeps/NAME.py")
    parser.add_argument(
        "--workdir", type=command_line.path, required=True, help="folder of all runs"
    )
    parser.add_argument("--list", action="store_true", help="print the numbered runs")
    parser.add_argument("--only", help="numbers of the runs to do, like 0,3; no report")
    parser.add_argument("--slurm", action="store_true", help="print an sbatch array script")
    parser.add_argument(
        "--seeds", type=command_line.positive, default=1, help="runs of each, by seed"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
