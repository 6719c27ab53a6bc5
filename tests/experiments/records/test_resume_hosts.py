"""Two processes with four devices each do what one with eight does, and go on from each other."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from toy_runs import CACHE, CONFIG, HERE, last_state, records, run, sets

from experiments.hosts import LOST
from experiments.main import main
from experiments.records.checkpoints import newest
from experiments.signals import RESUMABLE

OPTIONS = ("checkpoint_every=5", "eval_every=10", "mesh.fsdp=4")


def start_two_hosts(directory, options, *flags, which=(0, 1)):
    return start(directory, options, *flags, hosts=2, devices=4, which=which)


def start(directory, options, *flags, hosts, devices, which=None, spec=f"{CONFIG}:80/60"):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {k.upper(): str(v) for k, v in CACHE.items()}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    flags = [f"--config={spec}", f"--workdir={directory}", *flags]
    flags += [f"--config.{option}" for option in options]
    flags += ["--distributed", f"--coordinator={address}", f"--processes={hosts}"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.main", f"--process={i}", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=HERE.parents[1],
        )
        for i in (range(hosts) if which is None else which)
    ]


def on_two_hosts(directory, options, *flags):
    return on(directory, options, *flags, hosts=2, devices=4)


def on(directory, options, *flags, hosts, devices, **which):
    processes = start(directory, options, *flags, hosts=hosts, devices=devices, **which)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * hosts, outputs
    return [out for out, _ in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("form", [(), ("method.always_sparse=True", "method.refresh_delay=1")])
def test_two_hosts(tmp_path, form):
    options = (*OPTIONS, *form)
    on_two_hosts(tmp_path / "two", options, "--stop_at=8")
    first, second = on_two_hosts(tmp_path / "two", options)
    assert "step 20/20  train" in first
    assert "step 20" not in second
    run(tmp_path / "one", "80/60", *options)
    left, right = records(tmp_path / "one"), records(tmp_path / "two")
    assert [(r["step"], r["split"]) for r in left] == [(r["step"], r["split"]) for r in right]
    for one, two in zip(left, right, strict=True):
        numbers = [k for k in one if isinstance(one[k], float)]
        np.testing.assert_allclose([one[k] for k in numbers], [two[k] for k in numbers], atol=1e-5)
    states = [last_state(tmp_path / name, "80/60", *options)[0] for name in ("one", "two")]
    found = [s.reservoir.sets if form else sets(s) for s in states]
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, two)


ENDLESS = ("steps=1000000", "log_every=100000", "checkpoint_every=20")


def start_and_save(directory):
    """Two processes that have saved their first checkpoint and go on."""
    processes = start_two_hosts(directory, ENDLESS)
    manifest = directory / "checkpoints" / "20" / "MANIFEST.json"
    for _ in range(3000):
        if manifest.exists() or any(process.poll() is not None for process in processes):
            break
        time.sleep(0.1)
    return processes


def ends(processes):
    """The exit statuses, what was printed, and the lines of mistakes without what is only told."""
    outputs = [process.communicate(timeout=120) for process in processes]
    told = "WARNING:topkast_jax:no rules given"
    errors = [
        [line for line in err.splitlines() if not line.startswith(told)] for _, err in outputs
    ]
    return [process.returncode for process in processes], [out for out, _ in outputs], errors


@pytest.mark.slow
@pytest.mark.parametrize("form", [(), ("method.always_sparse=True",)], ids=["masked", "compact"])
def test_a_run_goes_on_on_other_hosts_and_devices(tmp_path, form):
    """From 2 x 4 over 1 x 8, 1 x 4 and 1 x 1 back to 2 x 4, against 1 x 8 from end to end."""
    options = ("log_every=1", "checkpoint_every=100", *form)
    stages = ((2, 4, 5), (1, 8, 9), (1, 4, 13), (1, 1, 16), (2, 4, 20))
    for hosts, devices, end in stages:
        directory = tmp_path / "moved"
        on(directory, options, f"--stop_at={end}", hosts=hosts, devices=devices)
    run(tmp_path / "one", "80/60", *options)
    left, right = records(tmp_path / "one"), records(tmp_path / "moved")
    assert [(r["step"], r["split"]) for r in left] == [(r["step"], r["split"]) for r in right]
    for one, other in zip(left, right, strict=True):
        assert one.get("loss") == pytest.approx(other.get("loss"), abs=1e-5)
    states = [last_state(tmp_path / name, "80/60", *options)[0] for name in ("one", "moved")]
    found = [s.reservoir.sets if form else sets(s) for s in states]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_of_two_hosts_is_asked_to_stop(tmp_path, number):
    """Both stop after the same step, with a checkpoint, and go on from it."""
    processes = start_and_save(tmp_path / "run")
    processes[1].send_signal(number)
    statuses, outputs, errors = ends(processes)
    assert statuses == [RESUMABLE, RESUMABLE], errors
    assert all("the same command goes on" in out for out in outputs), outputs
    assert errors == [[], []]
    state, position = last_state(tmp_path / "run", "80/60", *ENDLESS)
    assert position == {"position": int(state.step)}
    assert int(state.step) >= 20
    on_two_hosts(tmp_path / "run", ENDLESS, f"--stop_at={int(state.step) + 3}")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_one_of_two_hosts_is_lost(tmp_path, lost):
    """The other ends within a minute and says which one, and from where the run goes on."""
    processes = start_and_save(tmp_path / "run")
    processes[lost].kill()
    began = time.monotonic()
    statuses, _, errors = ends([processes[1 - lost]])
    assert time.monotonic() - began < 60
    assert statuses == [LOST], errors
    step = newest(tmp_path / "run" / "checkpoints")
    assert step >= 20
    (line,) = errors[0]
    assert line == (
        f"error: process {lost} was lost; the same command, given to every process, goes on from "
        f"step {step} in {tmp_path}/run"
    )
    processes[lost].communicate()
    on_two_hosts(tmp_path / "run", ENDLESS, f"--stop_at={step + 3}")


@pytest.mark.slow
@pytest.mark.parametrize("missing", [0, 1])
def test_one_of_two_hosts_does_not_come(tmp_path, missing):
    flags, which = ("--start_timeout=5",), [1 - missing]
    statuses, _, errors = ends(start_two_hosts(tmp_path / "run", (), *flags, which=which))
    assert statuses == [LOST], errors
    (line,) = errors[0]
    assert line == (
        f"error: --start_timeout=5: process {missing} is missing; start every process within that "
        "time"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mistake_ends_both_hosts(tmp_path):
    statuses, _, errors = ends(start_two_hosts(tmp_path / "run", ("batch_size=9",)))
    assert statuses[0] == 2, errors
    assert statuses[1] in (2, LOST), errors  # Process 0 may be gone before it sees the mistake.
    for (line,) in errors:
        assert line.startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--process=0"], "--process: need --distributed"),
        (["--distributed", "--process=0"], "must be given together"),
        (["--distributed", "--coordinator=here", "--processes=2", "--process=0"], "be HOST:PORT"),
        (["--distributed", "--coordinator=a:1", "--processes=2", "--process=2"], "be below --proc"),
        (["--start_timeout=0"], "--start_timeout: found '0'; must be an integer of at least 1"),
    ],
)
def test_flags_that_do_not_say_which_process(tmp_path, capsys, flags, told):
    assert main([f"--config={CONFIG}", f"--workdir={tmp_path}/run", *flags]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
