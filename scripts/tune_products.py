"""Finds the fastest settings of block products on the device there is, and writes them to a table.

    .venv/bin/python scripts/tune_products.py [--backend=pallas_gpu] [--shapes=4096x16384,…]
        [--tokens=8192,…] [--blocks=64,128,64x128] [--dtype=bfloat16] [--densities=90/80,…]
        [--repeats=10] [--budget=SECONDS] [--out=FILE]
    .venv/bin/python scripts/tune_products.py --smoke [--backend=pallas_gpu] --out=FILE

For each shape K×N of a kernel, number of tokens and block, the three products (x·W, dy·Wᵀ and dW's
blocks) are timed by the device's own clock. One field of the settings is changed at a time, from
the defaults on, for as long as that helps, and twice over all fields at most. What the device's
compiler refuses, and what gives another product than the defaults, is dropped. With several
densities (forward/backward sparsity in percent) the sum of their times counts.

The table is the package's unless --out names another; a program uses that with
`topkast_jax.always_sparse.options(tuned=FILE)`. Each finished product is written at once, and the
table's other entries stay. Products for which --budget leaves no time are named under "left_out".

The backend is that of the device; on a CPU, xla if the native one is not compiled. Pallas kernels
need their own device, but for --smoke: tiny sizes, interpreted, which shows that the command works
and says nothing of speed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks import tuner
from experiments.benchmarks.budget import Budget
from experiments.benchmarks.random_blocks import DENSITIES
from experiments.benchmarks.tuner import Problem
from experiments.config import command_line
from experiments.errors import UserError
from experiments.records import files
from experiments.training.partition import all_devices
from topkast_jax.always_sparse.products import (
    BACKENDS,
    INTERPRETED,
    KERNELS,
    tuned_json,
    tuning,
)

DTYPES = ("bfloat16", "float16", "float32")
PLATFORM_BACKENDS = {"cpu": "native_cpu", "gpu": "pallas_gpu", "tpu": "pallas_tpu"}
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"shapes": [(1024, 4096), (4096, 1024)], "tokens": [1024], "dtype": "float32"},
    "smoke": {"shapes": [(256, 512)], "tokens": [48], "dtype": "float32"},
}
LARGE = {"shapes": [(4096, 16384), (16384, 4096)], "tokens": [8192], "dtype": "bfloat16"}
_FOREVER = 1e9
Pair = tuple[int, int]


def tune(
    problems: Sequence[Problem], out: str | Path, repeats: int, budget: Budget
) -> list[dict[str, Any]]:
    """Tunes the products of all problems into the table of a file.

    Args:
        problems: in the order in which they are tuned.
        out: the file of the table.
        repeats: runs of one timing.
        budget: a search ends when it is over, and what it leaves no time for is left out.

    Returns:
        A row for each product that was tuned.
    """
    rows = []
    for problem in problems:
        for product in tuning.PRODUCTS:
            make = functools.partial(_row, problem, product, out, repeats, budget)
            row = budget.row("tune", f"tune {problem} {product}", make, first=1.0)
            rows.extend([row] if row else [])
    return rows


def _row(
    problem: Problem, product: str, out: str | Path, repeats: int, budget: Budget
) -> dict[str, Any]:
    print(f"{problem} {product}")
    entry, clock = tuner.tune(problem, product, repeats, budget.left, print)
    table = tuned_json.load(out) if Path(out).exists() else tuning.Table()
    files.replace(Path(out), tuned_json.dumps(table.merged([entry])).encode())
    return {
        "product": product,
        **{name: list(getattr(problem, name)) for name in ("shape", "block")},
        "tokens": problem.tokens,
        "settings": dataclasses.asdict(entry.settings),
        "microseconds": entry.microseconds,
        "default_microseconds": entry.default_microseconds,
        "clock": clock,
    }


@command_line.command
def main(argv: list[str]) -> int:
    """Runs the command line."""
    args = _parser().parse_args(argv)
    device = all_devices()[0]
    backend = args.backend or _own_backend(device.platform)
    _check(backend, device, args)
    sizes = SIZES.get("smoke" if args.smoke else device.platform, LARGE)
    problems = [
        Problem(
            backend,
            block,
            args.dtype or sizes["dtype"],
            shape,
            tokens,
            [DENSITIES[name] for name in args.densities],
            interpret=args.smoke and backend in INTERPRETED,
        )
        for tokens in args.tokens or sizes["tokens"]
        for shape in args.shapes or sizes["shapes"]
        for block in args.blocks or [(128, 128)]
    ]
    for problem in problems:
        _check_fits(problem)
    budget = Budget(args.budget or _FOREVER)
    rows = tune(problems, args.out or tuned_json.PACKAGE, args.repeats, budget)
    record = {
        "device": device.device_kind,
        "out": str(args.out or tuned_json.PACKAGE.name),
        "smoke": args.smoke,
        "rows": rows,
        "left_out": budget.left_out,
        "failed": budget.failed,
    }
    print(json.dumps(record))
    return 1 if budget.failed else 0


def _own_backend(platform: str) -> str:
    own = PLATFORM_BACKENDS[platform]
    not_compiled = platform == "cpu" and KERNELS[own][1].refuses(())
    return "xla" if not_compiled else own


def _check(backend: str, device: jax.Device, args: Any) -> None:
    """Raises UserError unless the device runs the backend, and the table can be written."""
    if args.smoke and not args.out:
        raise UserError("--smoke: needs --out=FILE, for its times are those of no device")
    interpreted = args.smoke and backend in INTERPRETED
    runs = tuning.device_kind(backend, device, interpreted)
    if runs is None:
        smoke = ", or with --smoke" if backend in INTERPRETED else ""
        raise UserError(
            f"--backend={backend}: found {device.platform}; must be on {KERNELS[backend][0]}{smoke}"
        )
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"--out={args.out}: found no such folder; must be in one that exists")
    if Path(args.out or tuned_json.PACKAGE).exists():
        tuned_json.load(args.out or tuned_json.PACKAGE)  # Tell of a wrong table before all work.


def _check_fits(problem: Problem) -> None:
    if any(side % part for side, part in zip(problem.shape, problem.block, strict=True)):
        raise UserError(f"--blocks: found {problem}; must divide the shape")
    if problem.backend in KERNELS and (why := KERNELS[problem.backend][1].refuses(problem.block)):
        raise UserError(f"--blocks: found {problem}; {why}")


def _pairs(text: str) -> list[Pair]:
    found = [re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", word, re.ASCII) for word in text.split(",")]
    pairs = [(int(m[1]), int(m[2] or m[1])) for m in found if m]
    if len(pairs) < len(found) or not all(min(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"found {text!r}; must be a comma list of blocks such as 128 or 64x128"
        )
    return pairs


def _shapes(text: str) -> list[Pair]:
    return [command_line.shape(word) for word in text.split(",")]


def _tokens(text: str) -> list[int]:
    return [command_line.positive(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(prog="tune_products", description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, help="else the device's own")
    parser.add_argument("--shapes", type=_shapes, help="of kernels, KxN; else the device's")
    parser.add_argument("--tokens", type=_tokens, help="rows of x; else the device's")
    parser.add_argument("--blocks", type=_pairs, help="else 128")
    parser.add_argument("--dtype", choices=DTYPES, help="else the device's")
    parser.add_argument("--densities", type=command_line.some_of(DENSITIES), default=["90/80"])
    parser.add_argument("--repeats", type=command_line.positive, default=10, help="of one timing")
    parser.add_argument("--budget", type=command_line.positive, help="in seconds; else no limit")
    parser.add_argument("--out", type=command_line.path, help="else the package's table")
    parser.add_argument("--smoke", action="store_true", help="see above; needs --out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
