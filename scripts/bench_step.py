"""Times the training step of a sparsity method against the dense step of the same network.

    .venv/bin/python scripts/bench_step.py [--cases=mlp_b128_r100,…] [--pairs=N]

A case is a network, a batch size and a refresh interval: `mlp_b128_r100` is a 784-2048-2048-2048-10
MLP at batch size 128 with a refresh every 100 steps, and `txl_small_r100` is the Transformer-XL of
`configs/enwik8_small.py` with its batch, optimizer and sparse layers, both with Top-KAST at 90/80 %
sparsity. `rigl_b128_r100` is the MLP with RigL at 90 %, and so on for every method, at its usual
interval. Steps are timed in interleaved pairs (dense, then sparse), and the median ratio is
reported. With a refresh every r steps, the time of a step is ((r − 1) · plain + refreshing) / r,
where both times are measured; sets that are chosen once count as never refreshed. `memory_ratio` is
the peak memory of the compiled step (arguments, outputs and temporaries) over that of the dense
step. The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import topkast_jax as tk
from experiments.config import command_line
from experiments.tpu import compiling
from experiments.training.partition import all_devices
from topkast_jax.sets import DUE, NOT_DUE

Loss = Callable[[Any, Any], jax.Array]
CONFIG = Path(__file__).parents[1] / "configs" / "enwik8_small.py"


@dataclasses.dataclass(frozen=True)
class Training:
    """A network, a batch, its dense optimizer and its Top-KAST optimizer."""

    params: Any
    data: Any
    loss: Loss
    dense: optax.GradientTransformation
    sparse: optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class Case:
    """The measurement of one row."""

    make: Callable[[int | None], Training]
    refresh_every: int | None


def mlp(batch: int, refresh_every: int | None, method: str = "top_kast") -> Training:
    """An MLP that is trained with momentum."""
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

    inner = optax.sgd(0.01, momentum=0.9)
    options = dict(METHODS[method])
    if refresh_every is not None:
        options["refresh_every"] = refresh_every
    sparse = tk.methods.get(method)(inner, 0.1, **options)
    return Training(params, (images, labels), loss, inner, sparse)


def transformer_xl(refresh_every: int | None) -> Training:
    """The model of `configs/enwik8_small.py` on random bytes, with a full memory."""
    from experiments import config
    from experiments.task import make_task
    from experiments.training import optimizers

    with_refresh = [f"method.refresh_every={refresh_every}"]
    sparse = config.resolve(f"{CONFIG}:90/80", with_refresh)
    dense = config.resolve(f"{CONFIG}:dense", [])
    task, keys = make_task(sparse), jax.random.split(jax.random.key(0), 3)
    params, memory = jax.jit(task.init)(keys[0])
    states = jax.random.normal(keys[1], memory.states.shape, memory.states.dtype)
    memory = memory._replace(states=states, valid=jnp.int32(states.shape[2]))
    shape = task.example_batch()["tokens"].shape
    text = jax.random.randint(keys[2], (shape[0], shape[1] + 1), 0, sparse.data.vocabulary_size)

    def loss(params: Any, data: Any) -> jax.Array:
        memory, text = data
        batch = {"tokens": text[:, :-1], "targets": text[:, 1:]}
        return task.loss(params, memory, batch, keys[0])[0]

    dense_tx, (_, sparse_tx) = (
        optimizers.make_dense(dense, params),
        optimizers.make_masked(sparse, params),
    )
    return Training(params, (memory, text), loss, dense_tx, sparse_tx)


METHODS: dict[str, dict[str, Any]] = {
    "top_kast": {"backward_density": 0.2},
    "static_random": {"seed": 0},
    "pruning": {"begin_at": 0, "end_at": 1000},
    "dnw": {}, "rigl": {}, "set": {}, "snfs": {}, "snip": {}, "srigl": {},
}  # fmt: skip
INTERVALS = {"dnw": 1, "static_random": None, "snip": None}  # of the others: 100
CASES = (
    {
        f"mlp_b{batch}_r{refresh}": Case(functools.partial(mlp, batch), refresh)
        for refresh in (100, 1)
        for batch in (128, 1024)
    }
    | {"txl_small_r100": Case(transformer_xl, 100)}
    | {
        f"{method}_b128" + (f"_r{every}" if every else ""): Case(
            functools.partial(mlp, 128, method=method), every
        )
        for method, every in ((m, INTERVALS.get(m, 100)) for m in METHODS if m != "top_kast")
    }
)


def compile_step(
    tx: optax.GradientTransformation, sparse: bool, loss: Loss, params: Any, data: Any
) -> tuple[Any, Any]:
    """The compiled training step, which donates its arguments, and the initial optimizer state."""

    def step(params: Any, state: Any, data: Any) -> tuple[Any, Any, jax.Array]:
        view = tk.forward_params(params, state) if sparse else params
        value, grads = jax.value_and_grad(loss)(view, data)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = jax.jit(tx.init)(params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, data).compile(), state


def with_choice(state: Any, due: bool) -> Any:
    """The same state, in the middle of a run, with or without a choice that the next step makes."""
    return state._replace(step=jnp.int32(1), due=jnp.int8(DUE if due else NOT_DUE))


def measure(case: Case, pairs: int) -> dict[str, float]:
    """The median ratio of step times over interleaved pairs, and the ratio of peak memory."""
    training = case.make(case.refresh_every)
    params, data, loss = training.params, training.data, training.loss
    dense, dense_state = compile_step(training.dense, False, loss, params, data)
    sparse, sparse_state = compile_step(training.sparse, True, loss, params, data)
    carried = {
        "dense": (jax.tree.map(jnp.copy, params), dense_state),
        "sparse": (jax.tree.map(jnp.copy, params), sparse_state),
    }

    def timed(name: str, step: Any, due: bool | None = None) -> float:
        params, state = carried[name]
        state = state if due is None else with_choice(state, due)
        jax.block_until_ready((params, state))
        start = time.perf_counter()
        *new, value = step(params, state, data)
        jax.block_until_ready((new, value))
        carried[name] = (new[0], new[1])
        return time.perf_counter() - start

    ratios, refreshes = [], 1 / case.refresh_every if case.refresh_every else 0.0
    for pair in range(pairs + 2):
        base = timed("dense", dense)
        refreshing = timed("sparse", sparse, True) if refreshes > 0 else 0.0
        plain = timed("sparse", sparse, False) if refreshes < 1 else 0.0
        if pair >= 2:
            ratios.append(((1 - refreshes) * plain + refreshes * refreshing) / base)
    peak = [compiling.memory(step)["device_bytes"]["total"] for step in (sparse, dense)]
    memory = peak[0] / peak[1]
    return {"step_ratio": round(statistics.median(ratios), 3), "memory_ratio": round(memory, 3)}


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the chosen cases and prints the results."""
    parser = command_line.Parser(prog="scripts/bench_step.py", description=__doc__)
    parser.add_argument("--cases", type=command_line.some_of(CASES), default=",".join(CASES))
    parser.add_argument(
        "--pairs", type=command_line.positive, default=15, help="timed pairs a case"
    )
    args = parser.parse_args(argv)
    all_devices()  # Raises UserError if JAX_PLATFORMS names devices that are absent.
    results = []
    for name in args.cases:
        results.append({"case": name, **measure(CASES[name], args.pairs)})
        print(results[-1], flush=True)
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    sys.exit(main())
