"""A save that runs in the background stores what was there when it was asked for."""

import asyncio
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs
from orbax.checkpoint._src.path import async_path

from experiments.records.checkpoints import Checkpoints, Kept, load


@pytest.fixture
def hold(monkeypatch):
    """Orbax makes no folder, and so writes nothing, before this event is set."""
    event, mkdir = threading.Event(), async_path.mkdir

    async def later(*args, **options):
        await asyncio.to_thread(event.wait, 60)
        await mkdir(*args, **options)

    monkeypatch.setattr(async_path, "mkdir", later)
    yield event
    event.set()


def test_arrays_may_change_and_be_donated_meanwhile(tmp_path, hold):
    state = {
        "device": jnp.arange(1000.0),
        "host": np.arange(1000.0),
        "deleted": jnp.arange(10.0),
        "nested": [{"flags": np.arange(16, dtype=np.uint8).reshape(4, 4)}],
    }
    expected = jax.tree.map(np.array, state)
    store = Checkpoints(tmp_path, Kept(last=1))
    store.save(7, state, {})
    assert not (tmp_path / "7").exists()
    donated = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(state["device"])
    donated.block_until_ready()
    state["host"][:] = -1
    state["nested"][0]["flags"][1:, 2] = 99
    state["deleted"].delete()
    assert not (tmp_path / "7").exists()
    hold.set()
    store.wait()
    assert store.kept() == "the last good checkpoint, of step 7, is kept"
    store.close()
    found, _ = load(tmp_path, lambda _: jax.eval_shape(lambda: expected))
    toy_runs.assert_same(jax.tree.map(np.asarray, found), expected)


@pytest.mark.parametrize("delay", [0, 1])
def test_an_always_sparse_run_goes_on_meanwhile(tmp_path, monkeypatch, hold, delay):
    """Refreshes change the host's arrays in place while a checkpoint of them is being written."""
    options = ("method.always_sparse=True", "method.refresh_every=2", "checkpoint_every=5")
    options += (f"method.refresh_delay={delay}", "steps=9")
    wait = Checkpoints.wait
    with monkeypatch.context() as patch:
        # Step 9 is the first to wait for the save of step 5.
        patch.setattr(
            Checkpoints, "wait", lambda store: (store._pending and hold.set(), wait(store))[1]
        )
        toy_runs.run(tmp_path / "run", "80/60", *options)
    toy_runs.run(tmp_path / "before", "80/60", *options, stop_at=5)
    last, _ = toy_runs.last_state(tmp_path / "run", "80/60", *options)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "9")
    state, position = toy_runs.last_state(tmp_path / "run", "80/60", *options)
    expected, _ = toy_runs.last_state(tmp_path / "before", "80/60", *options)
    assert position == {"position": 5}
    toy_runs.assert_same(state, expected)
    for name, theta in expected.reservoir.theta.items():
        assert (theta != last.reservoir.theta[name]).any()
        assert (expected.reservoir.sets[name] != last.reservoir.sets[name]).any()
