"""Compiles the training step of a run for a TPU, without a TPU, and prints its cost as JSON.

    .venv/bin/python scripts/aot_tpu.py --config=configs/NAME.py:VARIANT --topology=v5e:2x2 \
        [--devices=N] [--config.KEY=VALUE …]

The script needs the TPU compiler of `scripts/setup aot`, and no data. The line of JSON contains,
for one device:

device_bytes, host_bytes  memory that the compiler allocates; `total` counts donated arguments once
reservoir_bytes           host memory of an always-sparse run, outside the program
flops                     FLOPs of matrix products and convolutions, 2 for a multiply-add
bytes_moved               bytes into and out of the main memory, without the padding of tiles
collectives               for each kind: count, bytes, and [bytes of one, count] for each size
seconds                   flops, bytes_moved and bytes sent, each over its published peak
roofline_seconds, bound   the largest of these times, and its name; no step can be faster
costliest                 the same for a step that takes the costlier branch of every conditional
                          (a refresh of the masks); the other values are for an ordinary step
unknown                   loops that count once and kernels that count as 0, without information

If the step does not fit, the line contains `"fits": false` and the bytes that the compiler needs. A
mistake of the user is printed as one line, and the exit status is 2.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax

from experiments.chips import Chip
from experiments.config import command_line, resolve
from experiments.tpu import compiling, hlo, library
from experiments.tpu.cost import Cost, cost, dearest
from experiments.training.program import build


def report(spec: str, overrides: Sequence[str], topology: str, count: int | None) -> dict[str, Any]:
    """Compiles the step; returns the record that is printed."""
    config = resolve(spec, overrides)
    target = compiling.target(topology, count)
    program = build(config, target.devices)
    lowered = compiling.lower(program)
    reservoir = program.representation.abstract().reservoir
    record: dict[str, Any] = {
        "config": config.name,
        "overrides": list(overrides),
        "topology": topology,
        "devices": len(target.devices),
        "hbm_bytes": target.peaks.hbm_bytes,
        "reservoir_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(reservoir)),
    }
    start = time.perf_counter()
    try:
        compiled = compiling.compile(lowered)
    except compiling.TooLarge as error:
        needs = {"needed_bytes": error.needed, "available_bytes": error.available}
        return record | {"fits": False} | needs
    record |= {"fits": True, "compile_seconds": round(time.perf_counter() - start, 1)}
    module = hlo.parse(compiled.as_text() or "")
    return record | compiling.memory(compiled) | costs(module, len(target.devices), target.peaks)


def costs(module: hlo.Module, devices: int, peaks: Chip) -> dict[str, Any]:
    """The cost of an ordinary step and of the costliest step."""
    ordinary = cost(module, devices)
    record = roofline(ordinary, peaks)
    if ordinary.alternatives:
        record["costliest"] = roofline(cost(module, devices, dearest), peaks)
    return record


def roofline(step: Cost, peaks: Chip) -> dict[str, Any]:
    """The numbers of a cost, and the shortest time that it allows."""
    kinds: dict[str, dict[str, Any]] = defaultdict(lambda: {"count": 0, "bytes": 0, "sizes": []})
    for (kind, size), times in sorted(step.collectives.items()):
        kinds[kind]["count"] += times
        kinds[kind]["bytes"] += size * times
        kinds[kind]["sizes"].append([size, times])
    seconds = peaks.seconds(step.flops, step.moved, step.sent)
    bound = max(seconds, key=lambda part: seconds[part])
    return {
        "flops": round(step.flops),
        "bytes_moved": round(step.moved),
        "bytes_sent": round(step.sent),
        "collectives": dict(kinds),
        "seconds": {part: float(f"{value:.4g}") for part, value in seconds.items()},
        "roofline_seconds": float(f"{seconds[bound]:.4g}"),
        "bound": bound,
        "unknown": {"loops": step.unknown_loops, "kernels": step.unknown_kernels},
    }


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    parser = command_line.Parser(prog="scripts/aot_tpu.py", description=__doc__)
    parser.add_argument("--config", required=True, help="path/to/NAME.py:VARIANT")
    parser.add_argument("--topology", required=True, help="CHIP:SHAPE, for example v5e:2x2")
    parser.add_argument("--devices", type=command_line.positive, help="only the first so many")
    args, overrides = command_line.parse(parser, argv)
    library.require()
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(report(args.config, overrides, args.topology, args.devices)))


if __name__ == "__main__":
    sys.exit(main())
