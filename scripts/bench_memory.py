"""Compares the memory of always-sparse and dense training on one TPU v5e chip.

    .venv/bin/python scripts/bench_memory.py [--patterns=block:128x128,unstructured] \
        [--skip_largest] [--masked] [--config.KEY=VALUE …]

No TPU is needed: the TPU compiler of `scripts/setup aot` reports the memory. The model is the large
Transformer-XL of enwik8 with Adam at 90/80 % sparsity, rematerialised and scanned, on one short
segment (SETTING below; `--config.` changes it for dense and sparse runs). The last line is JSON:

state_ratio           bytes of parameters, gradients and optimizer state on the device over dense
device_ratio          bytes of the compiled step on the device (arguments, temporaries and output,
                      donated ones once) over dense
largest_params_ratio  parameters (of the dense shapes) of the deepest model that compiles into the
                      chip's memory over those of the deepest dense one

The values are those of the first pattern; "patterns" has those of each pattern. A gradient has the
shape and dtype of the values that the optimizer sees. Whether a model fits is decided by the
compiler, which packs more tightly near the limit than the bytes that it reports. `--masked`
measures masks over dense arrays instead.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.config import command_line, resolve
from experiments.task import make_task
from experiments.tpu import compiling, library
from experiments.training import state as states
from experiments.training.program import Program, build

CONFIG = Path(__file__).parent.parent / "configs/enwik8_large.py"
TOPOLOGY = "v5e:2x2"
PATTERNS = "block:128x128,unstructured"
SETTING = (
    "batch_size=1",
    "model.scan=True",
    "model.remat=True",
    "model.dropout=0.0",
    "model.dropatt=0.0",
    "model.train.target=64",
    "model.train.memory=64",
)
# The relative accuracy of the number of layers of the deepest model.
TOLERANCE = 0.01
# The part of a chip's memory that the compiler reserves.
RESERVED = 2**28


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to train: the variant of the config, and overrides on top of the setting."""

    name: str
    variant: str
    overrides: tuple[str, ...]

    def config(self, layers: int | None = None) -> ConfigDict:
        """The config, with another depth if `layers` is given."""
        depth = () if layers is None else (f"model.n_layer={layers}",)
        return resolve(f"{CONFIG}:{self.variant}", (*self.overrides, *depth))


@dataclasses.dataclass(frozen=True)
class Measured:
    """A compiled step. If it does not fit, `total` is the memory that the compiler asked for."""

    layers: int
    params: int
    state: int
    total: int
    fits: bool


def state_bytes(program: Program) -> int:
    """The bytes of parameters, gradients and optimizer state on the device."""
    state = program.representation.abstract()
    params, opt_state = state.params, state.opt_state
    gradients = [p for p in jax.tree.leaves(params) if jnp.issubdtype(p.dtype, jnp.floating)]
    leaves = [*jax.tree.leaves(params), *gradients, *jax.tree.leaves(opt_state)]
    return sum(_bytes(leaf) for leaf in leaves)


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return int(np.prod(leaf.shape)) * leaf.dtype.itemsize


def measure(variant: Variant, target: compiling.Target, layers: int | None = None) -> Measured:
    """Compiles the step of a variant, perhaps with another depth, and prints a row."""
    config = variant.config(layers)
    program = build(config, target.devices)
    params = sum(leaf.size for leaf in jax.tree.leaves(states.abstract_params(make_task(config))))
    try:
        compiled = compiling.compile(compiling.lower(program))
        total, fits = compiling.memory(compiled)["device_bytes"]["total"], True
    except compiling.TooLarge as error:
        total, fits = error.needed or 0, False
    found = Measured(config.model.n_layer, params, state_bytes(program), total, fits)
    print(_row(variant.name, found), flush=True)
    return found


def _row(name: str, found: Measured) -> str:
    total = f"{found.total / 1e9:6.2f} GB" if found.total else "  too much"
    end = "" if found.fits else "  does not fit"
    return (
        f"{name:24s}{found.layers:5d} layers {found.params / 1e6:7.0f} M parameters "
        f"{found.state / 1e9:6.2f} GB state {total} in all{end}"
    )


def deepest(
    fits: Measured, memory: int, measure_at: Callable[[int], Measured], tolerance: float = TOLERANCE
) -> Measured:
    """The deepest model that compiles.

    Memory is nearly linear in the number of layers, which gives the next guess. If a guess does not
    halve the remaining range, the next one is in its middle.

    Args:
        fits: a model that compiles.
        memory: the memory of the device in bytes.
        measure_at: compiles a model with a given number of layers.
        tolerance: the distance to the first model that does not fit, relative to its layers.
    """
    fails: Measured | None = None
    slope = fits.total / fits.layers
    step = reach = 1
    left, halved = float("inf"), True
    while left > step:
        room = int((memory - fits.total) / slope)
        if fails is None:
            guess = fits.layers + max(room, reach)
            reach *= 2
        elif halved:
            guess = min(fits.layers + max(room, step), fails.layers - step)
        else:
            guess = (fits.layers + fails.layers) // 2
        found = measure_at(guess)
        if found.total:
            slope = max(1.0, (found.total - fits.total) / (found.layers - fits.layers))
        fits, fails = (found, fails) if found.fits else (fits, found)
        step = max(1, int(tolerance * fits.layers))
        before, left = left, fails.layers - fits.layers if fails else left
        halved = left <= before / 2
    return fits


def variants(patterns: Sequence[str], masked: bool, overrides: Sequence[str]) -> list[Variant]:
    """The dense variant, and one variant for each pattern."""
    setting = (*SETTING, *overrides)
    sparse = ("method.inner_state=reset",) if masked else ("method.always_sparse=True",)
    return [Variant("dense", "dense", setting)] + [
        Variant(pattern, "90/80", (*setting, f"method.pattern={pattern}", *sparse))
        for pattern in patterns
    ]


def bench(runs: Sequence[Variant], skip_largest: bool) -> dict[str, dict[str, float]]:
    """The ratios of each pattern to the first variant, which is dense."""
    target = compiling.target(TOPOLOGY, 1)
    for run in runs:  # A mistake in any of them ends the script before the first compilation.
        build(run.config(), target.devices)
    measured = [measure(run, target) for run in runs]
    pairs = [] if skip_largest else list(zip(runs, measured, strict=True))
    largest = [_deepest(run, start, target) for run, start in pairs]
    ratios: dict[str, dict[str, float]] = {}
    for i, run in enumerate(runs[1:], start=1):
        ratios[run.name] = {
            "state_ratio": round(measured[i].state / measured[0].state, 4),
            "device_ratio": round(measured[i].total / measured[0].total, 4),
        }
        if largest:
            ratio = largest[i].params / largest[0].params
            ratios[run.name]["largest_params_ratio"] = round(ratio, 3)
    return ratios


def _deepest(run: Variant, start: Measured, target: compiling.Target) -> Measured:
    memory = target.peaks.hbm_bytes - RESERVED
    return deepest(start, memory, lambda layers: measure(run, target, layers))


@command_line.command
def main(argv: list[str]) -> None:
    """Prints a row for each compiled step, and the JSON line."""
    parser = command_line.Parser(prog="scripts/bench_memory.py", description=__doc__)
    parser.add_argument("--patterns", default=PATTERNS, help="comma list")
    parser.add_argument("--skip_largest", action="store_true", help="only at the config's depth")
    parser.add_argument("--masked", action="store_true", help="masks over dense arrays")
    args, overrides = command_line.parse(parser, argv)
    library.require()
    jax.config.update("jax_platforms", "cpu")
    runs = variants(args.patterns.split(","), args.masked, overrides)
    ratios = bench(runs, args.skip_largest)
    first = next(iter(ratios.values()))
    print(json.dumps(first | {"patterns": ratios}))


if __name__ == "__main__":
    sys.exit(main())
