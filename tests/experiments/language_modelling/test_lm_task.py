"""The language task in the one loop: evaluation, resume, devices, configs."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

import topkast_jax as tk
from experiments import export, main
from experiments.config import resolve
from experiments.errors import UserError
from experiments.language_modelling import generate, sampling
from experiments.language_modelling.config import lengths as config_lengths
from experiments.language_modelling.config import make_model
from experiments.language_modelling.models import narrow
from experiments.records import workdir
from experiments.records.checkpoints import load
from experiments.records.exported import METADATA
from experiments.records.metrics import is_value, read_records
from experiments.records.summary import description
from experiments.task import make_task
from experiments.training.evaluation import evaluate
from experiments.training.program import build
from topkast_jax.flags import FORWARD
from topkast_jax.sets import presents
from topkast_jax.trees import flatten_with_names

ROOT = Path(__file__).parents[3]
NAMES = (
    "enwik8_large", "enwik8_69m", "enwik8_base", "enwik8_small", "wikitext103_large",
    "wikitext103_base",
)  # fmt: skip
VARIANTS = ("dense", "80/0", "80/60", "80/80", "90/60", "90/80", "95/90", "static-90")
PRINTED = {  # millions, as the Transformer-XL paper prints them
    "enwik8_large:dense,reference": (277.2, 0.05),
    "enwik8_base:dense": (41.05, 0.01),
    "wikitext103_large:dense,reference": (284.1, 0.05),
    "wikitext103_base:dense": (151.1, 0.05),
}
# Millions of active parameters: the Top-KAST paper's densities times its 277, 69, 285 and 94 M.
ACTIVE = {
    "enwik8_large:dense": 277,
    "enwik8_large:80/0": 0.2 * 277,
    "enwik8_large:90/80": 0.1 * 277,
    "enwik8_69m:dense": 69,
    "enwik8_69m:80/60": 14,
    "enwik8_69m:90/80": 7,
    "wikitext103_large:dense": 285,
    "wikitext103_large:80/0": 57,
    "wikitext103_large:90/80": 28.5,
    "wikitext103_large:95/90": 14.3,
    "wikitext103_94m:dense": 94,
}


def spec(name, variant=""):
    return f"{ROOT / 'configs' / name}.py" + (f":{variant}" if variant else "")


def write_text(path, words=("so", "it", "goes", "round\n")):
    """A text of some 4,000 words, of which the later ones are rarer."""
    chances = np.arange(len(words), 0, -1) / sum(range(len(words) + 1))
    path.write_text(" ".join(np.random.default_rng(0).choice(words, 4_000, p=chances)))
    return "data.name=text_file", f"data.file={path}"


# Memory that is not full after the first segment, dropout, and one sparse kernel: each is
# compiled on its own.
TINY = (
    "steps=4",
    "model.train.memory=48",
    "model.dropout=0.1",
    'method.rules=(("layers/.*/up/kernel", "sparse"), (".*", "dense"))',
)


def command(directory, text, *flags):
    overrides = [f"--config.{o}" for o in (*TINY, *text)]
    return [f"--config={spec('enwik8_small', '90/80,smoke')}", f"--workdir={directory}", *overrides,
            *flags]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, one stopped after its first step, and the overrides that name their text."""
    directory = tmp_path_factory.mktemp("runs")
    text = write_text(directory / "text")
    whole, parts = directory / "whole", directory / "parts"
    assert main.main(command(whole, text)) == 0
    assert main.main(command(parts, text, "--stop_at=1")) == 0
    return whole, parts, text


def config_of(text):
    return resolve(spec("enwik8_small", "90/80,smoke"), (*TINY, *text))


def last_state(config, directory):
    state, (meta,) = load(directory / workdir.CHECKPOINTS, build(config).representation.abstract)
    return jax.tree.map(np.asarray, state), meta["data"]


def flags(state):
    return jax.device_get(presents(state.params, state.opt_state).flags)


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
    config = spec("enwik8_small", variant)
    assert main.main([f"--config={config}", "--workdir=/nowhere/x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --config={config}: variant {variant!r}: allowed: ")


@pytest.mark.parametrize("name", ACTIVE)
def test_as_many_parameters_are_active_as_the_paper_prints(name):
    config = resolve(spec(*name.split(":")))
    found = description(config, make_task(config))["active_parameters"]
    assert found / 1e6 == pytest.approx(ACTIVE[name], rel=0.01)


@pytest.mark.parametrize("name", PRINTED)
def test_parameters_are_the_references(name):
    params, _ = jax.eval_shape(build_task(spec(*name.split(":"))).init, jax.random.key(0))
    millions, tolerance = PRINTED[name]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count / 1e6 == pytest.approx(millions, abs=tolerance)


def build_task(config):
    return make_task(resolve(config))


@pytest.mark.parametrize(
    "name", ["enwik8_small", pytest.param("wikitext103_large", marks=pytest.mark.slow)]
)
def test_small_dense_has_the_active_parameters(name):
    flags = ",dense-embeddings" if name == "wikitext103_large" else ""
    full = make_model(resolve(spec(name, "dense"))).config
    config = resolve(spec(name, f"small-dense-90{flags}"))
    small = make_model(config).config
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
    stacked = narrow.for_stacked_layers(rules, names, "layers/")
    assert stacked == ((".*/kernel", {"stacked": 0}), *rules[1:])
    both = narrow.for_stacked_layers(((".*", "sparse"),), names, "layers/")
    assert both == ((r"(?=layers/)(?:.*)", {"stacked": 0}), (".*", "sparse"))
    assert narrow.for_stacked_layers(stacked, names, "layers/") == stacked


def test_stacked_layers_are_sparse_each_on_its_own(runs):
    whole, _, text = runs
    state, _ = last_state(config_of(text), whole)
    sets = flags(state)
    assert len(sets) == 1
    stack = sets["layers/feed_forward/up/kernel"]
    kernels = state.params["layers"]["feed_forward"]["up"]["kernel"]
    for one, kernel in zip(stack, kernels, strict=True):
        size = np.abs(kernel[one & FORWARD != 0])
        assert size.size == int(0.1 * one.size + 0.5)
        assert size.min() > np.abs(kernel[one & FORWARD == 0]).max()


@pytest.mark.parametrize("same_length", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_evaluation_is_exact_at_any_number_of_lanes(tmp_path, same_length):
    lengths = ["model.evaluation.target=16", "model.evaluation.memory=24"]
    lengths += [f"model.evaluation.same_length={same_length}", *write_text(tmp_path / "text")]

    def run_with(*extra):
        return build(resolve(spec("enwik8_small", "dense,smoke"), (*lengths, *extra)))

    run = run_with()
    task = run.task
    params, _ = jax.jit(task.init)(jax.random.key(0))
    # Large weights, so that what a lane saw before matters.
    params = jax.tree.map(lambda x: 12 * x, params)
    state = run.representation.abstract(0)._replace(params=params)
    tokens = task._open().splits["test"]
    whole = tokens.read(0, len(tokens))
    memory = task.model.init_memory(1, config_lengths(run.config, "evaluation"))
    step, total = jax.jit(task.eval_step), 0.0
    for start in range(0, len(whole) - 1, 16):
        row = whole[start : start + 17]
        batch = {
            "tokens": np.pad(row[:-1], (0, 17 - len(row)))[None],
            "targets": np.pad(row[1:], (0, 17 - len(row)))[None],
            "weights": (np.arange(16) < len(row) - 1)[None].astype(np.float32),
        }
        memory, sums = step(params, memory, batch)
        total += float(sums["loss"][0])
    expected = total / (len(whole) - 1)
    for lanes in (1, 3, 20) if same_length else (5,):
        found = evaluate(run_with(f"data.eval_batch_size={lanes}"), state, "test")
        assert found["loss"] == pytest.approx(expected, rel=1e-5), lanes
        assert found["bpc"] == pytest.approx(expected / np.log(2), rel=1e-5)
        assert found["context"] == {
            "dataset": "text_file", "level": "byte", "tokens": len(whole) - 1,
            "target": 16, "memory": 24, "clamp": -1, "same_length": same_length,
        }  # fmt: skip


def test_training_and_evaluation_have_their_own_lengths_and_only_training_has_dropout(monkeypatch):
    own = ("model.train.clamp=5", "model.evaluation.clamp=7", "model.evaluation.same_length=True")
    config, calls = resolve(spec("enwik8_small", "dense,smoke"), own), []
    task = make_task(config)

    def apply(params, memory, tokens, targets, lengths, *, rng=None):
        calls.append((lengths, rng))
        return np.zeros(tokens.shape, np.float32), memory

    monkeypatch.setattr(task.model, "apply", apply)
    batch = {key: np.zeros((2, 4), np.int32) for key in ("tokens", "targets")}
    task.loss({}, None, batch, "key")
    task.eval_step({}, None, batch | {"weights": np.ones((2, 4), np.float32)})
    assert calls == [
        (config_lengths(config, "train"), "key"), (config_lengths(config, "evaluation"), None)
    ]  # fmt: skip
    assert calls[0][0] != calls[1][0]


def test_words_are_reported_as_perplexity():
    task = build_task(spec("wikitext103_large", "dense,smoke"))
    assert task.final_metrics({"loss": (20.0, 10.0)}) == {
        "loss": 2.0, "perplexity": pytest.approx(np.exp(2)),
    }  # fmt: skip
    diverged = task.final_metrics({"loss": (3000.0, 10.0)})
    assert diverged["perplexity"] > 1e99
    assert all(map(is_value, diverged.values()))  # What is written can be reported.


@pytest.mark.parametrize(("words", "cutoffs"), [(100, ()), (30_000, (20_000,))])
def test_a_text_of_few_words_has_the_clusters_that_it_fills(tmp_path, capsys, words, cutoffs):
    file = tmp_path / "text"
    file.write_text(" ".join(f"w{i}" for i in range(words) for _ in range(400_000 // words)))
    own = ["data.name=text_file", f"data.file={file}"]
    found = resolve("configs/wikitext103_large.py:90/80", own)
    size = found.data.vocabulary_size
    assert (20_000 if cutoffs else 2) < size < words + 10
    assert found.model.cutoffs == cutoffs
    assert found.model.tie_projs == (True, False)[: 1 + len(cutoffs)]
    told = capsys.readouterr().err
    assert f"the vocabulary has {size:,} tokens" in told
    planned = description(found, make_task(found))
    assert 0.1 < planned["active_parameters"] / planned["parameters"] < 0.102


def test_a_method_that_refreshes_in_every_step_does_so_in_the_study():
    for variant in ("dnw-90,study", "set-90,study"):
        every = resolve(spec("enwik8_small", variant)).method.refresh_every
        assert every == (1 if "dnw" in variant else 100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant", "metric"),
    [
        ("enwik8_small", "dense", "bpc"),
        ("enwik8_small", "small-dense-90", "bpc"),
        ("enwik8_base", "static-90", "bpc"),
        ("enwik8_large", "90/80", "bpc"),
        ("wikitext103_base", "80/0", "perplexity"),
        ("wikitext103_large", "90/80", "perplexity"),
    ],
)
def test_smoke_runs(name, variant, metric, tmp_path):
    argv = [f"--config={spec(name, f'{variant},smoke')}", f"--workdir={tmp_path}"]
    assert main.main([*argv, "--config.data.eval_split=test"]) == 0
    final = json.loads((tmp_path / workdir.FINAL).read_text())
    assert np.isfinite(final["test"][metric])
    assert final["test_context"]["memory"] == 32


def test_records_of_a_run(runs):
    whole, _, _ = runs
    records = read_records(whole / workdir.METRICS)
    trained = [r for r in records if r["split"] == "train"]
    assert [r["step"] for r in trained] == [1, 2, 3, 4]
    timing = trained[-1]["timing"]
    assert timing["tokens_per_second"] == pytest.approx(8 * 32 * timing["steps_per_second"])
    assert 0 <= timing["data_wait"] < 0.5
    final = json.loads((whole / workdir.FINAL).read_text())
    assert final["test"] == {k: records[-1][k] for k in ("loss", "bpc")}
    assert final["test_context"]["memory"] == records[-1]["context"]["memory"] == 32
    assert final["flops"]["dense_forward_per_step"] > 0


def test_resume_to_the_bit(runs, tmp_path):
    whole, parts, text = runs
    config = config_of(text)
    resumed = shutil.copytree(parts, tmp_path / "resumed")
    stopped, _ = last_state(config, resumed)
    assert stopped.model_state.states.shape == (2, 8, 48, 64)
    assert stopped.model_state.valid == 32
    assert (np.abs(stopped.model_state.states[:, :, 16:]).max((0, 2, 3)) > 0).all()
    assert main.main(command(resumed, text)) == 0
    (one, at), (other, also_at) = (last_state(config, d) for d in (whole, resumed))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert one.model_state.valid == 48
    assert (np.abs(one.model_state.states).max((0, 2, 3)) > 0).all()
    assert at == also_at
    assert at["segments"] == 4
    finals = [json.loads((d / workdir.FINAL).read_text()) for d in (whole, resumed)]
    assert finals[0]["test"] == finals[1]["test"]


@pytest.mark.parametrize("change", ["symbols", "length"])
def test_another_text_under_a_checkpoint_is_one_line(runs, tmp_path, change, capsys):
    text = Path(runs[2][1].removeprefix("data.file="))
    run = shutil.copytree(runs[1], tmp_path / "run")
    before = text.read_text()
    try:
        text.write_text(before.replace("so", "oz") if change == "symbols" else before + "so " * 100)
        assert main.main(command(run, runs[2])) == 2
    finally:
        text.write_text(before)
    error = capsys.readouterr().err.splitlines()
    expected = {"symbols": "config: data.vocabulary is ", "length": "another text: tokens is "}
    assert len(error) == 1
    assert expected[change] in error[0]
    assert {p.name for p in (run / workdir.CHECKPOINTS).iterdir()} == {"1"}


@pytest.mark.slow
def test_one_device_is_like_eight(runs):
    whole, _, text = runs
    config = config_of(text)
    run, first = build(config, jax.devices()[:1]), build(config).representation.init()
    lanes = {s.data.shape[1] for s in first.model_state.states.addressable_shards}
    assert lanes == {1}
    places = jax.tree.map(lambda x: x.sharding, run.representation.abstract(0))
    state = jax.tree.map(lambda x, to: jax.device_put(np.asarray(x), to), first, places)
    data, losses, valid = run.task.train_data(), [], []
    for _ in range(4):
        state, sums = run.step(state, run.put(next(data)))
        losses.append(float(sums["loss"][0] / sums["loss"][1]))
        valid.append(int(state.model_state.valid))
    data.close()
    assert valid == [32, 48, 48, 48]
    records = [r for r in read_records(whole / workdir.METRICS) if r["split"] == "train"]
    np.testing.assert_allclose(losses, [r["loss"] for r in records], rtol=1e-5)
    final = json.loads((whole / workdir.FINAL).read_text())
    assert evaluate(run, state, "test")["loss"] == pytest.approx(final["test"]["loss"], rel=1e-5)
    eight, _ = last_state(config, whole)
    np.testing.assert_allclose(state.model_state.states, eight.model_state.states, atol=1e-5)
    for name, sets in flags(state).items():
        np.testing.assert_array_equal(sets, flags(eight)[name])


def test_generation_runs_on_the_forward_set(runs, capsys, monkeypatch):
    whole, _, text = runs
    seen = []

    def watched(model, params, lengths, prompt, *rest):
        seen.append((params, lengths, prompt))
        return sampling.generate(model, params, lengths, prompt, *rest)

    monkeypatch.setattr(generate, "generate", watched)
    flags = [f"--workdir={whole}", "--prompt=so it", "--tokens=9", "--temperature=0"]
    assert generate.main(flags) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("so it")
    assert len(shown) == len("so it") + 9 + 1
    state, meta = last_state(config_of(text), whole)
    params, lengths, prompt = seen[0]
    alpha = tk.forward_params(state.params, state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, params, alpha)
    assert (alpha["layers"]["feed_forward"]["up"]["kernel"] == 0).mean() > 0.89
    assert lengths == config_lengths(config_of(text), "evaluation")
    assert "".join(meta["text"]["symbols"][i] for i in prompt) == "so it"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens=0"], "--tokens: found '0'"),
        (["--prompt="], "--prompt: empty"),
        (["--prompt=a\udcff"], "--prompt: found what is no UTF-8"),
        (["--temperature=-1"], "--temperature=-1.0: must be"),
        (["--temperature=nan"], "--temperature=nan: must be"),
        (["--top_p=2"], "--top_p=2.0: must be above 0 and at most 1"),
        (["--top_k=-1"], "--top_k=-1: must be at least 0"),
        (["--seed=-1"], "--seed: found '-1'"),
        ([f"--seed={2**32}"], f"--seed: found '{2**32}'"),
        (["--workdir=/no/such"], "holds no config.json; must be a run's folder"),
    ],
)
def test_bad_flags_of_generation_are_one_line(runs, flags, message, capsys):
    given = {"--workdir": f"{runs[0]}", "--prompt": "so", "--tokens": "3"}
    given |= dict(flag.split("=", 1) for flag in flags)
    assert generate.main([f"{name}={value}" for name, value in given.items()]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert len(error.splitlines()) == 1
    assert message in error


def rewrite(path, out, change):
    """An exported file with another config or other arrays."""
    with np.load(path) as file:
        arrays = dict(file)
    metadata = json.loads(str(arrays.pop(METADATA)))
    change(metadata["config"], arrays)
    np.savez(out, **{METADATA: np.array(json.dumps(metadata))}, **arrays)


def set_sizes(**sizes):
    return lambda config, arrays: config["model"].update(sizes)


def cut(config, arrays):
    name = next(name for name in arrays if arrays[name].ndim == 2)
    arrays[name] = arrays[name][:1]


OTHER_FILES = {
    "d_model": (set_sizes(d_model=16), "d_model is 16 there and 64 in the run"),
    "n_layer": (set_sizes(n_layer=7), "n_layer is 7 there and 2 in the run"),
    "heads": (set_sizes(n_head=1), "n_head is 1 there and 2 in the run"),
    "vocabulary": (lambda c, _: c["data"].update(vocabulary="x"), "vocabulary is 'x' there"),
    "tokens": (lambda c, _: c["data"].update(vocabulary_size=99), "vocabulary_size is 99 there"),
    "task": (lambda c, _: c.update(task="toy"), "task is 'toy' there"),
    "array": (cut, "is (1, "),
    "name": (lambda _, arrays: arrays.update(new=np.zeros(3)), "new is (3,) there and None"),
    "dropout": (set_sizes(dropout=0.5), None),
}


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "file.npz"
    assert export.main([f"--workdir={runs[0]}", f"--out={path}"]) == 0
    return path


@pytest.mark.parametrize(("change", "told"), OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_parameters_of_another_model_are_one_line(runs, exported, tmp_path, change, told):
    rewrite(exported, tmp_path / "other.npz", change)
    config, run = config_of(runs[2]), make_task(config_of(runs[2]))
    like = run.model.abstract_params
    if told is None:
        generate.read_params(tmp_path / "other.npz", config, like)
        return
    with pytest.raises(UserError, match="^--params=.*other.npz: of another model: ") as error:
        generate.read_params(tmp_path / "other.npz", config, like)
    assert told in str(error.value)


def not_an_export(path, change, exported):
    """Files that are no export; `change` says in which way."""
    with np.load(exported) as file:
        arrays = dict(file)
    metadata = json.loads(str(arrays[METADATA]))
    kernel = next(name for name in metadata["leaves"])
    if change == "archive":
        with zipfile.ZipFile(path, "w"):
            return
    if change == "single array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
        return
    if change == "large":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("large.npy", bytes(2**24))
        return
    if change in ("text", "list", "no form", "form", "no config"):
        kept = {k: v for k, v in metadata.items() if k != change.removeprefix("no ")}
        text = {"text": "{", "list": "[1]", "form": json.dumps(metadata | {"form": "x"})}
        arrays[METADATA] = np.array(text.get(change, json.dumps(kept)))
    elif change == "config":
        arrays[METADATA] = np.array(
            json.dumps(metadata | {"config": {"task": "language_modelling"}})
        )
    elif change == "pattern":
        metadata["leaves"][kernel]["pattern"] = "block:3x"
        arrays[METADATA] = np.array(json.dumps(metadata))
    elif change == "part":
        del arrays[f"{kernel}.index"]
    elif change == "index":
        arrays[f"{kernel}.index"] = arrays[f"{kernel}.index"] + 10**6
    elif change == "values":
        arrays[f"{kernel}.values"] = arrays[f"{kernel}.values"][..., :-1]
    elif change == "nan":
        arrays[f"{kernel}.values"] = np.full_like(arrays[f"{kernel}.values"], np.nan)
    elif change == "strings":
        name = next(n for n in arrays if n.endswith("bias"))
        arrays[name] = arrays[name].astype(str)
    np.savez(path, **arrays)


NO_EXPORTS = {
    "archive": "no 'topkast' in it",
    "single array": "File is not a zip file",
    "large": "unpacks to 16777216 bytes; must be at most",
    "text": "Expecting property name",
    "list": "list indices must be",
    "form": "lacks 'x'",
    "no form": "lacks 'form'",
    "no config": "lacks 'config'",
    "config": "its config is of no run",
    "pattern": "'block:3x'; must be",
    "part": "lacks 'layers/",
    "index": "an index outside its leaf",
    "values": "values (",
    "nan": "holds what is no finite number",
    "strings": "holds what is no finite number",
}


@pytest.mark.parametrize(("change", "told"), NO_EXPORTS.items(), ids=NO_EXPORTS.keys())
def test_files_that_are_no_export_are_one_line(runs, exported, tmp_path, change, told):
    path = tmp_path / "file.npz"
    not_an_export(path, change, exported)
    config = config_of(runs[2])
    with pytest.raises(UserError, match=f"^--params={re.escape(str(path))}: ") as error:
        generate.read_params(path, config, make_task(config).model.abstract_params)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_parameters_that_cannot_be_read_are_one_line(runs, tmp_path, capsys):
    for path, told in ((tmp_path, "is no file"), (tmp_path / "no.npz", "no such file")):
        flags = [f"--workdir={runs[0]}", "--prompt=so", "--tokens=3", f"--params={path}"]
        assert generate.main(flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --params={path}: {told}")


@pytest.mark.parametrize("change", ["vocabulary_size", "level", "task", "checkpoints"])
def test_generation_from_a_folder_that_does_not_fit(runs, tmp_path, change, capsys):
    run = shutil.copytree(runs[0], tmp_path / "run")
    config = json.loads((run / workdir.CONFIG).read_text())
    expected = {
        "level": "config.data.level='word': its vocabulary is ",
        "vocabulary_size": "holds another state than this config makes",
        "task": "holds a run of task 'image_classification'",
        "checkpoints": "no whole checkpoint; found steps []",
    }
    if change == "checkpoints":
        shutil.rmtree(run / workdir.CHECKPOINTS)
    elif change == "task":
        config["task"] = "image_classification"
    elif change == "level":
        config["data"]["level"] = "word"
    else:
        config["data"]["vocabulary_size"] += 1
    (run / workdir.CONFIG).write_text(json.dumps(config))
    assert generate.main([f"--workdir={run}", "--prompt=so", "--tokens=3"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert expected[change] in error[0]
