"""Times training with a checkpoint every so many steps against training without, in one run.

    .venv/bin/python scripts/bench_checkpoints.py [--variant=90/80] [--every=100] [--pairs=N]
        [--folder=DIR] [--config.KEY=VALUE …]

The run is that of configs/enwik8_small.py on random tokens. Windows of `--every` steps without a
save and windows that begin with one take turns; each ends when its last step and its checkpoint are
complete, so that the writing in the background counts wherever it slows the steps down. Checkpoints
go to a new folder in `--folder` (default: that of temporary files) and are deleted at the end. The
last line is JSON: the medians over pairs of `seconds_without` and `seconds_with`, `cost` (the
median of their ratio, minus 1), `held_up_seconds` (how long the training waited in the save itself)
and `bytes` of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.model_step import random_batch
from experiments.config import command_line, resolve
from experiments.errors import UserError
from experiments.records.checkpoints import Checkpoints, Kept
from experiments.training.program import Program, build
from experiments.training.state import TrainState

CONFIG = Path(__file__).parent.parent / "configs/enwik8_small.py"


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    args, overrides = command_line.parse(_parser(), argv)
    if not Path(args.folder).is_dir():
        raise UserError(f"--folder={args.folder}: must be a folder that exists")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(json.dumps(measure(args, overrides, Path(folder))))


def measure(args: argparse.Namespace, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Times pairs of windows; the first pair compiles and is not counted."""
    program = build(resolve(f"{CONFIG}:{args.variant}", overrides))
    batch, state = random_batch(program), program.representation.init()
    store = Checkpoints(folder, Kept(last=1))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    held_up, step = [], 0
    for pair in range(args.pairs + 1):
        for saves in (False, True) if pair % 2 else (True, False):
            start = time.perf_counter()
            if saves:
                _save(program, store, state, step)
                held_up.append(time.perf_counter() - start)
            for _ in range(args.every):
                gradients = program.step.gradients(state, batch, step + 1)
                state, _ = program.step(state, batch)
                step += 1
                state = program.representation.between_steps(state, step, gradients)
            jax.block_until_ready(state.params)
            store.wait()
            seconds[saves].append(time.perf_counter() - start)
        if pair:
            print(
                f"pair {pair}: without {seconds[False][-1]:.2f} s, with {seconds[True][-1]:.2f} s, "
                f"held up {held_up[-1]:.3f} s",
                flush=True,
            )
    store.close()
    without, saving = seconds[False][1:], seconds[True][1:]
    ratios = [a / b for a, b in zip(saving, without, strict=True)]
    return {
        "device": jax.devices()[0].device_kind,
        "variant": args.variant,
        "every": args.every,
        "pairs": args.pairs,
        "seconds_without": round(statistics.median(without), 3),
        "seconds_with": round(statistics.median(saving), 3),
        "cost": round(statistics.median(ratios) - 1, 4),
        "held_up_seconds": round(statistics.median(held_up[1:]), 4),
        "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
    }


def _save(program: Program, store: Checkpoints, state: TrainState, step: int) -> None:
    """What the loop does for a save, with the records and the data's position left out."""
    if not program.finite(state.params):
        raise UserError(
            "the parameters are not finite; try a smaller config.optimizer.learning_rate"
        )
    store.save(step, program.representation.settled(state), {})


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(prog="bench_checkpoints", description=__doc__)
    parser.add_argument("--variant", default="90/80")
    parser.add_argument(
        "--every", type=command_line.positive, default=100, help="steps of a window"
    )
    parser.add_argument("--pairs", type=command_line.positive, default=6, help="pairs counted")
    parser.add_argument(
        "--folder",
        type=command_line.path,
        default=tempfile.gettempdir(),
        help="where checkpoints go",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
