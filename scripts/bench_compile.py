"""Times what a sparsity method costs before the first step, and the same optimizer alone.

    .venv/bin/python scripts/bench_compile.py [--cases=300x1,1000x1,300x20]

A case is a number of leaves and a number of shapes among them: `300x20` is 300 kernels of 20
shapes. For Adam and for Top-KAST around Adam (refresh every 100 steps) it times `init`, the trace
of a training step (with lowering), and its compilation, each with empty caches. `ratio` is the sum
for Top-KAST over the sum for Adam. The last line is JSON.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import topkast_jax as tk
from experiments.config import command_line
from experiments.errors import UserError

CASES = ("30x1", "300x1", "1000x1", "300x20")


def parameters(leaves: int, shapes: int) -> dict[str, Any]:
    """Kernels of 8 rows, and of 8 columns and more, one shape after the other."""
    keys = jax.random.split(jax.random.key(0), leaves)
    draw = jax.jit(jax.random.normal, static_argnums=1)
    return {
        f"layer_{i:04d}": {"kernel": jax.block_until_ready(draw(keys[i], (8, 8 + i % shapes)))}
        for i in range(leaves)
    }


def step_of(tx: optax.GradientTransformation, sparse: bool) -> Callable[..., Any]:
    """A training step whose loss costs next to nothing to compile."""

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        grads = tk.forward_params(params, state) if sparse else params
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def seconds(tx: optax.GradientTransformation, sparse: bool, params: Any) -> dict[str, float]:
    """Seconds of init, trace and compilation, each with empty caches."""
    jax.clear_caches()
    times = [time.perf_counter()]
    state = jax.block_until_ready(tx.init(params))
    times.append(time.perf_counter())
    lowered = jax.jit(step_of(tx, sparse)).lower(params, state)
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    names = ("init", "trace", "compile")
    return {n: round(b - a, 3) for n, a, b in zip(names, times, times[1:], strict=False)}


def measure(leaves: int, shapes: int) -> dict[str, Any]:
    """One case: the seconds of both, and their ratio."""
    params = parameters(leaves, shapes)
    alone = seconds(optax.adam(1e-3), False, params)
    sparse = seconds(tk.top_kast(optax.adam(1e-3), 0.1, 0.2, refresh_every=100), True, params)
    ratio = sum(sparse.values()) / sum(alone.values())
    return {
        "leaves": leaves, "shapes": shapes, "adam": alone, "top_kast": sparse,
        "ratio": round(ratio, 2),
    }  # fmt: skip


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the chosen cases and prints the results."""
    parser = command_line.Parser(prog="scripts/bench_compile.py", description=__doc__)
    parser.add_argument(
        "--cases", default=",".join(CASES), help="a comma list of LEAVESxSHAPES, as in 300x20"
    )
    cases = []
    for text in parser.parse_args(argv).cases.split(","):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if not match:
            raise UserError(f"--cases: found {text!r}; must be LEAVESxSHAPES, as in 300x20")
        cases.append((int(match[1]), int(match[2])))
    # What the first program of a process costs belongs to neither.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.block_until_ready(jax.jit(jnp.sin)(1.0))
    measure(2, 1)
    results = []
    for leaves, shapes in cases:
        results.append(measure(leaves, shapes))
        print(results[-1], flush=True)
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    sys.exit(main())
