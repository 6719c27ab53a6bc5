"""The models of the paper on one device, by batch, by all three axes, and by `tensor` alone."""

import jax
import numpy as np
import pytest
from records.test_resume_hosts import on
from toy_runs import records, sets

from experiments.config import resolve
from experiments.loop import train
from experiments.records.checkpoints import load
from experiments.records.workdir import CHECKPOINTS
from experiments.training.program import build

STEPS = 20
MESHES = {"8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2), "1x1x8": (1, 1, 8)}
RUNS = {
    "transformer_xl": (
        "configs/enwik8_small.py:90/80,smoke",
        "model.n_head=8", "model.d_head=8", "optimizer.eps=1e-5", "batch_size=16",
    ),
    "resnet": (
        "configs/cifar10_small.py:90/80,smoke", "optimizer.learning_rate=0.003", "batch_size=64",
    ),
}  # fmt: skip
FORMS = {"masked": (), "always_sparse": ("method.always_sparse=True",)}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained():
    """The losses and the sets after the steps, by model, form and mesh; made once."""
    known = {}

    def train(model, form, mesh):
        key = (model, form, mesh)
        if key not in known:
            spec, *own = RUNS[model]
            sizes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
            own += [f"mesh.{axis}={size}" for axis, size in sizes]
            own += [f"steps={STEPS}", *FORMS[form]]
            run = build(resolve(spec, own), jax.devices()[: int(np.prod(mesh))])
            state, data, losses = run.representation.init(), run.task.train_data(), []
            for step in range(1, STEPS + 1):
                state, sums = run.step(state, run.put(next(data)))
                state = run.representation.between_steps(state, step, None)
                losses.append(float(sums["loss"][0] / sums["loss"][1]))
            state = run.representation.settled(state)
            known[key] = losses, state.reservoir.sets if form != "masked" else sets(state)
        return known[key]

    return train


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", RUNS)
def test_same_sets_and_losses(trained, model, form, mesh):
    losses, chosen = trained(model, form, mesh)
    expected, expected_sets = trained(model, form, (1, 1, 1))
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    for one, other in zip(jax.tree.leaves(chosen), jax.tree.leaves(expected_sets), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", RUNS)
def test_two_processes_of_four_devices(tmp_path, model, form):
    spec, *own = RUNS[model]
    own += [f"steps={STEPS}", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", *FORMS[form]]
    on(tmp_path / "two", own, hosts=2, devices=4, spec=spec)
    config = resolve(spec, own)
    train(config, tmp_path / "one")
    losses, chosen = [], []
    for name in ("one", "two"):
        found = records(tmp_path / name)
        losses.append([r["loss"] for r in found if r["split"] == "train"])
        abstract = build(config).representation.abstract
        state, _ = load(tmp_path / name / CHECKPOINTS, abstract)
        chosen.append(state.reservoir.sets if form != "masked" else sets(state))
    assert len(losses[0]) == STEPS
    np.testing.assert_allclose(*losses, atol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, chosen), strict=True):
        np.testing.assert_array_equal(one, other)
