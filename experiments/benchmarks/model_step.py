"""The time and the memory of the training step of a config, on random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import device_clock
from experiments.benchmarks.memory import memory
from experiments.config import resolve
from experiments.training.program import Program, build

CONFIG = Path(__file__).parents[2] / "configs/enwik8_base.py"
BASE: tuple[str, tuple[str, ...]] = ("enwik8-base", ())
SMOKE: tuple[str, tuple[str, ...]] = (
    "enwik8-base, one layer of width 256",
    (
        "batch_size=2",
        "model.n_layer=1",
        "model.n_head=4",
        "model.d_model=256",
        "model.d_inner=256",
        "model.train.target=32",
        "model.train.memory=32",
    ),
)


def times(
    variant: str, block: int | None, backend: str | None, overrides: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Times the steps of `configs/enwik8_base.py` on one device, without refreshes.

    Args:
        variant: "dense", or forward/backward sparsity in percent.
        block: the side of a block, always sparse; None for a dense run.
        backend: of the block products; None for the platform's.
        overrides: of the config, as `KEY=VALUE`.
        repeats: steps that are timed.

    Returns:
        "step" in seconds, "memory", and "clock".
    """
    sparse = () if block is None else (
        "method.always_sparse=True",
        f"method.pattern=block:{block}x{block}",
        *(() if backend is None else (f"method.backend={backend}",)),
    )  # fmt: skip
    config = resolve(f"{CONFIG}:{variant}", (*sparse, *overrides))
    program = build(config, jax.devices()[:1])
    batch = random_batch(program)
    state = program.representation.init()._replace(reservoir=())
    compiled = program.step.lower(state, batch).compile()
    held = [state]
    del state  # Its buffers are donated.

    def run() -> Any:
        held[0], sums = compiled(held[0], batch)
        return sums

    timing = device_clock.measure(run, repeats)
    return {"step": timing.seconds, "memory": memory(compiled), "clock": timing.clock}


def random_batch(program: Program) -> Any:
    """A batch of random tokens, on the devices."""
    rng = np.random.default_rng(0)
    tokens = {
        name: rng.integers(0, program.config.data.vocabulary_size, x.shape).astype(x.dtype)
        for name, x in program.task.example_batch().items()
    }
    return program.put(tokens)
