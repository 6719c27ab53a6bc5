"""N steps equal k, a restart, and N - k, to the bit."""

import signal
import subprocess
import sys
import time

import pytest
from processes import one_device
from toy import TrainData
from toy_runs import CACHE, CONFIG, assert_same, last_state, records, run

from experiments.records import workdir
from experiments.signals import RESUMABLE

ADAM = ("optimizer.name=adamw", "optimizer.weight_decay=1e-2", "method.stop_exploring_at=11")
EVERY = ("eval_every=4", "checkpoint_every=6", "log_every=5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert run(directory, "80/60", *EVERY) == "finished"
    return directory


def assert_equal_runs(one, other, *overrides):
    left, right = (last_state(d, "80/60", *overrides) for d in (one, other))
    assert int(left[0].step) == int(right[0].step) == 20
    assert left[1] == right[1] == {"position": 20}
    assert_same(left[0], right[0])
    assert records(one) == records(other)
    finals = [workdir.read_json(d / workdir.FINAL) for d in (one, other)]
    for key in ("densities", "densities_over_run", "flops"):
        assert finals[0][key] == finals[1][key]


@pytest.mark.parametrize("stop_at", [6, 7, pytest.param(10, marks=pytest.mark.slow)])
def test_stopped_and_continued(tmp_path, whole, stop_at):
    assert run(tmp_path / "run", "80/60", *EVERY, stop_at=stop_at) == "stopped"
    state, position = last_state(tmp_path / "run", "80/60", *EVERY)
    assert int(state.step) == stop_at
    assert position == {"position": stop_at}
    assert run(tmp_path / "run", "80/60", *EVERY) == "finished"
    assert_equal_runs(whole, tmp_path / "run", *EVERY)


def test_crashed_after_the_checkpoint(tmp_path, whole, monkeypatch):
    """Records of steps that were lost are dropped, and so is a line that was cut off."""

    def crash(self):
        if self.position == 17:
            raise RuntimeError("power cut")
        return read(self)

    read = TrainData.__next__
    monkeypatch.setattr(TrainData, "__next__", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "run", "80/60", *EVERY)
    monkeypatch.undo()
    assert records(tmp_path / "run")[-1]["step"] > 12
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 16, "spl')
    assert run(tmp_path / "run", "80/60", *EVERY) == "finished"
    assert_equal_runs(whole, tmp_path / "run", *EVERY)


def test_records_after_an_unreadable_line_are_kept(tmp_path, whole, capsys):
    directory = tmp_path / "run"
    run(directory, "80/60", *EVERY, stop_at=10)
    file = directory / "metrics.jsonl"
    first, *rest = file.read_bytes().splitlines(keepends=True)
    assert len(rest) > 2
    file.write_bytes(first + b'{"step": 7, "spl\xff\n[7]\n{"split": "train"}\n' + b"".join(rest))
    assert run(directory, "80/60", *EVERY) == "finished"
    assert_equal_runs(whole, directory, *EVERY)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "no record" in line]
    assert [w.partition("metrics.jsonl, ")[2].partition(":")[0] for w in warnings] == (
        ["line 2", "line 3", "line 4"]
    )
    kept = (directory / "metrics.jsonl.damaged.10").read_bytes()
    assert kept.startswith(first + b'{"step": 7, "spl\xff\n')


def test_records_that_are_gone_are_told(tmp_path, capsys):
    run(tmp_path / "run", "80/60", *EVERY, stop_at=6)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert run(tmp_path / "run", "80/60", *EVERY, stop_at=7) == "stopped"
    told = capsys.readouterr().err
    assert "metrics.jsonl: holds no record of the 6 steps that are finished" in told


def test_other_optimizer(tmp_path):
    overrides = (*EVERY, *ADAM)
    run(tmp_path / "whole", "80/60", *overrides)
    run(tmp_path / "parts", "80/60", *overrides, stop_at=9)
    run(tmp_path / "parts", "80/60", *overrides, stop_at=13)
    run(tmp_path / "parts", "80/60", *overrides)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts", *overrides)


def test_another_mesh_may_go_on(tmp_path, whole):
    run(tmp_path / "run", "80/60", *EVERY, stop_at=9)
    assert run(tmp_path / "run", "80/60", *EVERY, "mesh.fsdp=4") == "finished"
    one, other = records(whole)[-1], records(tmp_path / "run")[-1]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, RESUMABLE), pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow)],
)
def test_signals(tmp_path, number, status):
    """A process that is asked to end leaves a checkpoint; one that is killed, its last one."""
    command = [sys.executable, "-m", "experiments.main", f"--config={CONFIG}:80/60"]
    command += [f"--workdir={tmp_path}/run", "--config.steps=1000000", "--config.log_every=100"]
    command += ["--config.checkpoint_every=100"]
    environment = one_device() | {k.upper(): str(v) for k, v in CACHE.items()}
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    manifest = tmp_path / "run" / "checkpoints" / "100" / "MANIFEST.json"
    for _ in range(600):
        if manifest.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(number)
    text = (tmp_path / "output").read_text()
    assert process.wait(60) == status, text
    more = ("steps=1000000", "log_every=100", "checkpoint_every=100")
    state, position = last_state(tmp_path / "run", "80/60", *more)
    assert position == {"position": int(state.step)}
    text = (tmp_path / "output").read_text()
    assert ("stopped by a signal; the same command goes on" in text) == (status == RESUMABLE)
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("build", signal.SIGTERM),
        ("_train_from", signal.SIGINT),
        ("Session.finish", signal.SIGTERM),
        pytest.param("build", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("_train_from", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("Session.finish", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_signals_without_a_step_under_way(tmp_path, whole, monkeypatch, number, moment):
    """They end the call at once, and the next one goes on."""

    def asked(*_):
        signal.raise_signal(number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(f"experiments.loop.{moment}", asked)
        assert run(tmp_path / "run", "80/60", *EVERY) == "interrupted"
    assert signal.getsignal(number) is before
    assert run(tmp_path / "run", "80/60", *EVERY) == "finished"
    assert_equal_runs(whole, tmp_path / "run", *EVERY)


def test_a_signal_in_a_callback_is_not_swallowed():
    """What is raised while Python collects garbage goes nowhere, and neither does the signal."""
    program = """
import gc, signal
from experiments.training.stopping import StopRequest
def ask(phase, info):
    signal.raise_signal(signal.SIGTERM)
with StopRequest():
    gc.callbacks.append(ask)
    gc.collect()
    print("went on")
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (RESUMABLE, "")
    assert found.stdout == "stopped by SIGTERM; the same command goes on\n"
