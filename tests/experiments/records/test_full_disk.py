"""A disk that is full ends a command in one line, and what was good before stays."""

import resource
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from toy_runs import CONFIG, last_state, records, run

from experiments import convert
from experiments.main import main


@pytest.fixture
def small_files():
    """No file can grow above the size that the test asks for: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def command(directory, *options):
    flags = [f"--config={CONFIG}:80/60", f"--workdir={directory}"]
    return [*flags, *(f"--config.{option}" for option in options)]


FORMS = {
    "masked": [],
    "always_sparse": ["method.always_sparse=True"],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint(tmp_path, capfd, small_files, form):
    """The error is that of the operating system, met by Orbax's own writer in the background."""
    options = ["checkpoint_every=5", "log_every=1000", *FORMS[form]]
    run(tmp_path / "run", "80/60", *options, stop_at=5)
    good = tmp_path / "run" / "checkpoints" / "5"
    before = contents(good)
    capfd.readouterr()
    small_files(3000)
    assert main(command(tmp_path / "run", *options)) == 2
    small_files(resource.RLIM_INFINITY)
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"error: {tmp_path}/run/checkpoints: the checkpoint of step 10 cannot be written: File too "
        "large; the last good checkpoint, of step 5, is kept"
    )
    assert contents(good) == before
    assert not (tmp_path / "run" / "final.json").exists()
    assert int(last_state(tmp_path / "run", "80/60", *options)[0].step) == 5


OTHERS = {
    "records": (["log_every=1"], 4000),
    "sets": (["write_sets_every=4", "log_every=1000", "model.hidden=500"], 2000),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_else_a_run_writes(tmp_path, capfd, small_files, what):
    options, size = OTHERS[what]
    directory = tmp_path / "run"
    assert main([*command(directory, *options), "--stop_at=2"]) == 0
    before = contents(directory / "checkpoints")
    capfd.readouterr()
    small_files(size)
    assert main(command(directory, *options)) == 2
    small_files(resource.RLIM_INFINITY)
    (line,) = capfd.readouterr().err.splitlines()
    step = len(records(directory)) // 2 + 1 if what == "records" else 4
    assert line == (
        f"error: {directory}: cannot be written after step {step}: File too large; the last good "
        "checkpoint, of step 2, is kept"
    )
    assert contents(directory / "checkpoints") == before


def test_a_conversion(tmp_path, capfd, small_files):
    run(tmp_path / "run", "80/60", "method.inner_state=reset", stop_at=2)
    before = contents(tmp_path)
    capfd.readouterr()
    small_files(3000)
    flags = [f"--workdir={tmp_path}/run", f"--out={tmp_path}/new", "--to=always_sparse"]
    assert convert.main(flags) == 2
    small_files(resource.RLIM_INFINITY)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/new/checkpoints: the checkpoint of step 2 cannot be")
    assert contents(tmp_path) == before


def test_tensorboard_has_the_records(tmp_path):
    run(tmp_path / "run", "80/60", stop_at=10)
    run(tmp_path / "run", "80/60", stop_at=20)
    events = []
    for path in sorted((tmp_path / "run" / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    assert sorted(starts) == [1, 11]
    found = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    expected = {
        (r["step"], f"{r['split']}/{key}"): pytest.approx(value, rel=1e-6)
        for r in records(tmp_path / "run")
        for key, value in r.items()
        if isinstance(value, float)
    }
    assert len(expected) > 20
    assert {key: value for key, value in found.items() if key in expected} == expected
