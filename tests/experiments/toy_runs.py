"""Runs of the toy task, and what they leave behind."""

from pathlib import Path

import jax
import numpy as np

from experiments.config import resolve
from experiments.loop import train
from experiments.records import workdir
from experiments.records.checkpoints import load
from experiments.records.metrics import read_records
from experiments.training.program import build
from topkast_jax.flags import BACKWARD, FORWARD
from topkast_jax.sets import presents

HERE = Path(__file__).parent
# The same few steps are compiled again and again.
CACHE = {
    "jax_compilation_cache_dir": str(HERE.parents[1] / ".pytest_cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for name, value in CACHE.items():
    jax.config.update(name, value)
CONFIG = str(HERE / "toy_config.py")


def config(variant="80/60", *overrides):
    return resolve(f"{CONFIG}:{variant}", overrides)


def run(directory, variant="80/60", *overrides, stop_at=None):
    return train(config(variant, *overrides), directory, stop_at)


def last_state(directory, variant="80/60", *overrides):
    """The state of the newest checkpoint, as NumPy arrays, and the data's position."""
    abstract = build(config(variant, *overrides)).representation.abstract
    state, meta = load(directory / workdir.CHECKPOINTS, abstract)
    return jax.tree.map(np.asarray, state), meta["data"]


def records(directory, timing=False):
    found = read_records(directory / workdir.METRICS)
    return found if timing else [{k: v for k, v in r.items() if k != "timing"} for r in found]


def sets(state):
    """Forward and backward sets of a masked run, by leaf: those of the parameters it has."""
    flags = jax.device_get(presents(state.params, state.opt_state).flags)
    return [(f & FORWARD != 0, f & BACKWARD != 0) for f in flags.values()]


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)
