"""Wrong commands: one line, status 2, and no folder made."""

import pytest

from experiments.main import main

DIGITS = "configs/quickstart.py:smoke"
LENET = "configs/digits_lenet.py:smoke"
TEXT = "configs/enwik8_small.py:smoke"
THREE, NINE = "\uff13", "\uff19"  # digits of full width
HUGE = "1" + 30 * "0"


@pytest.mark.parametrize(
    ("config", "flags", "told"),
    [
        (DIGITS, ["method.rules=5"], "config.method.rules: found (5,)"),
        (DIGITS, ['method.rules=((".*",None),)'], "config.method.rules: found (('.*', None),)"),
        (DIGITS, ['method.rules=((".*",{"pattern":5}),)'], "config.method.pattern: found 5"),
        (
            DIGITS,
            ['method.rules=((".*bias","dense"),(".*",{"forward_density":"x"}))'],
            "forward_density='x': must be a number in (0, 1]",
        ),
        (DIGITS, ["task=language_modelling"], "--config.task: cannot be overridden"),
        (DIGITS, ["name=other"], "--config.name: cannot be overridden"),
        (DIGITS, ["steps=2", "steps=3"], "--config.steps: found 2 times; must be given once"),
        (DIGITS, [f"batch_size={HUGE}"], "must be an integer of at least 1 and below 2**31"),
        (DIGITS, ["batch_size=4008"], "must be at most the 4000 images to train on"),
        (DIGITS, [f"steps={HUGE}"], f"config.steps: found {HUGE}; must be an integer of at least"),
        (DIGITS, [f"data.image_size={HUGE}"], "config.data.image_size: found"),
        (DIGITS, ["data.image_size=4097"], "must be an integer of at least 8 and at most 4096"),
        (LENET, ["data.image_size=32"], "config.data.image_size: found 32; must be 28, which"),
        (LENET, ["optimizer.b1=1"], "config.optimizer.b1: found 1.0; must be a number of at lea"),
        (LENET, ["optimizer.b2=1.0"], "config.optimizer.b2: found 1.0; must be a number of at "),
        (DIGITS, ["data.name=os:getcwd"], "config.data.name: found 'os:getcwd', a builtin_funct"),
        (DIGITS, ["model.name=os:getcwd"], "must be a function of (model)"),
        (DIGITS, ["data.recipe=os:getcwd"], "must be a Recipe"),
        (DIGITS, ["method.name=os:getcwd"], "config.method.name: found 'os:getcwd', a builtin_fu"),
        (TEXT, ["data.name=os:getcwd"], "must be a function of (data)"),
        (TEXT, ["model.name=os:fsdecode"], "must be a function of (model, vocabulary_size)"),
        (DIGITS, ["seed=4294967296"], "config.seed: found 4294967296; must be an integer of at"),
        (DIGITS, ["method.seed=4294967296", "method.name=set"], "config.method.seed: found 42949"),
        (DIGITS, ["data.dir=/elsewhere"], "config.data.dir: found '/elsewhere'; must be empty"),
        (DIGITS, [f"steps={THREE}"], f"--config.steps={THREE}: expected int"),
        (
            DIGITS,
            [f"method.refresh_every={HUGE}"],
            "must be None or an integer of at least 1 and below",
        ),
        (
            DIGITS,
            ["method.exploration_weight=1e400"],
            "exploration_weight=inf: must be a finite number",
        ),
        (
            DIGITS,
            ["model.small_dense.rules=((1,2),)"],
            "config.model.small_dense.rules: found ((1, 2),)",
        ),
        (
            TEXT,
            ["model.small_dense.rules=((1,),)"],
            "config.model.small_dense.rules: found ((1,),)",
        ),
        (
            TEXT,
            ["model.small_dense.rules=(('.*','dense'),)"],
            "config.model.small_dense.rules: found (('.*', 'dense'),); must be empty, because only",
        ),
        (
            DIGITS,
            ["optimizer.learning_rate=1e300"],
            "config.optimizer.learning_rate: found 1e+300; must be a number above 0 and at most 3",
        ),
        (DIGITS, [f"optimizer.l2=1{'0' * 400}"], "config.optimizer.l2"),
        (DIGITS, [f"method.pattern=block:{NINE}x{NINE}"], "config.method.pattern: found 'block:"),
        (
            "configs/quickstart.py:small-dense-90,smoke",
            ["method.name=set"],
            "config.model.small_dense.forward_density: found 0.1; must be 1 with config.",
        ),
        (DIGITS, ["model.width=1e308"], "must be a number above 0 and at most 1e+06"),
        (TEXT, [f"model.div_val={HUGE}"], "config.model: div_val="),
        (TEXT, [f"model.train.clamp={HUGE}"], "config.model.train.clamp="),
        (TEXT, [f"model.evaluation.memory={HUGE}"], "config.model.evaluation.memory="),
        (TEXT, [f"model.n_layer={HUGE}"], "config.model.n_layer: found"),
        (TEXT, ["data.file=elsewhere"], "python_docs does not read it"),
        ("configs/quickstart.py:dense,90/80", [], "'dense' and '90/80' both name a method"),
        ("configs/quickstart.py:90/80,smok", [], "'smok': allowed: dense, F/B"),
        (f"configs/quickstart.py:{NINE}0/80", [], f"variant '{NINE}0/80': allowed: dense, F/B"),
    ],
)
def test_wrong_values(capsys, tmp_path, config, flags, told):
    flags = [f"--config.{flag}" for flag in flags]
    assert_refused(capsys, tmp_path, told, f"--config={config}", *flags)


def test_a_value_after_a_space(capsys, tmp_path):
    flags = [f"--config={DIGITS}", "--config.steps", "5"]
    told = "--config.steps: no value; expected --config.steps=VALUE"
    assert_refused(capsys, tmp_path, told, *flags)


def test_a_flag_given_twice(capsys, tmp_path):
    flags = [f"--config={DIGITS}", "--stop_at=1", "--stop_at=2"]
    assert_refused(capsys, tmp_path, "--stop_at: found 2 times; must be given once", *flags)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def get_config(variant=''): return 5", "get_config() returned a int; must be what"),
        ("import sys; sys.exit(0)", "ends the process: SystemExit(0)"),
        ("import sys\ndef get_config(variant=''): sys.exit(0)", "ends the process: SystemExit(0)"),
    ],
)
def test_wrong_config_files(capsys, tmp_path, text, told):
    (tmp_path / "wrong.py").write_text(text)
    assert_refused(capsys, tmp_path, told, f"--config={tmp_path}/wrong.py")


def test_a_refusal_is_shorter_than_what_was_found(capsys, tmp_path):
    name = "x" * 120_000
    flags = [f"--config={DIGITS}", f"--config.optimizer.name={name}"]
    line = assert_refused(capsys, tmp_path, "config.optimizer.name: found 'xxx", *flags)
    assert "must be one of " in line
    assert len(line) < 2100


def assert_refused(capsys, tmp_path, told, *flags):
    assert main([*flags, f"--workdir={tmp_path}/run"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert told in line
    assert not (tmp_path / "run").exists()
    return line
