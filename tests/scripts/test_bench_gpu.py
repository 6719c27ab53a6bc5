"""scripts/bench_gpu and scripts/tune_products.py at tiny sizes, and what they refuse."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import pytest

from experiments.benchmarks import model_step
from experiments.benchmarks.budget import Budget
from scripts import bench_gpu, tune_products
from topkast_jax.always_sparse.products import pallas_gpu, tuned_json

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/bench_gpu"


def last_line(out):
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(bench_gpu, "BLOCKS", (64,))


def test_without_a_gpu_is_one_line():
    """Through the script itself, with the interpreter of the tests."""
    environment = os.environ | {"TOPKAST_PYTHON": sys.executable}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    told = "error: scripts/bench_gpu: found cpu (cpu); needs an NVIDIA GPU, or --smoke\n"
    assert done.stderr == told


@pytest.mark.slow
def test_rows_and_tables(few_rows, capsys, tmp_path):
    tables = tmp_path / "tables.md"
    flags = ["--smoke", "--repeats=1", "--parts=checks,stack", f"--tables={tables}"]
    assert bench_gpu.main(flags) == 0
    record = last_line(capsys.readouterr().out)
    assert [(c["block"], c["dtype"], c["ok"]) for c in record["checks"]] == [
        (64, "bfloat16", True),
        (64, "float32", True),
    ]
    dense, sparse = record["stack"]
    assert (dense["block"], sparse["block"], sparse["density"]) == (None, 64, "80/60")
    assert sparse["limit"] == {"y": 0.2, "dx": 0.2, "dw": 0.4, "step": 0.2667}
    for part, ratio in sparse["ratio"].items():
        assert ratio == pytest.approx(sparse[part] / dense[part], abs=1e-3)
    assert dense["clock"] == sparse["clock"] == "host"
    assert sparse["memory"]["program_bytes"] > 0
    text = tables.read_text()
    assert record["command"] in text
    assert "A smoke run" in text
    assert len(re.findall(r"^\| blocks of 64, 80/60 \|", text, re.MULTILINE)) == 1


ROW = {"step": 2.0, "memory": {"program_bytes": 3}, "clock": "host", "backend": "xla"}


def test_rows_that_do_not_fit_are_named(few_rows, monkeypatch, capsys, tmp_path):
    def model(bench, block, density):
        time.sleep(1.2)
        return ROW

    tables = tmp_path / "tables.md"
    monkeypatch.setattr(bench_gpu.Bench, "_model", model)
    flags = ["--smoke", "--budget=2", "--parts=model", f"--tables={tables}"]
    assert bench_gpu.main(flags) == 0
    record = last_line(capsys.readouterr().out)
    assert [each["block"] for each in record["model"]] == [None]
    assert record["left_out"] == ["model blocks of 64, 80/60"]
    assert "* model blocks of 64, 80/60" in tables.read_text()


def test_without_dense_there_is_no_ratio(few_rows, monkeypatch, capsys, tmp_path):
    tables = tmp_path / "tables.md"
    monkeypatch.setattr(bench_gpu.Bench, "_model", lambda bench, block, _: block and ROW)
    assert bench_gpu.main(["--smoke", "--parts=model", f"--tables={tables}"]) == 1
    record = last_line(capsys.readouterr().out)
    assert [each["ratio"] for each in record["model"]] == [{}]
    assert [each["row"] for each in record["failed"]] == ["model dense"]
    assert "| blocks of 64, 80/60 | 2e+03 (0.267) |" in tables.read_text()


def test_tables_that_cannot_be_written_cost_no_record(few_rows, monkeypatch, capsys, tmp_path):
    def write_text(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bench_gpu.Bench, "_model", lambda *_: ROW)
    monkeypatch.setattr(pathlib.Path, "write_text", write_text)
    assert bench_gpu.main(["--smoke", "--parts=model", f"--tables={tmp_path / 'a.md'}"]) == 1
    record = last_line(capsys.readouterr().out)
    assert len(record["model"]) == 2
    assert "Permission denied" in record["failed"][0]["error"]


def test_a_table_that_tuning_did_not_make_is_the_package_s(monkeypatch, capsys, tmp_path):
    """No product could be tuned; the other parts still run."""
    monkeypatch.setattr(bench_gpu, "tune", lambda *_: [])
    monkeypatch.setattr(bench_gpu.Bench, "_model", lambda *_: ROW)
    flags = ["--smoke", "--parts=model", "--tune", f"--tuned={tmp_path / 'tuned.json'}"]
    assert bench_gpu.main(flags) == 0
    record = last_line(capsys.readouterr().out)
    assert (record["tuned"], len(record["model"])) == ("the package (tuned.json)", 3)


def test_the_making_of_the_environment_counts(few_rows, monkeypatch, capsys):
    """The script says when it began; of nine minutes, four seconds are left."""
    jax.devices()
    monkeypatch.setenv(bench_gpu.BEGUN, str(time.time() - 536))
    monkeypatch.setattr(bench_gpu.Bench, "_model", lambda *_: time.sleep(2.2) or ROW)
    assert bench_gpu.main(["--smoke", "--parts=model"]) == 0
    record = last_line(capsys.readouterr().out)
    assert len(record["left_out"]) == 1
    assert record["seconds"] > 536


def test_a_short_row_of_dense_lets_no_longer_one_begin():
    now = 0.0
    budget = Budget(30.0, clock=lambda: now)
    assert budget.row("stack", "dense", lambda: {"a": 1}, first=25.0) == {"a": 1}
    now = 10.0
    assert budget.row("stack", "blocks", lambda: {"a": 2}, first=25.0) is None
    assert budget.left_out == ["blocks"]


@pytest.mark.slow
def test_a_step_of_the_model():
    row = model_step.times("80/60", 64, None, model_step.SMOKE[1], repeats=1)
    assert row["step"] > 0
    assert row["clock"] == "host"


def test_a_mismatch_is_told_after_everything_has_run(few_rows, monkeypatch, capsys):
    spmm = pallas_gpu.spmm
    monkeypatch.setattr(pallas_gpu, "spmm", lambda *args, **kw: 1.1 * spmm(*args, **kw))
    after = []
    monkeypatch.setattr(bench_gpu.Bench, "stack", lambda bench: after.append("stack") or [])
    assert bench_gpu.main(["--smoke", "--parts=checks,stack"]) == 1
    record = last_line(capsys.readouterr().out)
    assert [check["ok"] for check in record["checks"]] == [False, False]
    assert (after, record["failed"]) == (["stack"], [])


def test_an_error_of_a_row_is_told_at_the_end(few_rows, monkeypatch, capsys):
    def spmm(*_, **__):
        raise RuntimeError("no such tile")

    monkeypatch.setattr(pallas_gpu, "spmm", spmm)
    assert bench_gpu.main(["--smoke", "--parts=checks"]) == 1
    failed = last_line(capsys.readouterr().out)["failed"]
    assert [row["error"] for row in failed] == ["RuntimeError: no such tile"] * 2
    assert "block 64 bfloat16" in failed[0]["row"]


@pytest.mark.slow
@pytest.mark.parametrize("tune", [False, True])
def test_smoke(tmp_path, tune):
    """scripts/test -m slow tests/scripts/test_bench_gpu.py"""
    environment = os.environ | {"TOPKAST_PYTHON": sys.executable}
    flags = ["--tune", f"--tuned={tmp_path / 'tuned.json'}"] if tune else []
    line = [SCRIPT, "--smoke", "--repeats=2", *flags]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    record = last_line(done.stdout)
    assert [len(record[part]) for part in ("checks", "stack", "model")] == [4, 3, 3]
    assert record["left_out"] == record["failed"] == []
    if tune:
        assert [row["product"] for row in record["tune"]] == list(tune_products.tuning.PRODUCTS)
        assert len(tuned_json.load(tmp_path / "tuned.json").entries) == 3


@pytest.mark.slow
def test_products_are_tuned_into_a_table(capsys, tmp_path):
    out = tmp_path / "tuned.json"
    flags = ["--shapes=16x32", "--blocks=8", "--repeats=1", f"--out={out}"]
    assert tune_products.main([*flags, "--tokens=4", "--densities=80/60,90/80"]) == 0
    record = last_line(capsys.readouterr().out)
    assert [row["product"] for row in record["rows"]] == list(tune_products.tuning.PRODUCTS)
    assert {row["clock"] for row in record["rows"]} == {"host"}
    assert tune_products.main([*flags, "--tokens=5", "--budget=1"]) == 0
    record = last_line(capsys.readouterr().out)
    entries = tuned_json.load(out).entries
    assert len(entries) == 3 + len(record["rows"])  # Those of 4 tokens are still there.
    assert len(record["rows"]) + len(record["left_out"]) == 3


@pytest.mark.parametrize(
    ("main", "flags", "told"),
    [
        (bench_gpu.main, ["--smoke", "--parts=all"], "comma list of checks, stack, model"),
        (bench_gpu.main, ["--smoke", "--budget=0"], "at least 1"),
        (bench_gpu.main, ["--smoke", "--tune"], "--smoke --tune: needs --tuned=FILE"),
        (bench_gpu.main, ["--smoke", "--tuned=/not/there.json"], "no such folder"),
        (bench_gpu.main, ["--smoke", "--tables=/not/there.md"], "no such folder"),
        (bench_gpu.main, ["--smoke", "--tables=."], "found a folder; must be a file"),
        (bench_gpu.main, ["--smoke", "--tuned=nowhere.json"], "tuned table nowhere.json: No such"),
        (tune_products.main, ["--backend=pallas_gpu"], "found cpu; must be on cuda, or with"),
        (tune_products.main, ["--backend=triton"], "invalid choice: 'triton'"),
        (tune_products.main, ["--smoke"], "--smoke: needs --out=FILE"),
        (tune_products.main, ["--out=/not/there.json"], "no such folder"),
        (tune_products.main, ["--blocks=16x", "--out=t"], "'16x'; must be a comma list of blocks"),
        (tune_products.main, ["--shapes=16x", "--out=t"], "'16x'; must be a shape such as 1024x"),
        (tune_products.main, ["--shapes=1024", "--out=t"], "'1024'; must be a shape such as 1024"),
        (tune_products.main, ["--tokens=8,", "--out=t"], "at least 1"),
        (tune_products.main, ["--shapes=16x20", "--blocks=16"], "must divide the shape"),
        (
            tune_products.main,
            ["--backend=pallas_gpu", "--smoke", "--blocks=8", "--out=t"],
            "blocks must be powers of 2 from 16",
        ),
    ],
)
def test_a_mistake_is_one_line(main, flags, told, capsys):
    assert main(flags) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert told in err


def test_a_wrong_table_is_told_before_all_work(capsys, tmp_path):
    table = tmp_path / "tuned.json"
    table.write_text('{"entries": [3]}')
    for main, flags in (
        (bench_gpu.main, ["--smoke", f"--tuned={table}"]),
        (tune_products.main, [f"--out={table}"]),
    ):
        assert main(flags) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"{table}, entry 0" in err
