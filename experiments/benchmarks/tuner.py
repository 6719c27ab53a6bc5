"""Finds the fastest settings of a block product on a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import device_clock
from experiments.benchmarks.random_blocks import random_array, random_kernel
from topkast_jax import Block
from topkast_jax.always_sparse.products import tuning
from topkast_jax.always_sparse.products.settings import Settings
from topkast_jax.always_sparse.products.tuning import Entry, Key

GAIN = 0.98
"""A candidate is better if it takes at most this share of the time: less may be noise."""
_PASSES = 2
_TOLERANCE = {"float32": 1e-2, "float64": 1e-2}  # of the largest entry; GPUs round to TF32
_COARSE = 5e-2  # of narrower dtypes
Seconds = Callable[[Settings], float | None]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The products of one kernel, whose three settings are found one after another.

    Attributes:
        backend: a name in `tuning.MODULES`.
        block: rows and columns of a block.
        dtype: of x and of the values.
        shape: K and N.
        tokens: rows of x.
        densities: of A and of B; one product at each of them is timed, and the sum counts.
        interpret: Pallas kernels are interpreted.
    """

    backend: str
    block: tuple[int, int]
    dtype: str
    shape: tuple[int, int]
    tokens: int
    densities: Sequence[tuple[float, float]]
    interpret: bool = False

    def __str__(self) -> str:
        sides = "x".join(map(str, self.block)), "x".join(map(str, self.shape))
        return f"{self.backend} {sides[1]} block {sides[0]} {self.dtype} tokens {self.tokens}"


def tune(
    problem: Problem, product: str, repeats: int, left: Callable[[], float], say: Callable[..., Any]
) -> tuple[Entry, str]:
    """Searches the settings of one product.

    Args:
        problem: the kernel and the device's backend.
        product: one of `tuning.PRODUCTS`.
        repeats: runs of one timing.
        left: the seconds left; when they are over, the best so far is returned.
        say: prints what a candidate took, or why it was dropped.

    Returns:
        The entry for a table, and whose clock measured it (`device_clock`).
    """
    arrays = _arrays(problem, product)
    default = tuning.defaults(problem.backend, product)
    expected = _compiled(problem, product, default)(arrays)
    clocks: set[str] = set()

    def seconds(settings: Settings) -> float | None:
        try:
            run = _compiled(problem, product, settings)
            found = run(arrays)
            if not _agree(found, expected, problem.dtype):
                raise ArithmeticError("it gives another product than the defaults")
            timing = device_clock.measure(lambda: run(arrays), repeats)
        except Exception as error:  # A compiler refuses what does not fit in many ways.
            if settings == default:
                raise
            say(f"  {_said(settings)}: dropped, {str(error).strip().partition(chr(10))[0][:200]}")
            return None
        clocks.add(timing.clock)
        say(f"  {_said(settings)}: {1e6 * timing.seconds:.1f} us")
        return timing.seconds

    best, times = search(default, seconds, left)
    key = Key(
        tuning.target_device(None).device_kind,
        problem.backend,
        product,
        problem.block,
        problem.dtype,
        problem.shape,
    )
    took = (round(1e6 * times[settings], 2) for settings in (best, default))
    return Entry(key, problem.tokens, best, *took), "/".join(sorted(clocks))


def search(
    default: Settings, seconds: Seconds, left: Callable[[], float]
) -> tuple[Settings, Mapping[Settings, float]]:
    """Changes one field at a time, from the defaults on, for as long as a pass over them helps.

    Args:
        default: where the search begins; its time is always taken.
        seconds: the time of settings, or None if they do not run. Called once for each.
        left: no candidate is tried when it is 0 or less.

    Returns:
        The best settings, and the time of all that ran.
    """
    times = {default: seconds(default)}
    best = default
    for _ in range(_PASSES):
        before = best
        for field in dataclasses.fields(default):
            for candidate in best.varied(field.name):
                if candidate not in times and left() > 0:
                    times[candidate] = seconds(candidate)
            best = _better(best, best.varied(field.name), times)
        if best == before:
            break
    return best, {settings: time for settings, time in times.items() if time is not None}


def _better(
    best: Settings, candidates: Sequence[Settings], times: Mapping[Settings, float | None]
) -> Settings:
    for candidate in candidates:
        took, least = times.get(candidate), times[best]
        if took is not None and least is not None and took <= GAIN * least:
            best = candidate
    return best


def _arrays(problem: Problem, product: str) -> list[tuple[jax.Array, ...]]:
    """What the product at each density reads."""
    k, n = problem.shape
    x = random_array(0, (problem.tokens, k), problem.dtype)
    dy = random_array(1, (problem.tokens, n), problem.dtype)
    arrays: list[tuple[jax.Array, ...]] = []
    for seed, densities in enumerate(problem.densities):
        kernel = random_kernel(seed, problem.shape, Block(*problem.block), densities, problem.dtype)
        row, col = kernel.index // (n // problem.block[1]), kernel.index % (n // problem.block[1])
        a = kernel.forward
        arrays.append(
            {
                "spmm": (x, kernel.values, row[:a], col[:a]),
                "spmm_transposed": (dy, kernel.values, col[:a], row[:a]),
                "sddmm": (x, dy, row, col),
            }[product]
        )
    return arrays


def _compiled(problem: Problem, product: str, settings: Settings) -> Callable[..., Any]:
    """All densities' products in one program."""
    run = tuning.bound(
        problem.backend, product, problem.block, problem.shape, settings, problem.interpret
    )
    return jax.jit(lambda arrays: [run(*each) for each in arrays])


@jax.jit
def _errors(found: Any, expected: Any) -> jax.Array:
    pairs = [
        (f.astype(jnp.float32), e.astype(jnp.float32)) for f, e in zip(found, expected, strict=True)
    ]
    return jnp.stack([jnp.abs(f - e).max() / jnp.maximum(1, jnp.abs(e).max()) for f, e in pairs])


def _agree(found: Any, expected: Any, dtype: str) -> bool:
    return bool(_errors(found, expected).max() <= _TOLERANCE.get(dtype, _COARSE))


def _said(settings: Settings) -> str:
    return " ".join(f"{k}={v}" for k, v in dataclasses.asdict(settings).items())
