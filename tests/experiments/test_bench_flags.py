"""A mistake on a bench script's command line is one line that says what is wrong, and status 2."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import toy_runs

from experiments.benchmarks.model_step import random_batch
from experiments.config import resolve
from experiments.task import make_task
from scripts import (
    bench_always_sparse,
    bench_checkpoints,
    bench_fan_in,
    bench_input,
    bench_refresh,
    bench_selection,
    bench_step,
)


@pytest.mark.parametrize(
    ("script", "flag", "found", "allowed"),
    [
        (bench_always_sparse, "--patterns=block128,block7", "block7", "block64, block32"),
        (bench_always_sparse, "--densities=90", "--densities", "90/80, 95/90"),
        (bench_always_sparse, "--repeats=0", "--repeats", "at least 1"),
        (bench_checkpoints, "--every=0", "--every", "at least 1"),
        (bench_fan_in, "--shape=1024x", "'1024x'", "1024x3072"),
        (bench_checkpoints, "--folder=/not/there", "/not/there", "a folder that exists"),
        (bench_input, "--seconds=0", "--seconds", "at least 1"),
        (bench_input, "--chip=v1", "v1", "v5e"),
        (bench_input, "--config=configs/enwik8_small.py", "language_modelling", "image_class"),
        (bench_input, "--config.data.read_ahead=0", "data.read_ahead: found 0", "at least 1"),
        (bench_refresh, "--variant=nope", "'nope'", "small-dense-F"),
        (bench_refresh, "--config.method.patern=block:16x16", "method.patern", "pattern"),
        (bench_refresh, "--config.method.refresh_delay=1", "refresh_delay: found 1", "must be 0"),
        (bench_refresh, "--config.method.refresh_every=3", "found 3", "--steps=10"),
        (bench_refresh, "--config.method.stop_exploring_at=100", "found 100", "None or above"),
        (bench_refresh, "--config.method.always_sparse=False", "found False", "must be True"),
        (bench_refresh, "--params=277 M", "'277 M'", "277M"),
        (bench_refresh, "--patterns=block64", "block64", "unstructured, block128"),
        (bench_refresh, "--delay", "--delay", "only with --params"),
        (bench_selection, "--entries=4194304,abc", "abc", "multiples of 2048"),
        (bench_selection, "--entries=100", "'100'", "multiples of 2048"),
        (bench_step, "--cases=mlp", "'mlp'", "mlp_b128_r100"),
        (bench_step, "--pairs=many", "'many'", "at least 1"),
        (bench_step, "--pair=1", "--pair=1", "--help"),
    ],
)
def test_wrong_flag(script, flag, found, allowed, capsys):
    assert script.main([flag]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert found in err
    assert allowed in err


@pytest.mark.parametrize("script", [bench_always_sparse, bench_selection, bench_step])
def test_devices_that_are_not_here(script, monkeypatch, capsys):
    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    assert script.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "no such devices here" in err
    assert "(JAX says no more)" in err


def test_the_input_of_a_config_is_timed(capsys):
    config = "configs/imagenet_resnet50.py:dense,smoke"
    flags = ["--images=8", "--seconds=1", "--chip_images=1000", "--config.batch_size=8"]
    assert bench_input.main([f"--config={config}", *flags, "--config.data.read_ahead=3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["read_ahead"] == 3
    assert found["bytes_an_image"] == pytest.approx(110_000, rel=0.05)
    assert found["images_per_second"] > 0
    cores = 1000 / found["images_per_second_per_core"]
    assert cores <= found["cores_per_chip"] < cores * 1.01 + 1


def test_the_rate_of_the_dense_step_counts_what_xla_counts():
    sizes = bench_always_sparse.Sizes(256, 512, 128, "float32")

    def loss(first, second, x):
        return jnp.mean(jnp.square(jax.nn.relu(x @ first) @ second))

    shapes = ((256, 512), (512, 256), (128, 256))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    counted = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).cost_analysis()["flops"]
    assert sizes.flops("step") == pytest.approx(counted, rel=0.01)


@pytest.mark.slow
def test_start_and_refresh_are_timed_alone(monkeypatch, capsys):
    for other in ("--config.steps=3", "--variant=80/60", "--steps=3"):
        assert bench_refresh.main(["--params=277M", other]) == 2
        assert "are not read with --params" in capsys.readouterr().err
    monkeypatch.setattr(bench_refresh, "LAYERS", 2)
    assert bench_refresh.measure_alone(1, "unstructured", 1, True)["held_up_passes"] > 0
    found = bench_refresh.measure_alone(1, "unstructured", 1, False)
    assert found["parameters"] == 2 * 11 * 128**2
    assert found["theta_bytes"] == 4 * found["parameters"]
    # B is a fifth of it; the device has its places, its values and two moments of them.
    assert found["device_bytes"] == pytest.approx(0.2 * 4 * found["theta_bytes"], rel=1e-3)
    assert found["refresh_passes"] == pytest.approx(
        found["refresh_seconds"] / found["pass_seconds"]
    )


def test_tokens_are_those_of_the_vocabulary():
    config = resolve(f"{bench_refresh.CONFIG}:90/80,smoke")
    run = SimpleNamespace(config=config, task=make_task(config), put=lambda batch: batch)
    for tokens in random_batch(run).values():
        assert 0.9 * config.data.vocabulary_size < tokens.max() < config.data.vocabulary_size


def test_a_loss_that_is_not_finite_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(bench_refresh, "CONFIG", toy_runs.CONFIG)
    first = lambda run: run.put(next(run.task.train_data()))  # noqa: E731
    monkeypatch.setattr(bench_refresh, "random_batch", first)
    flags = ["--variant=80/60", "--steps=2", "--repeats=1"]
    assert bench_refresh.main(flags) == 0
    capsys.readouterr()
    assert bench_refresh.main([*flags, "--config.optimizer.learning_rate=1e30"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: step 2: the loss is ")
    assert err.count("\n") == 1
