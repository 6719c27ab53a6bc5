"""The loop: exact evaluation, records, and the end at a loss that is not finite."""

import datetime
import json
import math
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from toy import SIZES, Toy, examples
from toy_runs import config, last_state, records, run, sets

import topkast_jax as tk
from experiments.errors import UserError
from experiments.processor import processor
from experiments.training.prefetch import Prefetcher
from experiments.training.program import Step
from experiments.training.stopping import StopRequest


def accuracy_by_hand(state):
    """From the parameters on the forward set, in NumPy, over the test set at once."""
    params, view = state.params, tk.forward_params(state.params, state.opt_state)
    first, second = (np.asarray(view[name]["kernel"]) for name in ("in", "out"))
    found = examples("test", 0.5)
    hidden = np.maximum((found["x"] - state.model_state["mean"]) @ first + params["in"]["bias"], 0)
    logits = hidden @ second + params["out"]["bias"]
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(SIZES["test"]), found["label"]]
    return np.mean(logits.argmax(1) == found["label"]), losses.mean()


@pytest.mark.parametrize(
    "batch_size",
    [40, 72, pytest.param(8, marks=pytest.mark.slow), pytest.param(80, marks=pytest.mark.slow)],
)
def test_evaluation_is_exact_at_any_batch_size(tmp_path, batch_size):
    run(tmp_path / "run", "80/60", f"batch_size={batch_size}", "steps=6")
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    state, _ = last_state(tmp_path / "run", "80/60", f"batch_size={batch_size}", "steps=6")
    accuracy, loss = accuracy_by_hand(state)
    assert final["test"]["accuracy"] == pytest.approx(accuracy, rel=1e-12)
    assert final["test"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert final["test_context"] == {"examples": 77}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    run(directory, "80/60", "eval_every=10")
    return directory


def test_records(finished):
    found = records(finished, timing=True)
    assert [(r["step"], r["split"]) for r in found] == [
        (5, "train"),
        (5, "masks"),
        (10, "train"),
        (10, "masks"),
        (10, "test"),
        (15, "train"),
        (15, "masks"),
        (20, "train"),
        (20, "masks"),
        (20, "test"),
    ]
    trains = [r for r in found if r["split"] == "train"]
    assert all(0 <= r["timing"]["data_wait"] <= 1 for r in trains)
    for r in trains:
        assert r["timing"]["examples_per_second"] == 32 * r["timing"]["steps_per_second"]
    masks = [r for r in found if r["split"] == "masks"]
    assert masks[-1]["churn_since_start"] > masks[0]["churn_since_last_refresh"] > 0
    assert masks[-1]["forward_density"] == pytest.approx(0.2, abs=2e-3)


def test_final_counts_the_sets(finished):
    final = json.loads((finished / "final.json").read_text())
    state, _ = last_state(finished, "80/60", "eval_every=10")
    pairs = sets(state)
    entries = sum(forward.size for forward, _ in pairs)
    forward = sum(int(forward.sum()) for forward, _ in pairs)
    backward = sum(int(backward.sum()) for _, backward in pairs)
    biases = 32 + 4
    assert final["parameters"] == entries + biases
    assert final["active_parameters"] == forward + biases
    assert final["densities"]["forward"] == forward / entries
    assert final["densities"]["backward"] == backward / entries
    assert final["densities"]["forward_all"] == (forward + biases) / (entries + biases)
    inference = forward / entries  # every product of this network is with a sparse leaf
    assert final["flops"]["inference_fraction"] == pytest.approx(inference)
    assert final["flops"]["training_fraction"] == pytest.approx(
        (2 * inference + backward / entries) / 3
    )
    assert final["flops"]["dense_forward_per_step"] == 2 * 32 * entries
    assert final["seconds"] > 0
    assert final["device"]
    assert final["processor"] == processor()
    assert abs(datetime.date.fromisoformat(final["date"]) - datetime.date.today()).days <= 1
    assert final["versions"]["jax"] == jax.__version__


def test_an_empty_split_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "eval_data", lambda self, split: iter(()))
    with pytest.raises(UserError, match="the test split of the data is empty"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert run(tmp_path / "run", "80/60", "eval_at_end=False", "steps=3") == "finished"


def test_the_last_step_is_evaluated_where_no_test_follows(tmp_path):
    own = ("eval_at_end=False", "steps=4", "eval_every=2")
    assert run(tmp_path / "run", "80/60", *own) == "finished"
    assert [r["step"] for r in records(tmp_path / "run") if r["split"] == "test"] == [2, 4]


def test_training_learns_on_the_view(finished):
    losses = [r["loss"] for r in records(finished) if r["split"] == "train"]
    assert losses[-1] < losses[0] / 2


def test_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    options = ("checkpoint_every=5", "log_every=4")
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", "nan", *options)
    assert "loss of step 13 is nan, in steps 13 to 13" in str(error.value)
    assert "checkpoint, of step 10, is kept" in str(error.value)
    state, _ = last_state(tmp_path / "run", "nan", *options)
    assert int(state.step) == 10
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))
    assert max(r["step"] for r in records(tmp_path / "run")) == 12


@pytest.mark.parametrize(
    "last", ["log_every=13", "checkpoint_every=13", "eval_every=13", "steps=13"]
)
def test_not_finite_writes_nothing(tmp_path, last):
    """Also where the spoilt step is the last before a record, a checkpoint or the end."""
    with pytest.raises(UserError, match="loss of step 13 is nan, in steps 1 to 13"):
        run(tmp_path / "run", "nan", "log_every=1000", last)
    assert not records(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == []


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    """The loss of a step is of the parameters before it."""
    huge = ("optimizer.learning_rate=3e38", "optimizer.l2=1e3")
    with pytest.raises(UserError, match="parameters after step 1 are not finite, in steps 1 to 1"):
        run(tmp_path / "run", "dense", *huge, "checkpoint_every=1")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == []


class Counting:
    """An iterator that yields its position."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        if self.position == 9:
            raise OSError("torn file")
        return {"x": self.position}

    def get_state(self):
        return self.position


def test_prefetcher_knows_the_last_batch_taken():
    data = Counting()
    with Prefetcher(data, lambda batch: batch["x"] * 10) as batches:
        assert batches.position == 0
        for i in range(1, 9):
            assert batches.next() == 10 * i
            assert batches.position == i
            assert (batches.waited > 0) == (i > 1)  # The first step is not timed either.
        for _ in range(2):
            with pytest.raises(OSError, match="torn file"):
                batches.next()


def test_prefetcher_stops_in_the_middle():
    with Prefetcher(Counting(), lambda batch: batch) as batches:
        batches.next()
    assert not batches._thread.is_alive()


def test_on_many_hosts_a_step_waits_for_no_other_host(monkeypatch):
    """JAX's preemption service is asked, which only looks at what it was told."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.delattr(multihost_utils, "process_allgather")
    reached = lambda step: step == 3  # noqa: E731
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) is before
        assert [stop.asked(step) for step in range(1, 5)] == [False, False, True, True]


def test_learning_rate_schedules():
    from experiments.training.optimizers import make_schedule

    options = ("optimizer.schedule.warmup_steps=4", "optimizer.learning_rate=1.0", "steps=24")
    cosine = make_schedule(config("dense", *options, "optimizer.schedule.name=cosine"))
    step = make_schedule(
        config(
            "dense",
            *options,
            "optimizer.schedule.name=step",
            "optimizer.schedule.boundaries=(10,20)",
        )
    )
    assert [float(cosine(i)) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    for i in range(4, 24):
        assert float(cosine(i)) == pytest.approx(
            0.5 + 0.5 * math.cos(math.pi * (i - 4) / 20), abs=1e-6
        )
    expected = [0.25, 0.5, 0.75] + [1.0] * 7 + [0.1] * 10 + [0.01] * 4
    np.testing.assert_allclose([float(step(i)) for i in range(24)], expected, rtol=1e-6)


def test_the_recorded_learning_rate_is_that_of_the_step(tmp_path):
    own = ("steps=4", "log_every=1", "eval_at_end=False", "optimizer.learning_rate=0.1")
    run(tmp_path / "run", "dense", *own, "optimizer.schedule.warmup_steps=2")
    rates = [r["learning_rate"] for r in records(tmp_path / "run") if r["split"] == "train"]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.1])


def test_each_step_and_each_seed_has_a_key_of_its_own():
    task = types.SimpleNamespace(loss=lambda alpha, state, batch, rng: rng)
    keys = [
        Step(task, None, seed, None)._loss({}, {}, {}, jnp.int32(step))
        for seed in (0, 1) for step in range(3)
    ]  # fmt: skip
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 6
