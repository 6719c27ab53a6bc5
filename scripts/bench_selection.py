"""Times exact top-K selection against sorting and NumPy's partition.

    .venv/bin/python scripts/bench_selection.py [--entries=4194304,16777216] [--repeats=N]

All of them find exact thresholds for the densities 0.1 and 0.2 in the same matrix of normally
distributed float32 entries. The sort is one `jnp.argsort` of the magnitudes. The partition is one
`numpy.partition` of them at both ranks. Repeats are interleaved, and ratios are those of median
times. `passes` is the time of a selection over that of one jitted pass `jnp.sum(jnp.abs(x) > t)`.
`warm_passes` starts from the thresholds before every entry changed by about 0.1 %, and
`mask_passes` also writes both masks. The `cpu_` fields compare processor time, which other programs
on the machine disturb less. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import command_line
from experiments.training.partition import all_devices
from topkast_jax import selection

DENSITIES = (0.1, 0.2)
COLUMNS = 2048  # The columns of the matrix.
SLOW_REPEATS = 3  # The repeats of the sort.


def contestants(entries: int) -> dict[str, Callable[[], Any]]:
    """The functions to time, after each of them was compiled and run once."""
    x = jax.random.normal(jax.random.key(0), (entries // COLUMNS, COLUMNS))
    moved = x * (1 + 1e-3 * jax.random.normal(jax.random.key(1), x.shape))
    counts = tuple(selection.keep_count(entries, d) for d in DENSITIES)
    one_pass = jax.jit(lambda x, t: jnp.sum(jnp.abs(x) > t))
    cold = jax.jit(lambda x: selection.thresholds(x, counts))
    warm = jax.jit(lambda x, start: selection.thresholds(x, counts, start))
    masks = jax.jit(lambda x, start: selection.top_k_masks(x, counts, start))
    start = cold(x)
    host = np.asarray(moved)

    def order(x: jax.Array) -> jax.Array:
        magnitudes = jnp.abs(x).reshape(-1)
        return magnitudes[jnp.argsort(-magnitudes)[np.array(counts) - 1]]

    sort = jax.jit(order)
    ranks = [entries - count for count in counts]
    timed = {
        "pass": lambda: one_pass(moved, 1.6),
        "cold": lambda: cold(moved),
        "warm": lambda: warm(moved, start),
        "masks": lambda: masks(moved, start),
        "partition": lambda: np.partition(np.abs(host).reshape(-1), ranks)[ranks],
        "sort": lambda: sort(moved),
    }
    results = {name: jax.block_until_ready(run()) for name, run in timed.items()}
    check(results)
    return timed


def check(results: Mapping[str, Any]) -> None:
    """Raises an error unless all functions found the same magnitudes."""
    expected = np.asarray(results["partition"]).view(np.int32).tolist()
    found = {
        "cold": results["cold"].key.tolist(),
        "warm": results["warm"].key.tolist(),
        "sort": np.asarray(results["sort"]).view(np.int32).tolist(),
    }
    for name, keys in found.items():
        if keys != expected:
            raise RuntimeError(f"{name} found keys {keys}, numpy.partition {expected}")


def measure(timed: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """The median wall time and processor time of each function, in seconds."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    for repeat in range(repeats):
        for name, run in timed.items():
            if name == "sort" and repeat >= SLOW_REPEATS:
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (statistics.median(w for w, _ in runs), statistics.median(c for _, c in runs))
        for name, runs in seconds.items()
    }


def ratios(seconds: Mapping[str, tuple[float, float]], clock: int) -> dict[str, float]:
    """The reported ratios by one clock: 0 for wall time, 1 for processor time."""
    time_of = {name: times[clock] for name, times in seconds.items()}
    values = {
        "sort_ratio": time_of["sort"] / time_of["cold"],
        "partition_ratio": time_of["partition"] / time_of["cold"],
        "passes": time_of["cold"] / time_of["pass"],
        "warm_passes": time_of["warm"] / time_of["pass"],
        "mask_passes": time_of["masks"] / time_of["pass"],
    }
    return {name: round(value, 2) for name, value in values.items()}


@command_line.command
def main(argv: list[str]) -> None:
    """Measures every size and prints a table and the JSON line."""
    parser = command_line.Parser(prog="scripts/bench_selection.py", description=__doc__)
    parser.add_argument("--entries", type=_sizes, default=f"{4 * 2**20},{16 * 2**20}")
    parser.add_argument("--repeats", type=command_line.positive, default=15)
    args = parser.parse_args(argv)
    all_devices()  # Raises UserError if JAX_PLATFORMS names devices that are absent.
    results = []
    for entries in args.entries:
        seconds = measure(contestants(entries), args.repeats)
        for name, (wall, cpu) in seconds.items():
            print(f"{entries:>10} {name:10} wall {wall * 1e3:9.2f} ms  cpu {cpu * 1e3:9.2f} ms")
        on_cpu = {f"cpu_{name}": value for name, value in ratios(seconds, 1).items()}
        results.append({"entries": entries, **ratios(seconds, 0), **on_cpu})
    print(json.dumps({"results": results}))


def _sizes(text: str) -> list[int]:
    sizes = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    if any(size < COLUMNS or size % COLUMNS for size in sizes):
        raise argparse.ArgumentTypeError(
            f"found {text!r}; must be a comma list of multiples of {COLUMNS}"
        )
    return sizes


if __name__ == "__main__":
    sys.exit(main())
