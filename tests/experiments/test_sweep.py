"""Many runs from one file."""

import shutil
import subprocess
from pathlib import Path

import pytest
from toy_runs import records

from experiments.sweep import main

SWEEP = str(Path(__file__).with_name("toy_sweep.py"))


def sweep(directory, *args, variant=""):
    return main([f"--config={SWEEP}{variant}", f"--workdir={directory}", *args])


def finals(directory):
    return sorted(str(p.parent.relative_to(directory)) for p in directory.rglob("final.json"))


def test_list(tmp_path, capsys):
    assert sweep(tmp_path / "s", "--list", "--seeds=2", "--config.log_every=2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(i) for i in range(10)]
    assert lines[1].split()[1] == "80-60/seed-0"
    assert lines[6].endswith(":80/60 --config.steps=10 --config.log_every=2 --config.seed=1")
    assert sweep(tmp_path / "s", "--list", "--config.steps=9") == 0
    assert (
        capsys.readouterr().out.splitlines()[0].endswith(":dense --config.steps=9 --config.seed=0")
    )
    assert not (tmp_path / "s").exists()


def test_a_failure_does_not_end_the_sweep(tmp_path, capsys):
    directory = tmp_path / "s"
    small = "--config.steps=14"
    assert sweep(directory, "--only=5,0,3", small, variant=":nan") == 1
    assert finals(directory) == ["dense/seed-0", "static-80/seed-0"]
    err = capsys.readouterr().err
    assert "error: spoilt/seed-0: the loss of step 13 is nan" in err
    assert "1 of 3 runs failed: spoilt/seed-0" in err
    assert "Traceback" not in err
    before = [p.stat().st_mtime_ns for p in directory.rglob("final.json")]
    assert sweep(directory, "--only=0,3", small) == 0
    assert [p.stat().st_mtime_ns for p in directory.rglob("final.json")] == before
    assert records(directory / "dense" / "seed-0")[-1]["step"] == 14


def test_bugs_are_told_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    calls = []

    def train(config, directory):
        calls.append(directory.relative_to(tmp_path))
        if len(calls) == 1:
            raise ZeroDivisionError("a bug")
        return "finished"

    monkeypatch.setattr("experiments.sweep.train", train)
    assert sweep(tmp_path, "--only=0,1,2") == 1
    assert [str(c) for c in calls] == ["dense/seed-0", "80-60/seed-0", "50-50/seed-0"]
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


def test_stopping_ends_the_sweep(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("experiments.sweep.train", lambda c, d: calls.append(d) or "stopped")
    assert sweep(tmp_path) == 0
    assert len(calls) == 1


def test_report_at_the_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.sweep.train", lambda c, d: "finished")
    monkeypatch.setattr(
        "experiments.sweep.report", lambda dirs, out: f"table of {dirs[0]} in {out}"
    )
    assert sweep(tmp_path) == 0
    assert capsys.readouterr().out.endswith(f"table of {tmp_path} in {tmp_path}/report\n")


def test_slurm(tmp_path, capsys):
    assert sweep(tmp_path / "a b", "--slurm", "--seeds=2", "--config.steps=4") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0,1,2,3,4,5,6,7,8,9\n" in script
    last = script.splitlines()[-1]
    assert f"'--workdir={tmp_path}/a b' --seeds=2 --config.steps=4 --only=" in last
    (tmp_path / "script").write_text(script)
    bash = shutil.which("bash")
    assert subprocess.run([bash, "-n", tmp_path / "script"]).returncode == 0


@pytest.mark.parametrize("only", [["--only", "0,3"], ["--only=0,3"]])
def test_slurm_of_some(tmp_path, capsys, only):
    assert sweep(tmp_path / "s", "--slurm", *only) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0,3\n" in script
    name, *flags = script.splitlines()[-1].removeprefix("exec python -m ").split()
    assert name == "experiments.sweep"
    assert flags == [
        f"--config={SWEEP}", f"--workdir={tmp_path}/s", "--seeds=1",
        '--only="$SLURM_ARRAY_TASK_ID"',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        (None, ["--only=9"], "must be numbers from 0 to 4"),
        (None, ["--only=x"], "must be numbers from 0 to 4"),
        (None, ["--only=\N{SUPERSCRIPT TWO}"], "must be numbers from 0 to 4"),
        (None, ["--seeds=0"], "must be an integer of at least 1"),
        (None, ["--config.seed=3"], "--config.seed=3: a sweep sets the seeds itself; use --seeds"),
        (None, ["--config.stepz=1"], "no key 'stepz'"),
        ("x = 1", [], "defines no get_sweep()"),
        ("def get_sweep(): return []", [], "no runs"),
        ("def get_sweep(): return [1]", [], "must yield (name, config, overrides)"),
        ("def get_sweep(): return [('a', 'nowhere.py', {})]", [], "no such file 'nowhere.py'"),
        ("def get_sweep(): return [('a', 'b.py', {}), ('a', 'b.py', {})]", [], "named 'a'"),
        ("def get_sweep(): return [('a', 'b.py', {'seed': 1})]", [], "use --seeds=N"),
        *(
            (f"def get_sweep(): return [({name!r}, 'b.py', {{}})]", [], f"a run named {name!r}")
            for name in ("", ".", "..", "../../x", "/abs", "./a", "a/b", "a b", "a\\n")
        ),
    ],
)
def test_bad_input(tmp_path, capsys, text, args, message):
    path = SWEEP
    if text:
        path = tmp_path / "bad.py"
        path.write_text(text)
    assert main([f"--config={path}", f"--workdir={tmp_path}/s", *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "s").exists()
