"""Times products with constant fan-in, by output (`by_output`) and through the dense tile.

    .venv/bin/python scripts/bench_fan_in.py [--shape=1024x1024] [--repeats=20]

Both compute the same y = x·W in float32, in turn, with 32 kernels of a stack one after the other,
so that a dense kernel is in no cache when it is used; those of 5 % and below may be. `over_tile`
and `over_dense` are medians over repeats of the time by output over that of the tile, or of a dense
W, in the same repeat. `used` says which of the two `matmul` takes for so many tokens. The last line
is JSON.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import command_line
from scripts.bench_always_sparse import median_ratio, seconds_in_turn
from topkast_jax import FanIn
from topkast_jax.always_sparse import CompactKernel, by_output, fan_in, matmul

TOKENS = (1, 4, 16, 64)
DENSITIES = (0.2, 0.1, 0.05, 0.01)
LAYERS = 32


def random_stack(shape: tuple[int, int], inputs: int) -> CompactKernel:
    """A stack of kernels whose outputs have so many inputs each, anywhere."""
    (k, n), rng = shape, np.random.default_rng(0)
    chosen = rng.permuted(np.tile(np.arange(k), (LAYERS, n, 1)), axis=-1)[..., :inputs]
    index = np.sort((chosen * n + np.arange(n)[:, None]).reshape(LAYERS, -1)).astype(np.int32)
    values = rng.standard_normal(index.shape, np.float32)
    return CompactKernel(jnp.asarray(values), jnp.asarray(index), shape, FanIn(), index.shape[-1])


def through_all(product: Callable[[jax.Array, Any], jax.Array]) -> Callable[..., Any]:
    """One product with each kernel of a stack."""

    @jax.jit
    def run(x: jax.Array, stack: Any) -> jax.Array:
        def body(total: jax.Array, kernel: Any) -> tuple[jax.Array, None]:
            return total + product(x, kernel), None

        n = jax.eval_shape(product, x, jax.tree.map(lambda leaf: leaf[0], stack))
        return jax.lax.scan(body, jnp.zeros(n.shape, n.dtype), stack)[0]

    return run


def bench(shape: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """One record for each density and number of tokens."""
    k, n = shape
    rng, records = np.random.default_rng(1), []
    dense = jnp.asarray(rng.standard_normal((LAYERS, k, n), np.float32))
    for density in DENSITIES:
        kernel = random_stack(shape, max(1, round(density * k)))
        ordered = jax.tree.map(jnp.asarray, by_output(kernel))
        for tokens in TOKENS:
            x = jnp.asarray(rng.standard_normal((tokens, k), np.float32))
            sides = {
                "by_output": (through_all(fan_in.gathered), ordered),
                "tile": (through_all(functools.partial(matmul, backend="xla")), kernel),
                "dense": (through_all(matmul), dense),
            }
            seconds = seconds_in_turn(
                {
                    name: functools.partial(_done, run, x, stack)
                    for name, (run, stack) in sides.items()
                },
                repeats,
            )
            ratios = {
                f"over_{base}": median_ratio(seconds["by_output"], seconds[base])
                for base in ("tile", "dense")
            }
            used = "by_output" if fan_in.few(tokens, ordered) else "tile"
            records.append({"density": density, "tokens": tokens, **ratios, "used": used})
            print(records[-1], flush=True)
    return records


def _done(run: Callable[..., Any], x: jax.Array, stack: Any) -> None:
    jax.block_until_ready(run(x, stack))


@command_line.command
def main(argv: list[str]) -> None:
    """Parses flags, prints a line for each record and the JSON line."""
    parser = command_line.Parser(prog="scripts/bench_fan_in.py", description=__doc__)
    parser.add_argument(
        "--shape", type=command_line.shape, default=(1024, 1024), help="inputs x outputs"
    )
    parser.add_argument("--repeats", type=command_line.positive, default=20)
    args = parser.parse_args(argv)
    records = bench(args.shape, args.repeats)
    device = jax.devices()[0].device_kind
    print(json.dumps({"results": records, "shape": args.shape, "device": device}))


if __name__ == "__main__":
    sys.exit(main())
