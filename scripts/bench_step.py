"""Times a Top-KAST training step against the dense step of the same network, in one run.

    .venv/bin/python scripts/bench_step.py [--cases=mlp_b128_r100,…] [--pairs=N]

A case is a network, a batch and how often the sets are chosen anew: `mlp_b128_r100` is a
784-2048-2048-2048-10 MLP at batch 128 with a refresh every 100 steps. Steps are timed in
interleaved pairs (dense, then Top-KAST at 90/80 % sparsity) and the median ratio is reported; with
a refresh every r steps, the time of a Top-KAST step is ((r − 1) · plain + refreshing) / r, both
measured. `memory_ratio` is the compiled step's peak (arguments, outputs and temporaries) over the
dense one's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import topkast_jax as tk

Loss = Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """What one row measures."""

    make: Callable[[], tuple[Any, Any, Loss, optax.GradientTransformation]]
    refresh_every: int


def mlp(batch: int) -> tuple[Any, Any, Loss, optax.GradientTransformation]:
    """Parameters, a batch, the loss and the optimizer of the MLP."""
    sizes = (784, 2048, 2048, 2048, 10)
    keys = jax.random.split(jax.random.key(0), len(sizes) + 1)
    params = [
        {
            "kernel": jax.random.normal(key, (m, n)) * (2.0 / m) ** 0.5,
            "bias": jnp.zeros(n),
        }
        for key, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]
    images = jax.random.normal(keys[-2], (batch, sizes[0]))
    labels = jax.random.randint(keys[-1], (batch,), 0, sizes[-1])

    def loss(params: Any, data: Any) -> jax.Array:
        x, labels = data
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        logits = x @ params[-1]["kernel"] + params[-1]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return params, (images, labels), loss, optax.sgd(0.01, momentum=0.9)


CASES = {
    f"mlp_b{batch}_r{refresh}": Case(lambda batch=batch: mlp(batch), refresh)  # type: ignore[misc]
    for refresh in (100, 1)
    for batch in (128, 1024)
}


def compile_step(
    tx: optax.GradientTransformation, sparse: bool, loss: Loss, params: Any, data: Any
) -> tuple[Any, Any]:
    """The compiled, donating training step and its first optimizer state."""

    def step(params: Any, state: Any, data: Any) -> tuple[Any, Any, jax.Array]:
        view = tk.forward_params(params, state) if sparse else params
        value, grads = jax.value_and_grad(loss)(view, data)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = jax.jit(tx.init)(params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, data).compile(), state


def peak_bytes(compiled: Any) -> int:
    """Arguments, outputs and temporaries of a compiled step, what is donated counted once."""
    m = compiled.memory_analysis()
    return int(
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
    )


def at_step(state: Any, step: int) -> Any:
    """The same Top-KAST state with another number of finished steps."""
    return state._replace(step=jnp.int32(step))


def measure(case: Case, pairs: int) -> dict[str, float]:
    """Median step ratio over interleaved pairs, and the ratio of peak memory."""
    params, data, loss, inner = case.make()
    sparse_tx = tk.top_kast(inner, 0.1, 0.2, refresh_every=case.refresh_every)
    dense, dense_state = compile_step(inner, False, loss, params, data)
    sparse, sparse_state = compile_step(sparse_tx, True, loss, params, data)
    carried = {
        "dense": (jax.tree.map(jnp.copy, params), dense_state),
        "sparse": (jax.tree.map(jnp.copy, params), sparse_state),
    }

    def timed(name: str, step: Any, finished: int | None = None) -> float:
        params, state = carried[name]
        state = state if finished is None else at_step(state, finished)
        jax.block_until_ready((params, state))
        start = time.perf_counter()
        *new, value = step(params, state, data)
        jax.block_until_ready((new, value))
        carried[name] = (new[0], new[1])
        return time.perf_counter() - start

    ratios, r = [], case.refresh_every
    for pair in range(pairs + 2):
        base = timed("dense", dense)
        refreshing = timed("sparse", sparse, r - 1)
        plain = timed("sparse", sparse, 0) if r > 1 else 0.0
        if pair >= 2:
            ratios.append(((r - 1) * plain + refreshing) / r / base)
    memory = peak_bytes(sparse) / peak_bytes(dense)
    return {"step_ratio": round(statistics.median(ratios), 3), "memory_ratio": round(memory, 3)}


def main() -> None:
    """Runs the chosen cases and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", default=",".join(CASES), help="comma list of cases")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs a case")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cases.split(",") if name not in CASES]
    if unknown or arguments.pairs < 1:
        sys.exit(f"--cases={arguments.cases} --pairs={arguments.pairs}: cases are {list(CASES)}")
    results = []
    for name in arguments.cases.split(","):
        results.append({"case": name, **measure(CASES[name], arguments.pairs)})
        print(results[-1], flush=True)
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
