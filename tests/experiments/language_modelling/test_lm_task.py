"""The language task in the one loop: evaluation, resume, devices, configs."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import main, workdir
from experiments.checkpoints import load
from experiments.config import resolve
from experiments.evaluation import evaluate
from experiments.language_modelling import narrow, options
from experiments.loop import train
from experiments.metrics import read_records
from experiments.run import build
from experiments.task import make_task
from topkast_jax.sets import FORWARD
from topkast_jax.trees import flatten_with_names

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[3]
NAMES = ("enwik8_large", "enwik8_base", "enwik8_small", "wikitext103_large", "wikitext103_base")
VARIANTS = ("dense", "80/0", "80/60", "80/80", "90/60", "90/80", "95/90", "static-90")
PRINTED = {  # millions, as the Transformer-XL paper prints them
    "enwik8_large": (277.2, 0.05),
    "enwik8_base": (41.05, 0.01),
    "wikitext103_large": (284.1, 0.05),
    "wikitext103_base": (151.1, 0.05),
}
# The same few steps are compiled again and again.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def spec(name, variant=""):
    return f"{ROOT / 'configs' / name}.py" + (f":{variant}" if variant else "")


def smoke(*overrides, name="enwik8_small", variant="90/80"):
    return resolve(spec(name, f"{variant},smoke"), overrides)


@pytest.fixture
def text(tmp_path):
    """A text file of some 4,000 words, and the overrides that name it."""
    words = np.random.default_rng(0).choice(["so", "it", "goes", "round\n"], 4_000)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words))
    return path, ("data.name=text_file", f"data.file={path}")


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_validates(name):
    for variant in ("", *VARIANTS, "smoke", "static-90,smoke"):
        config = resolve(spec(name, variant))
        assert (config.steps == 3) == ("smoke" in variant)
        expected = {"dense": "dense", "static-90": "static_random"}
        assert config.method.name == expected.get(variant.split(",")[0], "top_kast")
    method = resolve(spec(name, "80/0")).method
    assert (method.forward_density, method.backward_density) == (0.2, 1.0)


@pytest.mark.parametrize("variant", ["90", "small-dense-", "small-dense-x", "small-dense-100"])
def test_a_bad_variant_is_one_line(variant, capsys):
    assert main.main([f"--config={spec('enwik8_small', variant)}", "--workdir=/nowhere/x"]) == 2
    assert capsys.readouterr().err.startswith(f"error: variant {variant!r}: ")


@pytest.mark.parametrize("name", PRINTED)
def test_parameters_are_the_papers(name):
    params, _ = jax.eval_shape(build_task(spec(name, "dense")).init, jax.random.key(0))
    millions, tolerance = PRINTED[name]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count / 1e6 == pytest.approx(millions, abs=tolerance)


def build_task(config):
    return make_task(resolve(config))


@pytest.mark.parametrize("name", ["enwik8_small", "wikitext103_large"])
def test_small_dense_has_the_active_parameters(name):
    full = options.transformer_config(resolve(spec(name, "dense")))
    config = resolve(spec(name, "small-dense-90"))
    small = options.transformer_config(config)
    budget = narrow.active_parameters(full, config.model.small_dense.rules, 0.1)
    names, leaves, _ = flatten_with_names(build_task(spec(name, "dense")).model.abstract_params)
    kernels = sum(
        x.size for n, x in zip(names, leaves, strict=True) if "layers/" in n and "kernel" in n
    )
    everything = sum(leaf.size for leaf in leaves)
    assert budget == pytest.approx(everything - 0.9 * kernels, abs=200)
    assert config.method.name == "dense"
    assert 0.995 * budget < narrow.parameters(small) <= budget
    assert (small.n_layer, small.n_head) == (full.n_layer, full.n_head)
    assert small.d_model < full.d_model


def test_rules_for_stacked_layers():
    names = ["embedding/table/0", "layers/key/kernel", "layers/key/bias", "softmax/bias/0"]
    rules = (
        (".*/kernel", "sparse"),
        (".*/(table|bias)/.*", {"forward_density": 0.5}),
        (".*", "dense"),
    )
    stacked = narrow.for_stacked_layers(rules, names)
    assert stacked == ((".*/kernel", {"stacked": 1}), *rules[1:])
    both = narrow.for_stacked_layers(((".*", "sparse"),), names)
    assert both == ((r"(?=layers/)(?:.*)", {"stacked": 1}), (".*", "sparse"))
    assert narrow.for_stacked_layers(stacked, names) == stacked


def test_scanned_layers_are_sparse_each_on_its_own():
    state = {s: build(smoke(f"model.scan={s}", "mesh.data=-1")).init() for s in (True, False)}
    sets = {s: flags(state[s]) for s in state}
    for layer in range(2):
        for name, stack in sets[True].items():
            one = sets[False][name.replace("layers/", f"layers/{layer}/")]
            np.testing.assert_array_equal(stack[layer], one)
            assert (one & FORWARD != 0).sum() == max(1, int(0.1 * one.size + 0.5))


def flags(state):
    names, leaves, _ = flatten_with_names(state.opt_state.sets)
    return {n: np.asarray(x) for n, x in zip(names, leaves, strict=True)}


@pytest.mark.parametrize("same_length", [True, False])
def test_evaluation_is_exact_at_any_number_of_lanes(text, same_length):
    lengths = ["model.evaluation.target=16", "model.evaluation.memory=24"]
    lengths += [f"model.evaluation.same_length={same_length}", *text[1]]
    run = build(smoke(*lengths))
    # Large weights, so that what a lane saw before matters.
    state = run.init()
    state = state._replace(params=jax.tree.map(lambda x: 12 * x, state.params))
    view = run.view(state.params, state.opt_state)
    tokens = run.task._open().splits["test"]
    whole = tokens.read(0, len(tokens))
    memory = run.task.model.init_memory(1, options.lengths(run.config, "evaluation"))
    step, total = jax.jit(run.task.eval_step), 0.0
    for start in range(0, len(whole) - 1, 16):
        row = whole[start : start + 17]
        batch = {
            "tokens": np.pad(row[:-1], (0, 17 - len(row)))[None],
            "targets": np.pad(row[1:], (0, 17 - len(row)))[None],
            "weights": (np.arange(16) < len(row) - 1)[None].astype(np.float32),
        }
        memory, sums = step(view, memory, batch)
        total += float(sums["loss"][0])
    expected = total / (len(whole) - 1)
    for lanes in (1, 3, 8, 20):
        found = evaluate(build(smoke(*lengths, f"data.eval_batch_size={lanes}")), state, "test")
        assert found["loss"] == pytest.approx(expected, rel=1e-5), lanes
        assert found["bpc"] == pytest.approx(expected / np.log(2), rel=1e-5)
        assert found["context"] == {
            "dataset": "text_file", "level": "byte", "tokens": len(whole) - 1,
            "target": 16, "memory": 24, "clamp": -1, "same_length": same_length,
        }  # fmt: skip


def test_words_are_reported_as_perplexity():
    task = build_task(spec("wikitext103_large", "dense,smoke"))
    assert task.final_metrics({"loss": (20.0, 10.0)}) == {
        "loss": 2.0, "perplexity": pytest.approx(np.exp(2)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "variant", "metric"),
    [
        ("enwik8_small", "dense", "bpc"),
        ("enwik8_small", "small-dense-90", "bpc"),
        ("enwik8_base", "static-90", "bpc"),
        ("wikitext103_large", "90/80", "perplexity"),
    ],
)
def test_smoke_runs(name, variant, metric, tmp_path):
    argv = [f"--config={spec(name, f'{variant},smoke')}", f"--workdir={tmp_path}"]
    assert main.main([*argv, "--config.data.eval_split=test"]) == 0
    records = read_records(tmp_path / workdir.METRICS)
    trained = [r for r in records if r["split"] == "train"]
    assert [r["step"] for r in trained] == [1, 2, 3]
    assert "tokens_per_second" in trained[-1]["timing"]
    final = json.loads((tmp_path / workdir.FINAL).read_text())
    assert np.isfinite(final["test"][metric])
    assert final["test_context"]["memory"] == 32
    assert final["flops"]["dense_forward_per_step"] > 0


def last_state(config, directory):
    state, meta = load(directory / workdir.CHECKPOINTS, build(config).abstract)
    return jax.tree.map(np.asarray, state), meta["data"]


def test_resume_to_the_bit(text, tmp_path):
    extra = ("steps=6", "eval_at_end=False", "model.dropout=0.1", *text[1])
    config = smoke(*extra)
    assert train(config, tmp_path / "whole") == "finished"
    assert train(config, tmp_path / "parts", stop_at=3) == "stopped"
    assert train(config, tmp_path / "parts") == "finished"
    (whole, at), (parts, also_at) = (last_state(config, tmp_path / n) for n in ("whole", "parts"))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(one, other)
    assert at == also_at
    assert at["segments"] == 6
    assert np.abs(whole.model_state.states).sum() > 0
    assert whole.model_state.valid == 32


@pytest.mark.parametrize("change", ["symbols", "length"])
def test_another_text_under_a_checkpoint_is_one_line(text, tmp_path, change, capsys):
    path, overrides = text
    argv = [f"--config={spec('enwik8_small', 'smoke')}", f"--workdir={tmp_path / 'run'}"]
    argv += [f"--config.{o}" for o in (*overrides, "eval_at_end=False")]
    assert main.main([*argv, "--stop_at=1"]) == 0
    before = path.read_text()
    path.write_text(before.replace("so", "oz") if change == "symbols" else before + before)
    capsys.readouterr()
    assert main.main(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    expected = {
        "symbols": "data.vocabulary is ",
        "length": "another text: tokens is ",
    }
    assert expected[change] in error[0]


def test_eight_devices_are_like_one(text):
    found = {}
    for count in (1, 8):
        run = build(smoke("model.dtype=float32", *text[1]), jax.devices()[:count])
        state, data, losses = run.init(), run.task.train_data(), []
        for _ in range(3):
            state, sums = run.step(state, run.put(next(data)))
            losses.append(float(sums["loss"][0]))
        data.close()
        found[count] = losses, flags(state), evaluate(run, state, "test")["loss"]
        lanes = {s.data.shape[1] for s in state.model_state.states.addressable_shards}
        assert lanes == {8 // count}
    np.testing.assert_allclose(found[1][0], found[8][0], rtol=1e-5)
    assert found[1][2] == pytest.approx(found[8][2], rel=1e-5)
    for name, sets in found[1][1].items():
        np.testing.assert_array_equal(sets, found[8][1][name])


def test_memory_carries_over_segments_in_training(text):
    run = build(smoke("model.train.memory=48", *text[1]), jax.devices()[:1])
    state, data = run.init(), run.task.train_data()
    for expected in (32, 48, 48):
        state, _ = run.step(state, run.put(next(data)))
        assert int(state.model_state.valid) == expected
    data.close()
    assert bool(jnp.any(state.model_state.states[:, :, 0] != 0))
