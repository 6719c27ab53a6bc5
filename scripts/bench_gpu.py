"""Checks and times the block products on one NVIDIA GPU; one command for all of it.

    scripts/bench_gpu [--budget=540] [--tune] [--tuned=FILE] [--tables=FILE.md]
        [--parts=checks,stack,model] [--repeats=10]
    scripts/bench_gpu --smoke …

In this order:

tune     with --tune, the settings of the kernels for the sizes below, in 40 % of the budget
checks   the GPU's Pallas kernels against XLA's products: y, dx and dW in bfloat16 and float32,
         blocks of 64 and 128, odd numbers of tokens, empty rows and columns of blocks
stack    y, dx and dW of 4096 → 16384 → 4096 on 8,192 tokens in bfloat16, and a step with SGD:
         dense, and blocks of 64 and 128 at 80/60, 90/80 and 95/90 (forward/backward sparsity in
         percent)
model    the training step of configs/enwik8_base.py, dense and with the same blocks, without
         refreshes

Times are seconds by the device's own clock, from the profiler's account of its kernels (a row's
"clock" says "device"; "wall" where the driver lets nobody read that account). "ratio" is the time
over that of dense, "limit" the share of the multiplications that is left: the forward density for
y and dx, the backward density for dW, and (2D + D_B)/3 for a step, in which the model has dense
parts besides. "memory" is that of the step.

The last line is JSON. A row that no longer fits the budget is named in "left_out"; one that raised
an error is in "failed", and then, or if a check is not "ok", the status is 1. The rows are written
as Markdown too: to docs/gpu.md, or to --tables; with --smoke or --parts only to --tables. --tuned
is the table of settings in use, which --tune writes; else the package's.

--smoke runs the same code at tiny sizes on any machine, the kernels of checks and stack in
interpret mode. On a CPU the host's plane of the profile is the clock ("host"), and the model runs
on the backend "xla".
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks import gpu_tables, kernel_checks, model_step, stack
from experiments.benchmarks.budget import Budget
from experiments.benchmarks.random_blocks import DENSITIES
from experiments.benchmarks.stack import Sizes
from experiments.benchmarks.tuner import Problem
from experiments.config import command_line
from experiments.errors import UserError
from experiments.training.partition import all_devices
from scripts.tune_products import tune
from topkast_jax import Block
from topkast_jax.always_sparse import options
from topkast_jax.always_sparse.products import tuned_json

BACKEND = "pallas_gpu"
TABLES = Path(__file__).parent.parent / "docs/gpu.md"
BEGUN = "TOPKAST_BENCH_BEGUN"  # The environment's variable for the start, in seconds of time.time.
BLOCKS = (64, 128)
PARTS = ("checks", "stack", "model")
TUNE_SHARE = 0.4
# Of configs/enwik8_base.py; keys and values are made of twice as many tokens, with the memory.
MODEL_SHAPES = ((512, 2048), (2048, 512), (512, 512))
MODEL_TOKENS = 22 * 512
# Seconds that the first row of each kind is expected to take, most of them to compile.
FIRST = {"checks": 20.0, "stack": 25.0, "model": 50.0}
Row = Callable[[], dict[str, Any]]


class Bench:
    """The rows of a record.

    Attributes:
        budget: the time for them.
    """

    def __init__(self, smoke: bool, repeats: int, budget: Budget):
        """Nothing is computed yet.

        Args:
            smoke: tiny sizes, and interpreted kernels.
            repeats: runs of one timing.
            budget: the time for all rows.
        """
        self.budget = budget
        self._smoke, self._repeats = smoke, repeats
        self.sizes = (
            Sizes(256, 512, 64, "bfloat16") if smoke else Sizes(4096, 16384, 8192, "bfloat16")
        )
        self.model_name, self._overrides = model_step.SMOKE if smoke else model_step.BASE
        self._rows = [(b, d) for d in (("80/60",) if smoke else DENSITIES) for b in BLOCKS]

    def tune(self, out: Path, share: float) -> list[dict[str, Any]]:
        """Tunes the kernels into a table, in a share of the time left."""
        budget = Budget(share * self.budget.left())
        tokens, dtype = self.sizes.tokens, self.sizes.dtype
        sizes = [(shape, tokens) for shape in self.sizes.shapes]
        sizes += [(shape, MODEL_TOKENS) for shape in MODEL_SHAPES]
        densities = [DENSITIES["90/80"]]
        problems = [
            Problem(BACKEND, (block, block), dtype, shape, tokens, densities, self._smoke)
            for shape, tokens in sizes
            for block in BLOCKS
        ]
        rows = tune(problems[:1] if self._smoke else problems, out, self._repeats, budget)
        self.budget.left_out += budget.left_out
        self.budget.failed += budget.failed
        return rows

    def checks(self) -> list[dict[str, Any]]:
        """The kernels against XLA."""
        tokens = (33,) if self._smoke else (8191, 1)
        cases = kernel_checks.cases(self.sizes.shapes[0], tokens, BLOCKS)
        made = ((str(c), functools.partial(self._check, c)) for c in cases)
        return self._made("checks", made)

    def stack(self) -> list[dict[str, Any]]:
        """The stack, dense first."""
        return self._beside_dense("stack", self._stack)

    def model(self) -> list[dict[str, Any]]:
        """The model, dense first."""
        return self._beside_dense("model", self._model)

    def _check(self, case: kernel_checks.Case) -> dict[str, Any]:
        return kernel_checks.check(case, BACKEND, interpret=self._smoke)

    def _stack(self, block: int | None, density: str) -> dict[str, Any]:
        kernels: tuple[Any, ...] = (
            stack.dense_kernels(self.sizes)
            if block is None
            else stack.sparse_kernels(self.sizes, Block(block, block), DENSITIES[density])
        )
        backend = "xla" if block is None else BACKEND
        return stack.times(self.sizes, kernels, backend, self._smoke, self._repeats)

    def _model(self, block: int | None, density: str) -> dict[str, Any]:
        variant = "dense" if block is None else density
        on_gpu = jax.devices()[0].platform == "gpu"
        backend = BACKEND if block is not None and on_gpu else "xla"
        row = model_step.times(variant, block, backend, self._overrides, self._repeats)
        return row | {"backend": backend}

    def _beside_dense(self, kind: str, make: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
        def row(block: int | None, density: str) -> dict[str, Any]:
            return {"block": block, "density": density} | make(block, density)

        dense = self._made(kind, [(f"{kind} dense", functools.partial(row, None, "dense"))])
        named = [
            (f"{kind} blocks of {b}, {d}", functools.partial(row, b, d)) for b, d in self._rows
        ]
        sparse = self._made(kind, named)
        return dense + [_compared(each, dense[0] if dense else None) for each in sparse]

    def _made(self, kind: str, rows: Iterable[tuple[str, Row]]) -> list[dict[str, Any]]:
        """Those rows that fit the budget, printed as they are made."""
        found = []
        for name, make in rows:
            before = self.budget.left()
            row = self.budget.row(kind, name, make, 0.0 if self._smoke else FIRST[kind])
            if row:
                print(f"{name} ({before - self.budget.left():.1f} s): {row}", flush=True)
                found.append(row)
        return found


def _compared(row: dict[str, Any], dense: dict[str, Any] | None) -> dict[str, Any]:
    """The row with its limits, and with its ratios to dense where that was measured."""
    parts = [part for part in stack.PARTS if part in row]
    forward, backward = DENSITIES[row["density"]]
    limits = {part: round(stack.limit(part, forward, backward), 4) for part in parts}
    ratios = {part: round(row[part] / dense[part], 4) for part in parts} if dense else {}
    return row | {"limit": limits, "ratio": ratios}


@command_line.command
def main(argv: list[str]) -> int:
    """Runs the command line."""
    args = _parser().parse_args(argv)
    device = all_devices()[0]
    _check(device, args)
    begun = float(os.environ.get(BEGUN) or time.time())  # Before the script made .venv.
    start = datetime.datetime.fromtimestamp(begun, datetime.UTC)
    budget = Budget(args.budget - (time.time() - begun))
    bench = Bench(args.smoke, args.repeats, budget)
    table = Path(args.tuned or tuned_json.PACKAGE)
    tuned = bench.tune(table, TUNE_SHARE) if args.tune else []
    if not table.exists():  # Nothing could be tuned, which "failed" or "left_out" tells.
        table = tuned_json.PACKAGE
    with options(tuned=table):
        rows = {part: getattr(bench, part)() if part in args.parts else [] for part in PARTS}
    record = {
        "device": device.device_kind,
        "driver": _driver(),
        "jax": jax.__version__,
        "plugin": _version("jax-cuda13-plugin") or _version("jax-cuda12-plugin"),
        "smoke": args.smoke,
        "command": shlex.join(["scripts/bench_gpu", *argv]),
        "seconds": round((datetime.datetime.now(datetime.UTC) - start).total_seconds(), 1),
        "tuned": f"the package ({table.name})" if table == tuned_json.PACKAGE else args.tuned,
        "stack_sizes": vars(bench.sizes),
        "model_name": bench.model_name,
        "tune": tuned,
        **rows,
        "left_out": budget.left_out,
        "failed": budget.failed,
    }
    whole = not args.smoke and set(args.parts) == set(PARTS)
    if tables := args.tables or (TABLES if whole else None):
        try:
            Path(tables).write_text(gpu_tables.tables(record, start.date().isoformat()))
        except OSError as error:
            budget.failed.append({"row": str(tables), "error": str(error)})
    print(json.dumps(record))
    return 1 if budget.failed or not all(row["ok"] for row in rows["checks"]) else 0


def _check(device: jax.Device, args: Any) -> None:
    if not args.smoke and (device.platform != "gpu" or "rocm" in device.client.platform_version):
        raise UserError(
            f"scripts/bench_gpu: found {device.platform} ({device.device_kind}); needs an NVIDIA "
            "GPU, or --smoke"
        )
    if args.smoke and args.tune and not args.tuned:
        raise UserError("--smoke --tune: needs --tuned=FILE, for its times are those of no device")
    for flag in ("tables", "tuned"):
        path = getattr(args, flag)
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"--{flag}={path}: found no such folder; must be in one that exists")
        if path and Path(path).is_dir():
            raise UserError(f"--{flag}={path}: found a folder; must be a file")
    if args.tuned and (Path(args.tuned).exists() or not args.tune):
        tuned_json.load(args.tuned)


def _driver() -> str | None:
    """The version of NVIDIA's driver, if its tool tells."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="scripts/bench_gpu", description=__doc__)
    parser.add_argument("--budget", type=command_line.positive, default=540, help="in seconds")
    parser.add_argument("--parts", type=command_line.some_of(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=command_line.positive, default=10, help="of one timing")
    parser.add_argument("--tune", action="store_true", help="first find settings, see above")
    parser.add_argument("--tuned", type=command_line.path, help="else the package's table")
    parser.add_argument("--tables", type=command_line.path, help="a file for Markdown, see above")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any machine")
    return parser


if __name__ == "__main__":
    sys.exit(main())
