"""Times the refreshes of an always-sparse run against its steps.

    .venv/bin/python scripts/bench_refresh.py [--variant=90/80] [--steps=N] [--repeats=N]
        [--config.KEY=VALUE …]

The run is that of configs/enwik8_small.py on random tokens. A refresh writes the values back to the
host, chooses both sets there, and sends what is new; the steps between two refreshes change θ. The
dense gradients by which RigL chooses (--variant=rigl-90) count as a part of the refresh. The last
line is JSON: the medians `step_seconds` and `refresh_seconds`, `refresh_ratio` (a refresh over a
step), `amortised` (the cost that one refresh in 100 steps adds to each step), and `entering`, the
share of B that is new after a refresh.

    .venv/bin/python scripts/bench_refresh.py --params=277M [--patterns=unstructured,block128]
        [--repeats=N] [--delay]

times start and refresh of an AlwaysSparse alone, 90/80 with Adam, on so many parameters: the
stacked kernels of 24 layers, of the proportions of configs/enwik8_large.py. Each pattern has a
process of its own. The unit is one pass, `sum(abs(x) > t)` over all parameters, compiled, in the
same process. The last line is JSON; in "results" there is for each pattern:

start_passes, refresh_passes   the time of a start and the median of --repeats refreshes in passes,
                               without what compiles
start_seconds, refresh_seconds, pass_seconds
first_run_seconds              a start, two steps and two refreshes, and what they compile
peak_host_bytes                most memory of the process during start and refreshes, less what it
                               had before the parameters were made; `theta_bytes` and
                               `device_bytes` are those of θ and of what the steps work on
held_up_passes                 with --delay, in place of refresh_passes: how long steps wait for
                               sets that are chosen ahead
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import topkast_jax as tk
from experiments.benchmarks.model_step import random_batch
from experiments.benchmarks.own_process import own_process
from experiments.config import command_line, resolve
from experiments.errors import UserError
from experiments.training.methods import representation
from experiments.training.metric_sums import LOSS
from experiments.training.program import build
from topkast_jax.always_sparse import AlwaysSparse
from topkast_jax.flags import BACKWARD

CONFIG = Path(__file__).parent.parent / "configs/enwik8_small.py"
EVERY = 100
WARM = 3
PATTERNS: dict[str, tk.patterns.Pattern] = {
    "unstructured": tk.Unstructured(),
    "block128": tk.Block(128, 128),
}
LAYERS = 24
PROPORTIONS = {  # of the kernels of one layer, in widths of the model
    "attention/query/kernel": (1, 1),
    "attention/key/kernel": (1, 1),
    "attention/value/kernel": (1, 1),
    "attention/position/kernel": (1, 1),
    "attention/output/kernel": (1, 1),
    "feed_forward/up/kernel": (1, 3),
    "feed_forward/down/kernel": (3, 1),
}
DELAY = 2
MEMORY = Path("/proc/self/status")


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    args, overrides = command_line.parse(_parser(), argv)
    if args.params is None:
        if args.patterns or args.delay:
            raise UserError("--patterns and --delay are read only with --params")
        variant, steps = args.variant or "90/80", args.steps or 10
        print(json.dumps(measure(variant, steps, args.repeats, overrides)))
        return
    if args.variant or args.steps or overrides:
        raise UserError("--variant, --steps and --config.… are not read with --params")
    if not MEMORY.exists():
        raise UserError(f"--params: reads the memory of its process from {MEMORY}, as Linux has it")
    results = []
    for pattern in args.patterns or PATTERNS:
        with own_process(pattern) as process:
            done = process.submit(measure_alone, args.params, pattern, args.repeats, args.delay)
            results.append(done.result())
            print(results[-1])
    print(json.dumps({"device": jax.devices()[0].device_kind, "results": results}))


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


def measure_alone(parameters: int, pattern: str, repeats: int, delayed: bool) -> dict[str, Any]:
    """Times start and refresh without a model; see the module's docstring."""
    width = 128 * max(1, round((parameters / (11 * LAYERS)) ** 0.5 / 128))
    shapes = {
        name: (LAYERS, rows * width, cols * width) for name, (rows, cols) in PROPORTIONS.items()
    }
    abstract = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    tx = tk.top_kast(
        optax.adam(1e-3), 0.1, 0.2, refresh_every=DELAY if delayed else 1, inner_state="reset",
        pattern=PATTERNS[pattern], rules=[(".*", tk.Sparse(stacked=0))],
    )  # fmt: skip
    sparse = AlwaysSparse(tx, abstract, delay=DELAY - 1 if delayed else 0)
    start = functools.partial(sparse.start, donate=True)
    step = jax.jit(lambda *args: _random_step(sparse, *args), donate_argnums=(0, 1))

    def run(repeats: int) -> dict[str, Any]:
        theta = _random_parameters(shapes)
        one_pass = sum(_pass_seconds(leaf) for leaf in theta.values())
        _memory("VmRSS", reset=True)
        started, (values, state, reservoir) = _timed(start, theta)
        peaks = [_memory("VmHWM")]
        del theta
        refreshes: list[float] = []
        steps = repeats * DELAY + 1 if delayed else repeats  # The last choice is used a step later.
        for i in range(1, steps + 1):
            values, state = step(values, state, jax.random.key(i))
            jax.block_until_ready((values, state))
            time.sleep(0.5)  # XLA frees the temporaries of a step a moment after its results.
            _memory("VmRSS", reset=True)
            took, (values, state, reservoir) = _timed(sparse.refresh, i, values, state, reservoir)
            if delayed and i % DELAY == 0:  # What chooses ahead runs beside steps; let it end.
                sparse.settled(reservoir)
            peaks.append(_memory("VmHWM"))
            refreshes.append(took)
        device = sum(x.nbytes for x in jax.tree.leaves((values, state)))
        if delayed:
            refreshes = [sum(pair) for pair in zip(refreshes[1::2], refreshes[2::2], strict=True)]
        return {
            "pass": one_pass,
            "start": started,
            "refresh": float(np.median(refreshes)),
            "device": device,
            "peak": max(peaks),
        }

    compiling, _ = _timed(run, 2)
    gc.collect()
    before = _memory("VmRSS")
    found = run(repeats)
    return {
        "pattern": pattern,
        "parameters": sum(map(math.prod, shapes.values())),
        "held_up_passes" if delayed else "refresh_passes": found["refresh"] / found["pass"],
        "start_passes": found["start"] / found["pass"],
        "pass_seconds": found["pass"],
        "start_seconds": found["start"],
        "refresh_seconds": found["refresh"],
        "first_run_seconds": compiling,
        "peak_host_bytes": found["peak"] - before,
        "theta_bytes": 4 * sum(map(math.prod, shapes.values())),
        "device_bytes": found["device"],
    }


def _random_parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    theta = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for array in theta.values():
        array *= 0.02
    return theta


@jax.jit
def _one_pass(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(x) > 0.03)


def _pass_seconds(leaf: np.ndarray) -> float:
    held = jax.device_put(leaf)
    return float(np.median([_timed(_one_pass, held)[0] for _ in range(4)][1:]))


def _random_step(sparse: AlwaysSparse, values: Any, state: Any, key: jax.Array) -> Any:
    keys = dict(zip(values, jax.random.split(key, len(values)), strict=True))
    grads = {name: jax.random.normal(keys[name], x.shape) for name, x in values.items()}
    updates, state = sparse.transform.update(grads, state, values)
    return optax.apply_updates(values, updates), state


def _memory(name: str, reset: bool = False) -> int:
    """`VmRSS`, what this process has of the memory in bytes, or `VmHWM`, its most since a reset."""
    if reset:
        MEMORY.with_name("clear_refs").write_text("5")
    found = re.search(rf"{name}:\s+(\d+) kB", MEMORY.read_text())
    return int(found[1]) * 1024 if found else 0


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


def _timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*args)
    jax.block_until_ready([x for x in jax.tree.leaves(result) if isinstance(x, jax.Array)])
    return time.perf_counter() - start, result


def _entering(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    new = sum(np.count_nonzero((after[k] & BACKWARD) & ~before[k]) for k in before)
    return float(new / sum(np.count_nonzero(v) for v in before.values()))


def _parameters(text: str) -> int:
    found = re.fullmatch(r"(\d{1,6})([KMG]?)", text, re.ASCII)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"found {text!r}; must be a number such as 277M")
    return int(found[1]) * 1000 ** " KMG".index(found[2] or " ")


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(prog="bench_refresh", description=__doc__)
    parser.add_argument("--variant", help="else 90/80")
    parser.add_argument("--params", type=_parameters, help="how many, for example 277M")
    parser.add_argument("--patterns", type=command_line.some_of(PATTERNS), help="else all")
    parser.add_argument("--delay", action="store_true", help="sets are chosen ahead")
    parser.add_argument(
        "--steps", type=command_line.positive, help="between two refreshes; else 10"
    )
    parser.add_argument(
        "--repeats", type=command_line.positive, default=7, help="refreshes counted"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
