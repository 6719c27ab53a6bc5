"""Compiles single products for TPUs, without one: dense and compact ones, with their rooflines.

    .venv/bin/python scripts/aot_products.py [--topologies=v4:2x2x1,v5e:2x2,v5p:2x2x1,v6e:2x2]
        [--dtypes=bfloat16,float32] [--kernels=1024x1024,…] [--block=128]
        [--densities=90/80,95/90] [--tokens=2048]

The products are those of a layer with x of --tokens rows on one chip: y = x·W, dx = dy·Wᵀ, and dW =
xᵀ·dy, which a compact kernel has on its backward set alone. --kernels are the shapes of W; by
default, all that the layers of configs/enwik8_large.py and configs/wikitext103_large.py have. Each
row of the JSON in the last line has

product                       "y", "dx" or "dw"
kernel, dtype, topology       what it was compiled for
density                       "dense" for the dense product
flops, bytes_moved            of the compiled program: see scripts/aot_tpu.py
roofline_seconds, bound       no program with these numbers can be faster; and what limits it
ratio                         roofline_seconds over that of the dense product
limit                         the density of the set that the product is over

The rate of multiplications is that of bfloat16 for both types: a TPU multiplies float32 in it by
default. The ratios are printed first, as a table in Markdown. The script needs the TPU compiler of
`scripts/setup aot`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import stack
from experiments.benchmarks.random_blocks import DENSITIES
from experiments.config import command_line
from experiments.tpu import compiling, hlo, library
from experiments.tpu.cost import cost
from topkast_jax import Block
from topkast_jax.always_sparse import CompactKernel
from topkast_jax.patterns import units_in
from topkast_jax.selection import keep_count

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
KERNELS = ((1024, 1024), (1024, 3072), (3072, 1024), (1024, 4096), (4096, 1024))


def abstract_kernel(
    shape: tuple[int, int], block: Block, densities: tuple[float, float], array: Callable[..., Any]
) -> CompactKernel:
    """Shapes of a compact kernel with these densities of A and B."""
    a, b = (keep_count(units_in(block, shape), d) for d in densities)
    values, index = array((b, block.rows, block.cols)), array((b,), jnp.int32)
    return CompactKernel(values, index, shape, block, a)


def rows(
    topology: str,
    dtype: str,
    shape: tuple[int, int],
    block: Block,
    densities: Sequence[str],
    tokens: int,
) -> list[dict[str, Any]]:
    """The records of all products with one kernel on one chip of a topology."""
    target = compiling.target(topology, 1)
    there = jax.sharding.SingleDeviceSharding(target.devices[0])

    def array(shape: tuple[int, ...], of: Any = DTYPES[dtype]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of, sharding=there)

    x, dy = array((tokens, shape[0])), array((tokens, shape[1]))
    kernels: dict[str, Any] = {"dense": array(shape)} | {
        name: abstract_kernel(shape, block, DENSITIES[name], array) for name in densities
    }
    found = []
    for product, function in stack.PRODUCTS.items():
        dense = 0.0
        for density, kernel in kernels.items():
            compiled = compiling.compile(jax.jit(function).lower(x, dy, kernel))
            step = cost(hlo.parse(compiled.as_text() or ""), 1)
            seconds = target.peaks.seconds(step.flops, step.moved, step.sent)
            bound = max(seconds, key=lambda part: seconds[part])
            dense = dense or seconds[bound]
            a, b = DENSITIES.get(density, (1.0, 1.0))
            found.append({
                "topology": topology, "dtype": dtype, "kernel": list(shape), "tokens": tokens,
                "product": product, "density": density,
                "flops": round(step.flops), "bytes_moved": round(step.moved),
                "roofline_seconds": float(f"{seconds[bound]:.4g}"), "bound": bound,
                "ratio": round(seconds[bound] / dense, 4), "limit": stack.limit(product, a, b),
                "unknown_kernels": step.unknown_kernels,
            })  # fmt: skip
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The ratios to the dense product as Markdown, a line for each chip, type and density."""
    shapes = list(dict.fromkeys(tuple(row["kernel"]) for row in found))
    names = [f"{k}→{n}" for k, n in shapes]
    lines = [
        f"| y, dx, dW over dense | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    ratios = {
        (r["topology"], r["dtype"], r["density"], tuple(r["kernel"]), r["product"]): r
        for r in found
    }
    for topology, dtype, density, _, _ in dict.fromkeys((*key[:3], 0, 0) for key in ratios):
        if density == "dense":
            continue
        cells = [
            ", ".join(_cell(ratios[topology, dtype, density, shape, p]) for p in stack.PRODUCTS)
            for shape in shapes
        ]
        lines.append(f"| {topology.split(':')[0]} {dtype} {density} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f}{'m' if row['bound'] == 'memory' else ''}"


def _shapes(text: str) -> list[tuple[int, int]]:
    return [command_line.shape(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(prog="scripts/aot_products.py", description=__doc__)
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES), help="CHIP:SHAPE,…")
    parser.add_argument("--dtypes", type=command_line.some_of(DTYPES), default=",".join(DTYPES))
    parser.add_argument("--kernels", type=_shapes, default=list(KERNELS), help="KxN,…")
    parser.add_argument("--block", type=command_line.positive, default=128, help="side of a block")
    parser.add_argument("--densities", type=command_line.some_of(DENSITIES), default="90/80,95/90")
    parser.add_argument("--tokens", type=command_line.positive, default=2048, help="rows of x")
    return parser


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    args = _parser().parse_args(argv)
    library.require()
    jax.config.update("jax_platforms", "cpu")
    found: list[dict[str, Any]] = []
    for topology in args.topologies.split(","):
        for dtype in args.dtypes:
            for shape in args.kernels:
                block = Block(args.block, args.block)
                block.grid(shape)
                found += rows(topology, dtype, shape, block, args.densities, args.tokens)
    print(table(found))
    print(json.dumps({"results": found}))


if __name__ == "__main__":
    sys.exit(main())
