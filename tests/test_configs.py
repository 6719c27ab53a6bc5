"""Every config file builds and validates in every variant, and says what its header says."""

import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import config as configs
from experiments.config.planned import plan
from experiments.errors import UserError
from experiments.image_classification.data import sources
from experiments.main import main
from experiments.task import make_task
from experiments.training import optimizers, state

ROOT = pathlib.Path(__file__).parent.parent / "configs"
IMAGE_CONFIGS = (
    "quickstart", "digits_lenet", "cifar10_small", "cifar10_resnet20", "imagenet_resnet50",
)  # fmt: skip
VARIANTS = ("dense", "80/50", "80/80", "90/80", "95/90", "98/90", "static-90", "rigl-90")
FIGURES = (
    "figure_2a", "figure_2b", "figure_2c", "figure_3", "table_1", "table_2", "table_3", "table_5",
    "table_6", "appendix_b",
)  # fmt: skip
SWEEPS = (
    *(
        "quickstart",
        "cifar10_methods",
        "enwik8_small_blocks",
        "study_images",
        "study_options",
        "rigl_cifar10",
    ),
    # Of study_texts.py, test_paper_numbers.py plans the rows without a variant.
    *("study_texts:rates", "study_texts:suspects"),
    *(f"{name}:small" for name in FIGURES),  # test_paper_numbers.py plans them at full size
)


def resolve(name, variant, *overrides):
    return configs.resolve(f"{ROOT / name}.py" + (f":{variant}" if variant else ""), overrides)


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("name", IMAGE_CONFIGS)
def test_every_variant_validates(name, smoke):
    for variant in ("", *VARIANTS):
        words = [w for w in (variant, "smoke" if smoke else "") if w]
        config = resolve(name, ",".join(words))
        method = config.method
        if variant == "dense":
            assert method.name == "dense"
        elif variant == "static-90":
            assert (method.name, method.forward_density) == ("static_random", 0.1)
        elif variant == "rigl-90":
            assert (method.name, method.forward_density) == ("rigl", 0.1)
        else:
            forward, backward = map(int, (variant or "90/80").split("/"))
            assert method.name == "top_kast"
            assert method.forward_density == pytest.approx(1 - forward / 100, abs=1e-9)
            assert method.backward_density == pytest.approx(1 - backward / 100, abs=1e-9)
        assert (config.steps == 3) == smoke


@pytest.mark.parametrize(
    "variant",
    ["90", "dens", "90/80/70", "static-", "static-100", "rig-90", "top_kast-90", "smoke,fast"],
)
@pytest.mark.parametrize("name", IMAGE_CONFIGS)
def test_a_bad_variant_names_what_is_allowed(name, variant):
    with pytest.raises(UserError) as error:
        resolve(name, variant)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in ("dense", "F/B", "static-F", "smoke"))


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_name_configs_that_validate(name):
    file, _, variant = name.partition(":")
    runs = plan(f"{ROOT / 'sweeps' / file}.py" + (f":{variant}" if variant else ""), 1)
    for run in runs:
        path, _, variant = run.config.partition(":")
        config = resolve(pathlib.Path(path).stem, variant, *run.overrides)
        assert config.name == f"{pathlib.Path(path).stem}:{variant}"


@pytest.mark.parametrize("name", FIGURES)
def test_a_sweep_names_its_variants(name):
    spec = f"{ROOT / 'sweeps' / name}.py:tiny"
    with pytest.raises(UserError) as error:
        plan(spec, 1)
    assert str(error.value) == f"--config={spec}: variant 'tiny': allowed: nothing, small"


def test_another_penalty_of_the_study_is_in_the_place_of_the_exploration_penalty():
    runs = {run.row: run for run in plan(f"{ROOT}/sweeps/study_texts.py:suspects", 1)}
    for row in ("decoupled-0.1", "decoupled-0.3", "decoupled-1", "weight_decay-0.1"):
        run = runs[f"suspects-{row}"]
        assert configs.resolve(run.config, run.overrides).method.exploration_weight == 0


@pytest.mark.parametrize("variant", ["1x,2x", "90/80,all-sparse,last-sparse"])
@pytest.mark.parametrize("name", ["cifar10_small", "imagenet_resnet50"])
def test_words_that_contradict_each_other_are_one_line(name, variant):
    with pytest.raises(UserError, match="'.*' and '.*' exclude each other"):
        resolve(name, variant)


def test_the_quickstart_compares_methods_at_the_same_densities():
    specs = {
        name: spec for name, spec, _ in configs.load(f"{ROOT}/sweeps/quickstart.py", "get_sweep")
    }
    methods = {
        name: resolve("digits_lenet", spec.partition(":")[2]).method for name, spec in specs.items()
    }
    assert methods.pop("dense").name == "dense"
    registered = {"static": "static_random", "set": "set", "rigl": "rigl", "top_kast": "top_kast"}
    assert set(methods) == {f"{name}_{s}" for name in registered for s in (95, 98)}
    for name, method in methods.items():
        kind, _, sparsity = name.rpartition("_")
        assert method.name == registered[kind]
        assert method.forward_density == pytest.approx(1 - int(sparsity) / 100, abs=1e-9)


ALWAYS_SPARSE = "--config.method.always_sparse=True"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(p.stem, marks=pytest.mark.slow if "imagenet" in p.stem else ())
        for p in sorted(ROOT.glob("[a-z]*.py"))
    ],
)
@pytest.mark.parametrize("flags", [(), pytest.param((ALWAYS_SPARSE,), marks=pytest.mark.slow)])
def test_every_config_is_described_without_data(name, flags, capsys, monkeypatch):
    monkeypatch.delattr(sources, "embedded_mnist")  # No other data is on this machine.
    for variant in ("90/80",) if flags else ("dense", "90/80"):
        spec = f"--config={ROOT / name}.py:{variant}"
        assert main([spec, "--describe", *flags]) == 0
        header, *rows, sums, last = capsys.readouterr().out.splitlines()
        assert header.split() == [
            "leaf", "shape", "pattern", "forward", "backward", "active", "updated", "entries"
        ]  # fmt: skip
        numbers = json.loads(last)
        active, updated, entries = (int(number) for number in sums.split()[1:])
        assert (numbers["active_parameters"], numbers["parameters"]) == (active, entries)
        assert entries == sum(int(row.split()[-1]) for row in rows)
        fractions = numbers["inference_flops_fraction"], numbers["training_flops_fraction"]
        if variant == "dense":
            assert active == updated == entries
            assert fractions == (1, 1)
        else:
            assert active < updated < entries
            assert 0.1 < fractions[0] < fractions[1] < 1
            assert [row.split()[-5:-3] for row in rows].count(["0.1", "0.2"]) > 1


def test_imagenet_recipe():
    config = resolve("imagenet_resnet50", "90/80")
    schedule = optimizers.make_schedule(config)
    epoch = 1_281_167 / 4_096
    assert config.steps == 32_000
    assert config.batch_size == 4_096
    assert schedule(5 * epoch) == pytest.approx(1.6)
    assert schedule(2.5 * epoch) == pytest.approx(0.8, rel=0.01)
    for before, after, rate in ((29, 31, 0.16), (69, 71, 0.016), (89, 91, 0.0016)):
        assert schedule(round(before * epoch)) == pytest.approx(10 * rate)
        assert schedule(round(after * epoch)) == pytest.approx(rate)
    assert config.model.label_smoothing == 0.1
    assert (config.optimizer.momentum, config.optimizer.nesterov) == (0.9, True)
    assert config.optimizer.l2 == config.method.exploration_weight == 1e-4


def test_imagenet_recipe_follows_batch_size_and_steps():
    config = resolve("imagenet_resnet50", "dense", "batch_size=1024", "steps=128000")
    schedule = optimizers.make_schedule(config)
    epoch = 1_281_167 / 1_024
    assert schedule(round(6 * epoch)) == pytest.approx(0.4)
    assert schedule(round(31 * epoch)) == pytest.approx(0.04)


@pytest.mark.parametrize("times", [1, 2, 5, 10])
def test_a_longer_run_stretches_the_schedule(times):
    config = resolve("imagenet_resnet50", f"80/50,{times}x")
    schedule = optimizers.make_schedule(config)
    assert config.steps == times * 32_000
    epoch = 1_281_167 / 4_096 * times
    assert schedule(round(2.5 * epoch)) == pytest.approx(0.8, rel=0.01)
    assert schedule(round(71 * epoch)) == pytest.approx(0.016)


def test_momentum_is_one_line():
    config = resolve("imagenet_resnet50", "dense", "optimizer.momentum=0.0")
    tx = optimizers.make_dense(config, {"w": jax.ShapeDtypeStruct((2, 2), np.float32)})
    shapes = {
        leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(tx.init, {"w": np.ones((2, 2))}))
    }
    assert shapes == {()}


DENSE_KERNELS = {
    "quickstart:90/80": {"stem/kernel"},
    "digits_lenet:90/80": {"head/kernel"},
    "cifar10_resnet20:90/80": {"stem/kernel"},
    "cifar10_small:90/80": {"stem/kernel", "head/kernel"},
    "cifar10_small:rigl-90,last-sparse": {"stem/kernel"},
    "cifar10_small:90/80,all-sparse": set(),
    "imagenet_resnet50:90/80": {"stem/kernel", "head/kernel"},
}


@pytest.mark.parametrize(
    ("spec", "dense"),
    [
        pytest.param(spec, dense, marks=[pytest.mark.slow] if "imagenet" in spec else [], id=spec)
        for spec, dense in DENSE_KERNELS.items()
    ],
)
def test_the_ends_are_dense_and_every_other_kernel_sparse(spec, dense):
    name, _, variant = spec.partition(":")
    config = resolve(name, variant)
    params = state.abstract_params(make_task(config))
    sets = jax.eval_shape(optimizers.make_masked(config, params)[1].init, params)
    found = {
        "/".join(str(k.key) for k in path if hasattr(k, "key"))
        for path, leaf in jax.tree_util.tree_leaves_with_path(sets)
        if leaf.dtype == np.uint8
    }
    kernels = {
        "/".join(k.key for k in path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.ndim >= 2
    }
    assert found == kernels - dense


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.name=resnet51", "model.name: found 'resnet51'; must be one of resnet50, resnet20"),
        ("model.name=no_such:model", "model.name: found 'no_such:model'; there is no module"),
        ("model.name=:model", "model.name: found ':model'; must be one of resnet50, resnet20"),
        ("model.name=json:resnet", "model.name: found 'json:resnet'; json has no 'resnet'"),
        ("model.dtype=float64", "model.dtype: found 'float64'; must be one of 'float32', 'bfloat"),
        ("model.width=0.0", "model.width: found 0.0; must be a number above 0"),
        ("model.label_smoothing=1.0", "model.label_smoothing: found 1.0; must be a number of at "),
        ("data.name=cifar", "data.name: found 'cifar'; must be one of embedded_mnist, image_fold"),
        ("data.recipe=none", "data.recipe: found 'none'; must be one of mnist, cifar, imagenet"),
        ("data.recipe=cifar", "data.channels: found 1; recipe 'cifar' needs 3 channels"),
        ("data.channels=2", "data.channels: found 2; must be one of 1, 3"),
        ("data.image_size=4", "data.image_size: found 4; must be an integer of at least 8"),
        ("data.threads=0", "data.threads: found 0; must be an integer of at least 1"),
        ("data.workers=-1", "data.workers: found -1; must be an integer of at least 0"),
        ("data.workers=2", "data.workers: found 2; must be 0 for images in memory"),
    ],
)
def test_bad_image_settings_are_one_line(override, expected):
    with pytest.raises(UserError) as error:
        resolve("quickstart", "dense", override)
    assert str(error.value).startswith(f"config.{expected}")
    assert "\n" not in str(error.value)
