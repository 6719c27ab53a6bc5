"""Times an always-sparse training step against the dense step of the same shapes.

The network is a feed-forward stack K → H → K with a ReLU. A step is a forward pass, a backward pass
to parameters and input, and SGD. The sizes are 1024 → 4096 → 1024 on 1,024 tokens in float32 on
CPU, and 4096 → 16384 → 4096 on 8,192 tokens in bfloat16 on GPU. Each repeat times the dense step
and then each sparse step. The `step_ratio` of a row is the median over repeats of its time over the
dense time of the same repeat. `limit` is the ratio of multiplications, (2D + D_B) / 3. Densities
are named by their forward/backward sparsity in percent.

    .venv/bin/python scripts/bench_always_sparse.py [--repeats 9] [--patterns block128,unstructured]
        [--return_freed]

As a run on a CPU does, the process keeps the memory that it frees (`topkast_jax.host_memory`);
`--return_freed` turns this off. Ratios depend on the machine: the record names the CPU's widest
vectors (`instruction_set`), the rate of the dense step (`dense_gflops`), and whether the CPU's own
products were compiled (`native_cpu`). The last line is JSON.
SparseLab (PyTorch, CPU) runs in the same repeats when it is installed. Its rows are ratios to
PyTorch's dense step; `over_sparselab` of a row is its time over SparseLab's in the same repeat.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import random_blocks, stack
from experiments.benchmarks.stack import Sizes, limit
from experiments.config import command_line
from experiments.processor import instruction_set
from experiments.training.partition import all_devices
from topkast_jax import Block, Unstructured, host_memory
from topkast_jax.always_sparse.host import cores
from topkast_jax.always_sparse.products import native_library

DENSITIES = {name: random_blocks.DENSITIES[name] for name in ("90/80", "95/90")}
PATTERNS: dict[str, Block | Unstructured] = {
    "block128": Block(128, 128),
    "block64": Block(64, 64),
    "block32": Block(32, 32),
    "unstructured": Unstructured(),
}
Step = Callable[[], None]


SIZES = {"cpu": Sizes(1024, 4096, 1024, "float32"), "gpu": Sizes(4096, 16384, 8192, "bfloat16")}


def jax_step(kernels: tuple[Any, ...], x: jax.Array) -> Step:
    """One compiled training step on its own copy of the parameters."""
    values = [stack.values_of(kernel) for kernel in kernels]
    run = stack.training(jax.jit(stack.step, donate_argnums=0), values, x, kernels)
    return lambda: jax.block_until_ready(run())


def use_all_cores() -> None:
    """Gives PyTorch as many threads as XLA has: one for each core that this process may use."""
    if importlib.util.find_spec("torch"):
        import torch  # type: ignore[import-not-found, unused-ignore]

        torch.set_num_threads(cores())


def sparselab_step(sizes: Sizes, sparsity: float | None, rng: np.random.Generator) -> Step:
    """The same step in PyTorch, with SparseLab's layers or, for `sparsity=None`, dense ones."""
    import sparselab  # type: ignore[import-not-found, unused-ignore]
    import torch  # type: ignore[import-not-found, unused-ignore]

    def layer(inputs: int, outputs: int) -> Any:
        if sparsity is None:
            return torch.nn.Linear(inputs, outputs, bias=False)
        return sparselab.SparseLinear(inputs, outputs, sparsity=sparsity, bias=False)

    first, second = layer(sizes.features, sizes.hidden), layer(sizes.hidden, sizes.features)
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    optimizer = torch.optim.SGD(model.parameters(), lr=stack.LEARNING_RATE)
    x = torch.tensor(rng.standard_normal((sizes.tokens, sizes.features), np.float32))
    x.requires_grad_(True)

    def run() -> None:
        optimizer.zero_grad()
        x.grad = None
        (0.5 * model(x).square().mean()).backward()
        optimizer.step()

    return run


def seconds_in_turn(steps: Mapping[str, Step], repeats: int) -> dict[str, np.ndarray]:
    """Runs all steps in turn; returns the seconds of each step in each repeat but the first."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(taken[1:]) for name, taken in seconds.items()}


def median_ratio(seconds: np.ndarray, base: np.ndarray) -> float:
    """The median over repeats of the seconds over those of `base` in the same repeat."""
    return round(float(np.median(seconds / base)), 4)


def bench(patterns: list[str], densities: list[str], repeats: int) -> dict[str, Any]:
    """Times every pattern at every density; returns the record that is printed as JSON."""
    device = jax.devices()[0]
    sizes = SIZES.get(device.platform, SIZES["cpu"])
    rng = np.random.default_rng(0)
    x = random_blocks.random_array(2, (sizes.tokens, sizes.features), sizes.dtype)
    steps = {"dense": jax_step(stack.dense_kernels(sizes), x)}
    rows = [(p, d) for d in densities for p in patterns]
    for pattern, density in rows:
        kernels = stack.sparse_kernels(sizes, PATTERNS[pattern], DENSITIES[density])
        steps[f"{pattern} {density}"] = jax_step(kernels, x)
    peer = _add_sparselab(steps, sizes, densities, rng) if device.platform == "cpu" else []
    seconds = seconds_in_turn(steps, repeats)

    def row(pattern: str, density: str, base: str) -> dict[str, Any]:
        taken = seconds[f"{pattern} {density}"]
        record = {"pattern": pattern, "density": density}
        return record | {
            "step_ratio": median_ratio(taken, seconds[base]),
            "step_ms": round(1e3 * float(np.median(taken)), 2),
        }

    def own_row(pattern: str, density: str) -> dict[str, Any]:
        forward, backward = DENSITIES[density]
        record = row(pattern, density, "dense") | {
            "limit": round(limit("step", forward, backward), 4)
        }
        if peer:
            taken = seconds[f"{pattern} {density}"]
            record["over_sparselab"] = median_ratio(taken, seconds[f"sparselab {density}"])
        return record

    dense_seconds = float(np.median(seconds["dense"]))
    record = {
        "results": [own_row(p, d) for p, d in rows],
        "sparselab": [row("sparselab", d, "torch dense") for d in peer] or "not installed",
        "dense_ms": round(1e3 * dense_seconds, 2),
        "dense_gflops": round(sizes.flops("step") / dense_seconds / 1e9, 1),
        "instruction_set": instruction_set() if device.platform == "cpu" else None,
        "device": device.device_kind,
        "sizes": dataclasses.asdict(sizes),
    }
    if peer:
        record["dense_over_torch"] = median_ratio(seconds["dense"], seconds["torch dense"])
    return record


def _add_sparselab(
    steps: dict[str, Step], sizes: Sizes, densities: list[str], rng: np.random.Generator
) -> list[str]:
    if importlib.util.find_spec("sparselab") is None:
        return []
    steps["torch dense"] = sparselab_step(sizes, None, rng)
    for density in densities:
        sparsity = 1 - DENSITIES[density][0]
        steps[f"sparselab {density}"] = sparselab_step(sizes, sparsity, rng)
    return densities


@command_line.command
def main(argv: list[str]) -> None:
    """Parses flags, prints the table and the JSON line."""
    parser = command_line.Parser(prog="scripts/bench_always_sparse.py", description=__doc__)
    parser.add_argument("--repeats", type=command_line.positive, default=9)
    parser.add_argument(
        "--patterns", type=command_line.some_of(PATTERNS), default=",".join(PATTERNS)
    )
    parser.add_argument(
        "--densities", type=command_line.some_of(DENSITIES), default=",".join(DENSITIES)
    )
    parser.add_argument("--return_freed", action="store_true", help="see above")
    args = parser.parse_args(argv)
    on_cpu = all_devices()[0].platform == "cpu"  # UserError if JAX_PLATFORMS names absent devices
    keeps = on_cpu and not args.return_freed and host_memory.keep_freed()
    use_all_cores()
    record = bench(args.patterns, args.densities, args.repeats)
    missing = native_library.unavailable()
    record |= {"keeps_freed": keeps, "native_cpu": missing or "used on a CPU"}
    print(
        f"dense step {record['dense_ms']} ms, {record['dense_gflops']} GFLOP/s, on "
        f"{record['device']} ({record['instruction_set']}), {record['sizes']}"
    )
    peer = record["sparselab"] if isinstance(record["sparselab"], list) else []
    for row in record["results"] + peer:
        limit = f"  limit {row['limit']:.3f}" if "limit" in row else "  (of PyTorch's dense)"
        print(f"{row['pattern']:14s}{row['density']}  {row['step_ratio']:.3f} of dense{limit}")
    if on_cpu and missing:
        print(f"products ran in XLA: {missing}")
    if not peer:
        print(f"sparselab: {record['sparselab']}")
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(main())
