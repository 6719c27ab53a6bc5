"""Runs of the toy task, and what they leave behind."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import resolve
from experiments.loop import train
from experiments.records import workdir
from experiments.records.checkpoints import load
from experiments.records.metrics import read_records
from experiments.task import make_task
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
    abstract = shared_program(config(variant, *overrides)).representation.abstract
    state, (meta, *_) = load(directory / workdir.CHECKPOINTS, abstract)
    return jax.tree.map(np.asarray, state), meta["data"]


SECTIONS = ("task", "batch_size", "steps", "seed", "mesh", "model", "data", "optimizer", "method")
"""The keys of a config on which its compiled functions depend."""
_PROGRAMS = {}


def shared_program(config):
    """`build(config)`, with the functions of an earlier program where these keys are the same.

    A program with a state of its own (always sparse) and one of a test's own files are built anew.
    """
    key = json.dumps([config.to_dict()[name] for name in SECTIONS], sort_keys=True)
    if config.method.get("always_sparse") or re.search(r'"\w+:\w+"', key):
        return build(config)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = build(config)
        _PROGRAMS[key].representation.init = _first_state(_PROGRAMS[key].representation.init)
    return dataclasses.replace(_PROGRAMS[key], config=config, task=make_task(config))


def _first_state(init):
    """Calls `init` once. What it returns is a copy, which a step may donate."""
    first = functools.cache(init)
    return lambda: jax.tree.map(jnp.copy, first())


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
