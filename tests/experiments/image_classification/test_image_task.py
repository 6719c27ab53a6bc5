"""The task: its loss and its sums against NumPy, and evaluation at any batch size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import resolve
from experiments.image_classification.data.preprocessing import RECIPES
from experiments.records.summary import description
from experiments.task import make_task


def task_of(*overrides):
    small = ("model.width=0.25", *overrides)
    return make_task(resolve("configs/quickstart.py:dense", small))


def summed(batches_of_sums):
    totals = {}
    for sums in batches_of_sums:
        for name, pair in sums.items():
            totals[name] = np.add(totals.get(name, (0.0, 0.0)), np.float64(pair))
    return totals


@pytest.fixture(scope="module")
def trained():
    """A network whose running statistics differ from a batch's."""
    task = task_of("batch_size=20")
    params, state = task.init(jax.random.key(1))
    batch = next(task.train_data())
    _, (state, _) = jax.jit(task.loss)(params, state, batch, jax.random.key(0))
    return params, state


def test_init_gives_nested_dicts_and_depends_on_the_key():
    task = task_of()
    params, state = task.init(jax.random.key(0))
    assert isinstance(params["stage1"]["block0"]["conv1"]["kernel"], jax.Array)
    assert set(state["stem_bn"]) == {"mean", "var"}
    other, _ = task.init(jax.random.key(1))
    assert not np.array_equal(params["stem"]["kernel"], other["stem"]["kernel"])
    shapes = jax.tree.map(jnp.shape, (params, state))
    assert shapes == jax.tree.map(jnp.shape, jax.eval_shape(task.init, jax.random.key(0)))


def test_a_batch_has_the_promised_shape():
    task = task_of("batch_size=20")
    expected = {k: (v.shape, v.dtype) for k, v in task.example_batch().items()}
    assert {k: (v.shape, v.dtype) for k, v in next(task.train_data()).items()} == expected


def test_loss_against_numpy(trained, monkeypatch):
    """Smoothed cross-entropy of logits that are known."""
    logits = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    task = task_of("batch_size=4", "model.label_smoothing=0.1")
    merge = task._merge

    def merged(*trees):
        model = merge(*trees)
        head = lambda x: x[:, :0].sum() + logits  # noqa: E731
        monkeypatch.setattr(model, "head", head, raising=False)
        return model

    monkeypatch.setattr(task, "_merge", merged)
    batch = {"image": np.zeros((4, 28, 28, 1), np.uint8), "label": np.array([3, 1, 4, 1], np.int32)}
    loss, (_, sums) = task.loss(*trained, batch, jax.random.key(0))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = np.full((4, 10), 0.01) + 0.9 * np.eye(10)[batch["label"]]
    expected = -(targets * log_p).sum(1)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], (expected.sum(), 4), rtol=1e-5)
    correct = (logits.argmax(1) == batch["label"]).sum()
    np.testing.assert_allclose(sums["accuracy"], (correct, 4))


def test_images_are_normalised_on_the_device():
    task = task_of()
    images = np.array([0, 128, 255], np.uint8).reshape(1, 1, 3, 1)
    recipe = RECIPES.get("mnist")
    expected = (images / 255 - recipe.mean[0]) / recipe.std[0]
    np.testing.assert_allclose(task._normalise(images), expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [64, 999, pytest.param(1024, marks=pytest.mark.slow)])
def test_evaluation_is_the_same_at_any_batch_size(trained, batch_size):
    params, state = trained
    totals = {}
    for size in (100, batch_size):
        task = task_of(f"batch_size={size}")
        step = jax.jit(task.eval_step)
        eval_state = task.eval_state(state, "test")
        sums = [step(params, eval_state, batch)[1] for batch in task.eval_data("test")]
        assert len(sums) == -(-1000 // size)
        totals[size] = summed(sums)
    assert totals[batch_size]["accuracy"][1] == 1000
    assert totals[batch_size]["accuracy"][0] == totals[100]["accuracy"][0]
    np.testing.assert_allclose(totals[batch_size]["loss"], totals[100]["loss"], rtol=1e-5)


def test_evaluation_uses_running_statistics_and_ignores_padding(trained):
    params, state = trained
    task = task_of("batch_size=64")
    batch = next(iter(task.eval_data("test")))
    half = batch | {"weight": np.repeat(np.float32([1, 0]), 32)}
    other = {k: v.copy() for k, v in half.items()}
    other["image"][32:] = 255 - other["image"][32:]
    other["label"][32:] = 0
    step = jax.jit(task.eval_step)
    same, first = step(params, state, half)
    assert jax.tree.all(jax.tree.map(np.array_equal, same, state))
    assert jax.tree.map(float, first) == jax.tree.map(float, step(params, state, other)[1])


def test_training_moves_the_statistics_and_evaluation_of_them():
    task = task_of("batch_size=20")
    params, state = task.init(jax.random.key(0))
    batch = next(task.train_data())
    _, (moved, _) = jax.jit(task.loss)(params, state, batch, jax.random.key(0))
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), moved, state)
    assert jax.tree.all(changed)


@pytest.mark.parametrize("sparsity", [90, 95])
def test_small_dense_has_the_parameters_that_a_sparse_network_runs_on(sparsity):
    full = task_shapes("dense")
    small = task_shapes(f"small-dense-{sparsity}")
    ends = ("stem", "head")
    kernels = [size(x) for p, x in full.items() if "kernel" in p and not any(e in p for e in ends)]
    kept = sum(kernels) * (1 - sparsity / 100)
    budget = sum(map(size, full.values())) - sum(kernels) + kept
    assert small.keys() == full.keys()
    assert 0.9 * budget < sum(map(size, small.values())) <= budget + len(kernels)


def test_the_flops_of_small_dense_are_fractions_of_the_full_network():
    config = resolve("configs/cifar10_small.py:small-dense-90", TFDS_STAND_IN)

    def multiplications(variant):
        pixels = {"stem": 32, "stage1": 32, "stage2": 16, "stage3": 8, "head": 1}
        kernels = {p: x for p, x in task_shapes(variant).items() if "kernel" in p}
        return sum(
            size(x) * next(n for place, n in pixels.items() if place in path) ** 2
            for path, x in kernels.items()
        )

    found = description(config, make_task(config))
    expected = multiplications("small-dense-90") / multiplications("dense")
    assert found["training_flops_fraction"] == pytest.approx(expected, rel=1e-3)
    assert found["inference_flops_fraction"] == pytest.approx(expected, rel=1e-3)


def task_shapes(variant):
    task = make_task(resolve(f"configs/cifar10_small.py:{variant}", TFDS_STAND_IN))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(params)}


TFDS_STAND_IN = ("data.name=embedded_mnist", "data.recipe=mnist", "data.channels=1")


def size(x):
    return int(np.prod(x.shape))
