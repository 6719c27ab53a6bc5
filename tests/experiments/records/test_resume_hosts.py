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

OPTIONS = ("checkpoint_every=5", "eval_every=10", "mesh.fsdp=4")
PROGRAM = """
import sys, jax
jax.distributed.initialize(f"localhost:{sys.argv[2]}", int(sys.argv[3]), int(sys.argv[1]))
from experiments.main import main
sys.exit(main(sys.argv[4:]))
"""


def start_two_hosts(directory, options, *flags):
    return start(directory, options, *flags, hosts=2, devices=4)


def start(directory, options, *flags, hosts, devices):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {k.upper(): str(v) for k, v in CACHE.items()}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    flags = [f"--config={CONFIG}:80/60", f"--workdir={directory}", *flags]
    flags += [f"--config.{option}" for option in options]
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), port, str(hosts), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=HERE.parents[1],
        )
        for i in range(hosts)
    ]


def on_two_hosts(directory, options, *flags):
    return on(directory, options, *flags, hosts=2, devices=4)


def on(directory, options, *flags, hosts, devices):
    processes = start(directory, options, *flags, hosts=hosts, devices=devices)
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
    options = ("steps=1000000", "log_every=100000", "checkpoint_every=20")
    processes = start_two_hosts(tmp_path / "run", options)
    manifest = tmp_path / "run" / "checkpoints" / "20" / "MANIFEST.json"
    for _ in range(1200):
        if manifest.exists() or any(process.poll() is not None for process in processes):
            break
        time.sleep(0.1)
    processes[1].send_signal(number)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all("stopped with a checkpoint" in out for out, _ in outputs), outputs
    state, position = last_state(tmp_path / "run", "80/60", *options)
    assert position == {"position": int(state.step)}
    assert int(state.step) >= 20
    on_two_hosts(tmp_path / "run", options, f"--stop_at={int(state.step) + 3}")
