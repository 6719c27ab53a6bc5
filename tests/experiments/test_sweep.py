"""Many runs from one file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from toy_runs import records

from experiments import signals
from experiments.config.planned import Planned
from experiments.records.plans import Plan, read, record
from experiments.signals import ASK, RESUMABLE
from experiments.sweep import main, run_all

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
        if len(calls) == 2:
            raise MemoryError("too little")
        return "finished"

    monkeypatch.setattr("experiments.sweep.train", train)
    assert sweep(tmp_path, "--only=0,1,2") == 1
    assert [str(c) for c in calls] == ["dense/seed-0", "80-60/seed-0", "50-50/seed-0"]
    err = capsys.readouterr().err
    assert "ZeroDivisionError: a bug" in err
    assert "\nerror: 80-60/seed-0: out of memory: too little; needs a smaller model" in err
    assert err.count("Traceback") == 1


def test_stopping_ends_the_sweep(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("experiments.sweep.train", lambda c, d: calls.append(d) or "interrupted")
    assert sweep(tmp_path) == RESUMABLE
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


SEVERAL = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(flag.split("=", 1) for flag in sys.argv[3:])
directory, name = Path(flags["--workdir"]), flags["--config"].partition(":")[2]
directory.mkdir(parents=True)
time.sleep(0.2)
(directory / "cores.json").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
if name == "50/50":
    sys.exit("error: it does not work")
if name == "60/60":
    os.kill(os.getpid(), signal.SIGKILL)
if name == "70/70":
    sys.exit(75)
if name == "slow":
    def save(*_):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1)
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    (directory / "begun").touch()
    while True:
        time.sleep(0.1)
if name == "static-50":
    begun = directory.parents[1] / "slow" / "seed-0" / "begun"
    while "--config.w" in flags and not begun.exists():
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    os.kill(os.getppid(), signal.Signals[os.environ["ASKED"]])
    time.sleep(60)
(directory / "final.json").write_text('{"finished": true}')
"""


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """A stand-in for `python -m experiments.main`, which says on which cores it runs."""
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{SEVERAL}")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_several_at_a_time_share_the_cores(tmp_path, processes, capsys):
    directory, cores = tmp_path / "s", sorted(os.sched_getaffinity(0))
    assert sweep(directory, "--only=0,1,2,3", "--jobs=2") == 1
    assert finals(directory) == ["80-60/seed-0", "dense/seed-0", "static-80/seed-0"]
    used = [json.loads(p.read_text()) for p in directory.rglob("cores.json")]
    assert len(used) == 4
    assert all(own in (cores[::2], cores[1::2] or cores) for own in used)
    out, err = capsys.readouterr()
    assert f"run dense/seed-0: {directory}/dense/seed-0.log" in out
    assert err.splitlines()[0] == "error: 50-50/seed-0: it does not work"
    assert err.splitlines()[1] == "1 of 4 runs failed: 50-50/seed-0"


@pytest.mark.parametrize("asked", [s.name for s in ASK if s != signal.SIGINT])
def test_a_signal_stops_all_that_run_at_a_time(tmp_path, processes, capsys, monkeypatch, asked):
    """Those of `ASK`; under nohup, SIGHUP is none of them."""
    monkeypatch.setenv("ASKED", asked)
    before = signal.getsignal(signal.SIGTERM)
    assert sweep(tmp_path / "s", "--only=0,4,1,3", "--jobs=2") == RESUMABLE
    out, err = capsys.readouterr()
    assert "\nstopped in " in out
    assert err == ""
    assert "static-50/seed-0" not in finals(tmp_path / "s")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_is_sent_once_to_a_run_that_is_slow_to_save(tmp_path, processes, monkeypatch):
    """A second one would end it at once, without a checkpoint."""
    monkeypatch.setenv("ASKED", "SIGTERM")
    rows = (("static-50", ("w=1",)), ("slow", ()))
    runs = [Planned(name, 0, f"c:{name}", own) for name, own in rows]
    statuses = []
    wait = subprocess.Popen.wait
    monkeypatch.setattr(
        subprocess.Popen, "wait", lambda self: statuses.append(wait(self)) or statuses[-1]
    )
    assert run_all(runs, tmp_path, jobs=2) == RESUMABLE
    assert statuses == [75, 75]


def test_a_run_that_was_killed_is_told_as_such(tmp_path, processes, capsys):
    """By the system, when memory is short: its log says nothing of it."""
    runs = [Planned(f"r{i}", 0, f"c:{v}", ()) for i, v in enumerate(("60/60", "dense"))]
    (tmp_path / "r0").mkdir()
    (tmp_path / "r0" / "seed-0.log").write_text("step 3/4  loss 1.0\n")
    assert run_all(runs, tmp_path, jobs=2) == 1
    assert capsys.readouterr().err.startswith("error: r0/seed-0: ended by SIGKILL; ")
    assert finals(tmp_path) == ["r1/seed-0"]


def test_a_run_that_was_stopped_alone_stops_the_sweep(tmp_path, processes, capsys):
    runs = [Planned(f"r{i}", 0, f"c:{v}", ()) for i, v in enumerate(("70/70", *["dense"] * 4))]
    assert run_all(runs, tmp_path, jobs=1 + 1) == RESUMABLE
    assert capsys.readouterr().out.endswith("stopped in r0/seed-0; the same command goes on\n")
    assert len(finals(tmp_path)) < 4


def test_tasks_of_a_job_array_write_the_plan_at_once(tmp_path, monkeypatch):
    row = {"row": "a", "config": "c", "overrides": [], "paper": ""}
    plan, sync = Plan("s.py", 2, [row]), os.fsync

    def another_task(number):
        monkeypatch.setattr(os, "fsync", sync)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            record(tmp_path, plan, {"a"})
        sync(number)

    monkeypatch.setattr(os, "fsync", another_task)
    record(tmp_path, plan, {"a"})
    (written,) = tmp_path.iterdir()
    assert read(written) == plan


def test_a_signal_is_handled_while_a_result_is_waited_for():
    handled = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: handled.set())

    def work():
        time.sleep(0.3)  # The main thread waits.
        # As if it had come just before the wait: the main thread's system call is not interrupted.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        return handled.wait(timeout=10)

    try:
        with ThreadPoolExecutor(1) as pool:
            assert signals.result(pool.submit(work))
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.slow
def test_several_at_a_time_are_the_same_runs(tmp_path):
    sweep(tmp_path / "one", "--only=0,1")
    assert sweep(tmp_path / "two", "--only=0,1", "--jobs=2") == 0
    for name in ("dense/seed-0", "80-60/seed-0"):
        one, two = (records(tmp_path / d / name) for d in ("one", "two"))
        assert [r | {"timing": 0} for r in one] == [r | {"timing": 0} for r in two]


def test_rows_without_a_name_are_named_by_what_they_are(tmp_path, capsys):
    path = tmp_path / "s.py"
    path.write_text(
        "def get_sweep(variant=''):\n"
        "    config = 'configs/cifar10_small.py'\n"
        "    yield None, config + ':80/50,2x', {}\n"
        "    own = {'method.refresh_every': 1, 'method.pattern': 'block:4x4'}\n"
        "    yield None, config + ':90/80', own, '73.03 % (table 6)'\n"
    )
    assert main([f"--config={path}:small", f"--workdir={tmp_path}", "--list"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[1] == "80-50+2x/seed-0"
    assert second.split()[1] == "90-80+refresh_every-1+pattern-block-4x4/seed-0"
    assert second.endswith("  # paper: 73.03 % (table 6)")


def test_an_override_that_replaces_a_row_s_own_value_is_told(tmp_path, capsys):
    """The name of the row, and the paper's number beside it, are of the file's value."""
    path = tmp_path / "s.py"
    path.write_text(
        "def get_sweep(variant=''):\n"
        "    config = 'configs/cifar10_small.py:90/80'\n"
        "    for every in (1, 7):\n"
        "        yield f'every-{every}', config, {'method.refresh_every': every}\n"
        "    yield 'other', config, {}\n"
    )
    flags = [f"--config={path}", f"--workdir={tmp_path}", "--list", "--config.steps=30"]
    assert main([*flags, "--config.method.refresh_every=7"]) == 0
    out, err = capsys.readouterr()
    assert out.count("--config.method.refresh_every=7") == 3
    (line,) = err.splitlines()
    assert line.startswith("warning: --config.method.refresh_every=7: ")
    assert "row(s) every-1, whose" in line
    assert main([*flags, "--config.method.forward_density=0.1"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*flags, "--config.method.forward_density=0.05"]) == 0
    assert "row(s) every-1, every-7, other, whose" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--list", "--slurm"])
def test_what_is_listed_can_be_run(tmp_path, capsys, flag):
    assert sweep(tmp_path / "s", flag, "--config.batch_sise=3") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "batch_sise" in err
    assert not (tmp_path / "s").exists()


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
        (None, ["--only=9"], "must be different numbers from 0 to 4"),
        (None, ["--only=1,1"], "must be different numbers from 0 to 4"),
        (None, ["--only=x"], "must be different numbers from 0 to 4"),
        (None, ["--only=\N{SUPERSCRIPT TWO}"], "must be different numbers from 0 to 4"),
        (None, ["--seeds=0"], "must be an integer of at least 1"),
        (None, ["--config.seed=3"], "--config.seed=3: a sweep sets the seeds itself; use --seeds"),
        (None, ["--config.stepz=1"], "no key 'stepz'"),
        (None, ["--slurm", "--jobs=2"], "argument --jobs: not allowed with argument --slurm"),
        (None, ["--workdir=gs://a/b"], "--workdir=gs:/a/b: is an address; must be a path"),
        (None, ["--workdir=/proc/x"], "--workdir=/proc/x: cannot be written"),
        ("x = 1", [], "defines no get_sweep()"),
        ("def get_sweep(): return []", [], "no runs"),
        ("def get_sweep(): return 5", [], "get_sweep() returned 5; must yield (name, config,"),
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
    folder = [] if any("--workdir" in arg for arg in args) else [f"--workdir={tmp_path}/s"]
    assert main([f"--config={path}", *folder, *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "s").exists()


def plans(directory):
    return {path.name: json.loads(path.read_text()) for path in directory.glob("*.sweep.json")}


def overrides(directory):
    (plan,) = plans(directory).values()
    return {row["row"]: row["overrides"] for row in plan["rows"]}


def snapshot(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


RATE = "--config.optimizer.learning_rate=0.05"


def test_results_of_another_command_are_refused_before_the_plan_is_written(tmp_path, capsys):
    """Of the runs of the command, and of another seed of its rows."""
    assert sweep(tmp_path / "s", "--only=1", "--config.checkpoint_every=5") == 0
    before = snapshot(tmp_path / "s")
    for args in (["--only=1"], ["--only=6", "--seeds=2"], []):
        capsys.readouterr()
        assert sweep(tmp_path / "s", RATE, *args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: 80-60: --workdir={tmp_path}/s/80-60/seed-0: belongs to")
        assert "optimizer.learning_rate is 0.1 there and 0.05 here" in line
        assert snapshot(tmp_path / "s") == before


def test_a_plan_changes_where_the_command_runs_something(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.sweep.train", lambda c, d: "finished")
    assert sweep(tmp_path, "--only=5", "--seeds=3", "--config.log_every=2") == 0
    assert set(map(tuple, overrides(tmp_path).values())) == {("steps=10", "log_every=2")}
    assert sweep(tmp_path, "--only=1", RATE) == 0
    changed = overrides(tmp_path)
    assert changed.pop("80-60") == ["steps=10", "optimizer.learning_rate=0.05"]
    assert set(map(tuple, changed.values())) == {("steps=10", "log_every=2")}
    assert plans(tmp_path)["toy_sweep.sweep.json"]["seeds"] == 3


def test_a_row_that_the_file_no_longer_has_stays_with_its_results(tmp_path):
    spoilt = tmp_path / "spoilt" / "seed-0"
    assert sweep(tmp_path, "--only=5", "--config.steps=14", variant=":nan") == 1
    path = tmp_path / "toy_sweep+nan.sweep.json"
    path.rename(tmp_path / "toy_sweep.sweep.json")
    assert (spoilt / "metrics.jsonl").stat().st_size
    assert sweep(tmp_path, "--only=0") == 0
    assert "spoilt" in overrides(tmp_path)
    shutil.rmtree(spoilt)
    assert sweep(tmp_path, "--only=0") == 0
    assert "spoilt" not in overrides(tmp_path)


def test_each_variant_has_a_plan_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.sweep.train", lambda c, d: "finished")
    assert sweep(tmp_path, "--only=0") == sweep(tmp_path, "--only=0", variant=":nan") == 0
    assert {name: plan["config"] for name, plan in plans(tmp_path).items()} == {
        "toy_sweep.sweep.json": SWEEP, "toy_sweep+nan.sweep.json": f"{SWEEP}:nan"
    }  # fmt: skip


def test_runs_that_take_all_devices_are_done_one_by_one(tmp_path, capsys, monkeypatch):
    gpus = [types.SimpleNamespace(platform="gpu")] * 4
    monkeypatch.setattr("experiments.training.partition.all_devices", lambda: gpus)
    assert sweep(tmp_path / "s", "--jobs=2") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --jobs=2: must be 1 on devices of gpu, all of which each run")
    assert not (tmp_path / "s").exists()


WRONG = {
    "pattern": (["method.pattern=block:3x3"], "Block(3, 3) does not divide"),
    "data": (["data.name=image_folder", "data.dir=nowhere"], "no folder train"),
    "batch": (["batch_size=4008"], "must be at most the 4000 images"),
    "mesh": (["mesh.data=3"], "must multiply to the"),
    "kept": (["keep_checkpoints_every=3"], "must be a multiple of checkpoint_every"),
    "backend": (
        ["method.always_sparse=True", "method.pattern=block:2x2", "method.backend=pallas_tpu"],
        "method.backend: found 'pallas_tpu'; must be None or 'xla' or 'native_cpu' on devices of",
    ),
    "tensor": (["mesh.tensor=8"], "mesh.tensor: found 8; must be 1"),
    "best": (
        ["keep_best_checkpoint=max skill", "checkpoint_every=1", "eval_every=1"],
        "must name one of accuracy, loss",
    ),
}


@pytest.mark.parametrize(("wrong", "told"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("jobs", ["--jobs=1", "--jobs=2"])
def test_all_runs_are_checked_before_the_first(tmp_path, capsys, wrong, told, jobs):
    path = tmp_path / "s.py"
    path.write_text("def get_sweep(): yield 'a', 'configs/digits_lenet.py:static-90,smoke', {}")
    flags = [f"--config.{text}" for text in wrong]
    assert main([f"--config={path}", f"--workdir={tmp_path}/s", jobs, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a: ")
    assert told in line
    assert not (tmp_path / "s").exists()
