"""One process of several: how it finds the others, and what it says when one of them is lost.

JAX's coordination service, which runs in process 0, ends all processes from within C++ when one of
them is missing. Each process is therefore the child of a process without JAX's runtime, `watch`,
which says in one line what happened and ends with a status of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from unittest import mock

import jax
from jax._src.lib import _jax

from experiments import signals
from experiments.config import command_line
from experiments.errors import UserError
from experiments.records import checkpoints, files, workdir
from experiments.signals import ASK, RESUMABLE

LOST = 76  # the exit status when another process is missing or was lost
HEARTBEAT = 30  # seconds without a sign of life after which a process is lost
_GRACE = 10  # seconds more for the answer that says who is missing
_WATCHED = "TOPKAST_WATCHED"
# With which JAX's coordination service ends a process; or a CPU's collectives, which name nobody.
_FATAL = re.compile(r"F\d{4} [\d:.]+ +\d+ \S+\] |terminate called .*'gloo::")
_NAMED = re.compile(r"(?:stopped sending heartbeats\)|timed out task names):\s*((?:\d+\s+)+)")


_START_TIMEOUT = 300  # seconds


def add_flags(parser: command_line.Parser) -> None:
    """Adds the flags that say which process of how many this is."""
    group = parser.add_argument_group("many hosts")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="one process of several; Cloud TPU, SLURM and GKE say which, else the flags below",
    )
    group.add_argument("--coordinator", help="HOST:PORT of process 0")
    group.add_argument("--processes", type=command_line.positive, help="how many there are")
    group.add_argument("--process", type=command_line.count, help="which this is, from 0")
    group.add_argument(
        "--start_timeout",
        type=command_line.positive,
        help=f"seconds to wait for the others; default: {_START_TIMEOUT}",
    )


def _patience(args: argparse.Namespace) -> int:
    """Seconds to wait for the other processes."""
    return int(args.start_timeout or _START_TIMEOUT)


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError if the flags of `add_flags` are incomplete or contradict each other."""
    given = [args.coordinator, args.processes, args.process]
    if args.start_timeout and not args.distributed:
        raise UserError(f"--start_timeout={args.start_timeout}: needs --distributed")
    if any(value is not None for value in given):
        if not args.distributed:
            raise UserError("--coordinator, --processes, --process: need --distributed")
        if None in given:
            raise UserError("--coordinator, --processes, --process: must be given together")
        if not re.fullmatch(r".+:[0-9]+", args.coordinator):
            raise UserError(f"--coordinator={args.coordinator}: must be HOST:PORT")
        if args.process >= args.processes:
            raise UserError(f"--process={args.process}: must be below --processes={args.processes}")


def watched() -> bool:
    """Whether this process is the child of `watch`."""
    return _WATCHED in os.environ


def watch(argv: Sequence[str], args: argparse.Namespace) -> int:
    """Runs `experiments.main` in a child process.

    SIGTERM, SIGINT and SIGHUP are passed on to the child. The child ends when this process is
    killed.

    Args:
        argv: the command's arguments.
        args: the parsed arguments: the flags of `add_flags`, and `workdir`, whose last step is
            named when a process was lost.

    Returns:
        The exit status of the child; RESUMABLE if a signal ended it before it could answer; or LOST
        if another process of the run is missing or was lost.
    """
    command = [sys.executable, "-m", "experiments.main", *argv]
    # Only the message with which the service ends the process is wanted of what C++ logs.
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", _WATCHED: "1"}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env=environment, text=True, errors="replace",
    )  # fmt: skip
    asked = []

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        asked.append(number)
        child.send_signal(number)

    for number in ASK:
        signal.signal(number, forward)
    assert child.stderr is not None
    with ThreadPoolExecutor(1) as pool:
        fatal = signals.result(pool.submit(_relay, child.stderr))
        status = signals.result(pool.submit(child.wait))
    if fatal and status == -signal.SIGABRT:
        print("error:", _told(fatal, args), file=sys.stderr)
        return LOST
    if status < 0 and asked:  # before the child could answer
        return RESUMABLE
    sys.stderr.write(fatal)
    return status if status >= 0 else 128 - status


def _relay(lines: Iterable[str]) -> str:
    """Writes lines to the standard error; returns those with which the service ends a process."""
    fatal = ""
    for line in lines:
        if fatal or _FATAL.match(line):
            fatal += line
        else:
            sys.stderr.write(line)
            sys.stderr.flush()
    return fatal


def _told(fatal: str, args: argparse.Namespace) -> str:
    named = _NAMED.search(fatal)
    if named:
        lost = f"process {', '.join(named.group(1).split())}"
    elif "gloo::" in fatal:
        lost = f"process {1 - args.process}" if args.processes == 2 else "another process"
    else:
        lost = "process 0"  # in which the service runs
    if "RegisterTask" in fatal:
        return (
            f"--start_timeout={_patience(args)}: {lost} is missing; start every process within "
            "that time"
        )
    step = checkpoints.newest(files.path(args.workdir) / workdir.CHECKPOINTS)
    return (
        f"{lost} was lost; the same command, given to every process, goes on from step {step} in "
        f"{args.workdir}"
    )


@contextlib.contextmanager
def member(args: argparse.Namespace) -> Iterator[None]:
    """A context in which this process is one of several. An exception ends it without the others.

    Raises:
        UserError: the flags do not say which process this is, and nothing else does.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _join(args)
        yield
    except BaseException as error:
        # When leaving as usual, a process waits for the others, which may wait for this one.
        mistake = command_line.in_one_line(error) if isinstance(error, Exception) else None
        if mistake is not None:
            status = command_line.fail(mistake)
        else:
            if isinstance(error, jax.errors.JaxRuntimeError):
                # Of a peer that was lost, this is the first sign; the service knows which.
                time.sleep(HEARTBEAT + _GRACE)
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _join(args: argparse.Namespace) -> None:
    # JAX's client gives up first, and then nobody says which process is missing.
    service = functools.partial(
        _jax.get_distributed_runtime_service, cluster_register_timeout=_patience(args)
    )
    with mock.patch.object(_jax, "get_distributed_runtime_service", service):
        try:
            jax.distributed.initialize(
                args.coordinator,
                args.processes,
                args.process,
                initialization_timeout=_patience(args) + _GRACE,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=2 * HEARTBEAT,
            )
        except ValueError as error:
            raise UserError(
                "--distributed: found no Cloud TPU, SLURM or GKE job; must be given with "
                "--coordinator, --processes and --process"
            ) from error
        except RuntimeError as error:
            raise UserError(f"--distributed: {error}") from error


def _end_with_parent() -> None:
    """The parent holds the other end of the standard input until it ends."""
    os.read(0, 1)  # Not through sys.stdin, whose lock a process at its end would wait for.
    os._exit(1)
