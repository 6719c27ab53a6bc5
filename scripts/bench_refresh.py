"""Times the refreshes of an always-sparse run against its steps.

    .venv/bin/python scripts/bench_refresh.py [--variant=90/80] [--steps=N] [--repeats=N]
        [--config.KEY=VALUE …]

The run is that of configs/enwik8_small.py on random tokens. A refresh writes the values back to the
host, chooses both sets there, and sends what is new; the steps between two refreshes change θ. The
dense gradients by which RigL chooses (--variant=rigl-90) count as a part of the refresh. The last
line is JSON: the medians `step_seconds` and `refresh_seconds`, `refresh_ratio` (a refresh over a
step), `amortised` (the cost that one refresh in 100 steps adds to each step), and `entering`, the
share of B that is new after a refresh.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.config import command_line, resolve
from experiments.errors import UserError
from experiments.training.methods import representation
from experiments.training.metric_sums import LOSS
from experiments.training.program import Program, build
from topkast_jax.flags import BACKWARD

CONFIG = Path(__file__).parent.parent / "configs/enwik8_small.py"
EVERY = 100
WARM = 3


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    args, overrides = command_line.parse(_parser(), argv)
    print(json.dumps(measure(args.variant, args.steps, args.repeats, overrides)))


def measure(variant: str, steps: int, repeats: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Times steps and refreshes in turn. The first refreshes compile and are not counted."""
    config = resolve(
        f"{CONFIG}:{variant}",
        ("method.always_sparse=True", f"method.refresh_every={steps}", *overrides),
    )
    _check_refreshes(config.method, steps, (repeats + WARM) * steps)
    if representation(config.method) != "always_sparse":
        raise UserError("config.method.always_sparse: found False; must be True")
    program = build(config)
    held = program.representation
    state, batch = held.init(), random_batch(program)
    step_seconds, refresh_seconds, entering = [], [], []
    for i in range(1, (repeats + WARM) * steps + 1):
        dense_seconds, gradients = _timed(program.step.gradients, state, batch, i)
        seconds, (state, sums) = _timed(program.step, state, batch)
        step_seconds.append(seconds)
        _check_finite(i, float(sums[LOSS]))
        if i % steps == 0:
            before = {k: v & BACKWARD for k, v in state.reservoir.sets.items()}
            seconds, state = _timed(held.between_steps, state, i, gradients)
            seconds += dense_seconds
            refresh_seconds.append(seconds)
            entering.append(_entering(before, state.reservoir.sets))
            print(f"refresh {len(refresh_seconds)}: {seconds:.3f} s, {entering[-1]:.2%} of B new")
    step, refresh = np.median(step_seconds[WARM * steps :]), np.median(refresh_seconds[WARM:])
    return {
        "device": jax.devices()[0].device_kind,
        "step_seconds": round(float(step), 4),
        "refresh_seconds": round(float(refresh), 4),
        "refresh_ratio": round(float(refresh / step), 3),
        "amortised": round(float(refresh / step) / EVERY, 5),
        "entering": round(float(np.mean(entering[WARM:])), 4),
    }


def _check_refreshes(method: ConfigDict, steps: int, last: int) -> None:
    """Raises UserError unless each refresh happens between the steps where it is timed."""
    stop = method.get("stop_exploring_at")
    for key, fits, rule in (
        ("refresh_every", method.get("refresh_every") == steps, f"--steps={steps}"),
        ("refresh_delay", not method.get("refresh_delay"), "0"),
        ("stop_exploring_at", stop is None or stop > last, f"None or above the last step, {last}"),
    ):
        if not fits:
            raise UserError(
                f"config.method.{key}: found {method.get(key)!r}; must be {rule}, for a refresh "
                "to be measured"
            )


def _check_finite(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"step {step}: the loss is {loss}, with which no refresh is as in training; "
            "try a smaller config.optimizer.learning_rate"
        )


def random_batch(program: Program) -> Any:
    """A batch of random tokens, on the devices."""
    rng = np.random.default_rng(0)
    tokens = {
        name: rng.integers(0, program.config.data.vocabulary_size, x.shape).astype(x.dtype)
        for name, x in program.task.example_batch().items()
    }
    return program.put(tokens)


def _timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*args)
    jax.block_until_ready([x for x in jax.tree.leaves(result) if isinstance(x, jax.Array)])
    return time.perf_counter() - start, result


def _entering(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    new = sum(np.count_nonzero((after[k] & BACKWARD) & ~before[k]) for k in before)
    return float(new / sum(np.count_nonzero(v) for v in before.values()))


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(prog="bench_refresh", description=__doc__)
    parser.add_argument("--variant", default="90/80")
    parser.add_argument(
        "--steps", type=command_line.positive, default=10, help="between two refreshes"
    )
    parser.add_argument(
        "--repeats", type=command_line.positive, default=7, help="refreshes counted"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
