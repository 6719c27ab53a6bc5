"""The model's numbers are the reference's: its golden files, and an oracle for other settings."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_xl_oracle as oracle

from experiments.errors import UserError
from experiments.language_modelling import check_parity
from experiments.language_modelling.models import narrow
from experiments.language_modelling.models.reference_weights import (
    from_reference,
    settings_from_reference,
    to_reference,
)
from experiments.language_modelling.models.transformer_xl import LanguageModel

GOLDENS = sorted((Path(__file__).parents[3] / "goldens").glob("txl_*.npz"))
ADAPTIVE = {"n_token": 23, "cutoffs": [5, 9, 17], "d_embed": 8}
CASES = {  # every other one under scan
    "shape": {"n_layer": 4, "d_head": 5, "n_head": 3, "d_inner": 11, "clamp_len": 0},
    "memory_below_target": {"mem_len": 2, "same_length": True, "pre_lnorm": True},
    "untied": {"untie_r": True, "tie_weight": False, "same_length": True, "clamp_len": 3},
    "no_memory": {"mem_len": 0, "pre_lnorm": True, "d_embed": 4},
    "div3_no_clusters": {"div_val": 3, "tie_projs": [True], "tgt_len": 1, "mem_len": 30},
    "div1_no_projection": {**ADAPTIVE, "d_embed": 6, "mem_len": 1, "tie_projs": [False, True]},
    "div1_untied_projections": {**ADAPTIVE, "tie_projs": [False] * 4},
    "div1_some_tied": {**ADAPTIVE, "tie_projs": [True, False, True], "tie_weight": False},
    "div2_some_tied": {**ADAPTIVE, "div_val": 2, "tie_projs": [False, True, False, True]},
    "div2_untied_tables": {**ADAPTIVE, "div_val": 2, "tie_weight": False, "tie_projs": None},
}


@pytest.mark.parametrize("file", GOLDENS, ids=lambda file: file.stem)
def test_golden_file(file):
    found = check_parity.differences(check_parity.read_golden(file))
    assert found.keys() == check_parity.BOUNDS.keys()
    for kind, bound in check_parity.BOUNDS.items():
        assert found[kind] < bound / 3, kind


@pytest.mark.parametrize("file", GOLDENS, ids=lambda file: file.stem)
def test_as_many_parameters(file):
    golden = check_parity.read_golden(file)
    config, _ = settings_from_reference(json.loads(str(golden["cfg"])))
    assert narrow.parameters(config) == golden["n_params"]
    names = to_reference(LanguageModel(config).init(jax.random.key(0)), config)
    assert names.keys() == set(json.loads(str(golden["trainable"])))


def test_there_are_five_golden_files():
    assert len(GOLDENS) == 5


def _case(name):
    cfg = oracle.DEFAULTS | CASES[name]
    arrays, weights, last_loss = oracle.golden(cfg | {"tie_projs": cfg["tie_projs"] or []})
    return {**arrays, "cfg": np.array(json.dumps(cfg))}, weights, last_loss


QUICK = ("shape", "memory_below_target", "untied")  # golden files have cutoffs


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in CASES]
)
def test_oracle(name):
    golden, weights, last_loss = _case(name)
    scan = list(CASES).index(name) % 2 == 0
    run = check_parity.Replay.of(golden, scan=scan)
    found = check_parity.compare(run, golden)
    assert found["nll"] < 2e-5
    assert found["memory"] < 2e-5
    rng = np.random.default_rng(3)
    for tensor, gradient in to_reference(run.gradients, run.model.config).items():
        direction = rng.normal(size=gradient.shape)
        expected = _slope(last_loss, weights, tensor, direction)
        bound = 1e-4 * max(np.abs(gradient).max(), 1e-4) * np.abs(direction).sum()
        assert abs((gradient * direction).sum() - expected) < bound, tensor


def _slope(loss, weights, tensor, direction, step=1e-5):
    """Central difference along `direction` of one tensor, under all its names."""

    def moved(sign):
        same = [name for name in weights if weights[name] is weights[tensor]]
        value = weights[tensor].astype(np.float64) + sign * step * direction
        return loss({**weights, **dict.fromkeys(same, value)})

    return (moved(1) - moved(-1)) / (2 * step)


def _weights(name):
    cfg = oracle.DEFAULTS | CASES[name]
    return cfg, oracle.random_weights(cfg | {"tie_projs": cfg["tie_projs"] or []}, 0)


def test_weights_return_under_the_reference_names():
    for name in CASES:
        cfg, weights = _weights(name)
        config, _ = settings_from_reference(cfg)
        back = to_reference(from_reference(weights, config), config)
        for tensor, value in back.items():
            np.testing.assert_array_equal(value, weights[tensor])
        distinct = {id(value) for value in weights.values()}
        assert len(back) == len(distinct)


def test_names_of_published_checkpoints():
    cfg, weights = _weights("untied")
    config, _ = settings_from_reference(cfg)
    plain = from_reference(weights, config)
    stacked = dict(weights)
    for kind in ("r_w_bias", "r_r_bias"):
        stacked[kind] = np.stack([stacked.pop(f"layers.{i}.dec_attn.{kind}") for i in range(2)])
    for other in (
        {f"module.{name}": value for name, value in weights.items()},
        {f"param/{name}": value for name, value in weights.items()},
        {**weights, "pos_emb.inv_freq": np.ones(3)},
        stacked,
    ):
        jax.tree.map(np.testing.assert_array_equal, from_reference(other, config), plain)


def test_bad_weights_are_named():
    cfg, weights = _weights("div2_some_tied")
    config, _ = settings_from_reference(cfg)

    def fails(match, **changed):
        changed = {name.replace("__", "."): value for name, value in changed.items()}
        given = {k: v for k, v in {**weights, **changed}.items() if v is not None}
        with pytest.raises(UserError, match=match) as error:
            from_reference(given, config)
        assert "\n" not in str(error.value)

    fails("'r_w_bias' is missing", r_w_bias=None)
    fails("'extra' has no place", extra=np.zeros(3))
    fails(
        r"attention/output/kernel has shape \(6, 7\)",
        layers__0__dec_attn__o_net__weight=np.zeros((7, 6)),
    )
    fails("cannot be cut in 3", layers__0__dec_attn__qkv_net__weight=np.zeros((7, 6)))
    for value in (np.array(3.0), np.array(["x"]), np.zeros((18, 6), complex)):
        fails("must be an array of numbers", layers__0__dec_attn__qkv_net__weight=value)
    fails("differ: the settings tie them", crit__out_projs__1=np.zeros((6, 4)))
    tied = {"word_emb__emb_projs__1": None, "crit__out_projs__1": None}
    fails("'word_emb.emb_projs.1 or crit.out_projs.1' is missing", **tied)


def _run(*arguments):
    command = [sys.executable, "-m", "experiments.language_modelling.check_parity", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow  # The tests of wrong values below call its main function.
def test_command_line(tmp_path):
    good = _run(str(GOLDENS[0]))
    assert good.returncode == 0
    assert json.loads(good.stdout.splitlines()[-1]).keys() == {"nll", "memory", "gradient"}
    assert good.stdout.count("\n") == 1


@pytest.fixture(scope="module")
def golden_run():
    golden = check_parity.read_golden(GOLDENS[1])
    return golden, check_parity.Replay.of(golden)


def _status(monkeypatch, tmp_path, golden_run, **changed):
    """Exit status for a changed file; a step that is compiled already runs in place of its own."""
    golden, run = golden_run
    monkeypatch.setattr(check_parity.Replay, "of", lambda golden: copy.copy(run))
    arrays = golden | {name.replace("__", "/"): value for name, value in changed.items()}
    kept = {name: value for name, value in arrays.items() if value is not None}
    np.savez(tmp_path / "changed.npz", **kept)
    return check_parity.main([str(tmp_path / "changed.npz")])


@pytest.mark.parametrize("name", ["nll__1", "mem__2__0", "mem__0__2", "grad__r_r_bias"])
def test_a_wrong_value_is_found(tmp_path, capsys, monkeypatch, golden_run, name):
    golden = golden_run[0]
    value = golden[name.replace("__", "/")]
    largest = np.abs(value).max()
    assert _status(monkeypatch, tmp_path, golden_run) == 0
    for wrong in (value + 3e-4 * largest, np.where(value == value.max(), np.nan, value)):
        assert _status(monkeypatch, tmp_path, golden_run, **{name: wrong}) == 1
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_wrong_weight_is_found(tmp_path, capsys, monkeypatch, golden_run):
    golden, run = golden_run
    name = "param/layers.1.dec_attn.qkv_net.weight"

    def of(golden):
        weights = {k: v for k, v in golden.items() if k.startswith("param/")}
        changed = copy.copy(run)
        changed.params = from_reference(weights, run.model.config)
        return changed

    for size, status in ((0.0, 0), (1e-3, 1)):
        weight = golden[name].copy()
        weight[3, 5] += size
        np.savez(tmp_path / "changed.npz", **golden | {name: weight})
        monkeypatch.setattr(check_parity.Replay, "of", of)
        assert check_parity.main([str(tmp_path / "changed.npz")]) == status
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_gradients_may_stand_under_any_name_of_a_tied_weight(golden_run):
    golden, run = golden_run
    first, other = "grad/word_emb.emb_layers.0.weight", "grad/crit.out_layers.0.weight"
    renamed = {other if k == first else k: v for k, v in golden.items()}
    found = check_parity.compare(copy.copy(run), renamed)
    assert found["gradient"] < 1e-5
    renamed[other] = renamed[other] + 1e-3
    assert check_parity.compare(copy.copy(run), renamed)["gradient"] > 1e-4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mem__1__1": None}, "it has no mem/1/1"),
        ({"nll__1": np.zeros((7, 2))}, "nll/1 has shape (7, 2)"),
        ({"nll__1": np.full((7, 3), "x")}, "nll/1 is <U1: must be floating numbers"),
        ({"grad__nothing": np.zeros((7, 2))}, "grad/nothing is no weight"),
    ],
    ids=str,
)
def test_expected_values_that_do_not_fit(
    tmp_path, capsys, monkeypatch, golden_run, changed, message
):
    assert _status(monkeypatch, tmp_path, golden_run, **changed) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (len(out.splitlines()), len(err.splitlines())) == (0, 1)


def test_a_bad_file_is_named(tmp_path, capsys):
    golden = check_parity.read_golden(GOLDENS[0])

    def cfg(**changed):
        return np.array(json.dumps(json.loads(str(golden["cfg"])) | changed))

    def fails(match, path=None, **changed):
        arrays = {key.replace("__", "/"): value for key, value in changed.items()}
        if path is None:
            path = tmp_path / "bad.npz"
            np.savez(path, **{k: v for k, v in {**golden, **arrays}.items() if v is not None})
        assert check_parity.main([str(path)]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert len(err.splitlines()) == 1
        assert match in err

    shutil.copy(GOLDENS[0], tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes(GOLDENS[0].read_bytes()[:60000])
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npy", np.zeros(3))
    fails("no such file", tmp_path / "none.npz")
    fails("not a whole .npz file", tmp_path / "cut.npz")
    fails("not a whole .npz file", tmp_path / "text.npz")
    fails("not a whole .npz file", tmp_path / "array.npy")
    fails("not a whole .npz file", tmp_path)
    fails("it has no cfg", cfg=None)
    fails("cfg is no JSON object", cfg=np.array("{"))
    fails("cfg has no 'n_layer'", cfg=np.array(json.dumps({"n_token": 3})))
    for name, value in (("attn_type", 1), ("ext_len", 3), ("sample_softmax", 100)):
        fails(f"{name}={value}: only", cfg=cfg(**{name: value}))
    fails("lengths.clamp=None: must be", cfg=cfg(clamp_len=None))
    fails("d_embed=4.5: must be", cfg=cfg(d_embed=4.5))
    fails("tie_projs has 4 entries: there are 3", cfg=cfg(tie_projs=[True] * 4))
    fails("cutoffs=[40, 20]: must be ascending", cfg=cfg(cutoffs=[40, 20]))
    fails("same_length=True with lengths.memory=0", cfg=cfg(same_length=True, mem_len=0))
    fails("d_model", cfg=cfg(d_model="16"))
    fails("segments of 6 need", cfg=cfg(tgt_len=6))
    fails("outside 0", tokens=golden["tokens"] + 60)
    for tokens in (golden["tokens"] + 0.5, golden["tokens"].astype(str), golden["tokens"][:, :0]):
        fails("whole numbers [", tokens=tokens)


def test_other_lengths_than_in_training_with_the_same_parameters():
    cfg, weights = _weights("memory_below_target")
    config, _ = settings_from_reference(cfg)
    model, params = LanguageModel(config), from_reference(weights, config)
    changed = {"tgt_len": 3, "mem_len": 9, "clamp_len": 4}
    arrays, _, _ = oracle.golden(cfg | changed)
    _, lengths = settings_from_reference(cfg | changed)
    apply, memory = jax.jit(model.apply, static_argnums=4), model.init_memory(2, lengths)
    for s in range(3):
        tokens = jnp.asarray(arrays["tokens"].T)[:, s * 3 : s * 3 + 4]
        nll, memory = apply(params, memory, tokens[:, :-1], tokens[:, 1:], lengths)
        np.testing.assert_allclose(nll.T, arrays[f"nll/{s}"], atol=2e-5)
