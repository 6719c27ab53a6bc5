"""What every command does with the mistakes and interrupts that its body raises."""

import argparse
import errno
import os
import subprocess
import sys
import types

import jax
import pytest

from experiments import export, hosts, main, report, sweep
from experiments.config import command_line
from experiments.errors import UserError

LONG = "x" * 300
COMMANDS = {
    "main": (main.main, ["--config=configs/quickstart.py", f"--workdir={{}}/{LONG}"]),
    "config": (main.main, [f"--config={LONG}.py", "--workdir={}/run"]),
    "data": (
        main.main,
        ["--config=configs/cifar10_small.py", "--describe", "--config.data.name=image_folder",
         f"--config.data.dir={{}}/{LONG}"],
    ),
    "report": (report.main, [f"{{}}/{LONG}", "--out={}/out"]),
    "export": (export.main, [f"--workdir={{}}/{LONG}", "--out={}/o.npz"]),
    "sweep": (
        sweep.main, ["--config=configs/sweeps/quickstart.py", f"--workdir={{}}/{LONG}"]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("command", "flags"), COMMANDS.values(), ids=COMMANDS)
def test_a_name_that_is_too_long_is_one_line(command, flags, tmp_path, capsys):
    assert command([flag.format(tmp_path) for flag in flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "File name too long" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/run"),
            2,
            "error: /disk/run: No space",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/root/run"),
            2,
            "error: /root/run: Permission denied",
        ),
        (MemoryError("Unable to allocate 2 TiB."), 2, "error: out of memory: Unable to allocate 2"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n…"),
            2,
            "error: out of memory: Out of memory allocating 9 bytes; needs a smaller model or",
        ),
    ],
)
def test_what_can_happen_anywhere_is_one_line(error, status, told, capsys):
    @command_line.command
    def command(argv):
        raise error

    assert command([]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "a bug"), RuntimeError("one")])
def test_other_errors_keep_their_traceback(error):
    @command_line.command
    def command(argv):
        raise error

    with pytest.raises(type(error)):
        command([])


def test_what_orbax_leaves_to_the_garbage_collector_is_not_shown(capsys):
    """Of a restore that failed, thousands of lines; anything else is shown as Python shows it."""

    async def read():
        pass

    left = read()
    found = {"exc_type": ValueError, "exc_value": ValueError("x"), "exc_traceback": None}
    try:
        command_line._without_orbax(types.SimpleNamespace(**found, err_msg=None, object=left))
        assert capsys.readouterr().err == ""
    finally:
        left.close()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "__unraisablehook__", seen.append)
        other = types.SimpleNamespace(**found, err_msg=None, object=print)
        command_line._without_orbax(other)
    assert seen == [other]


def test_a_closed_pipe_ends_a_command_without_a_traceback(tmp_path):
    flags = ["--config=configs/sweeps/quickstart.py", f"--workdir={tmp_path}/runs", "--list"]
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as command:
        command.stdout.close()
        assert command.stderr.read() == b""
    assert command.returncode == 141


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("a mistake"), "error: a mistake"),
        (MemoryError("2 TiB"), "error: out of memory: 2"),
    ],
)
def test_what_ends_one_process_of_several_is_one_line(error, told, capsys, monkeypatch):
    ended = []
    monkeypatch.setattr(hosts, "_join", lambda args: None)
    monkeypatch.setattr(hosts, "_end_with_parent", lambda: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    with hosts.member(argparse.Namespace()):
        raise error
    assert ended == [2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)
