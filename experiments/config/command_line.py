"""Command lines. A user's mistake is printed as one line, and the exit status is 2."""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import os
import re
import select
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, Protocol

from experiments.errors import FULL, UserError
from experiments.training.partition import all_devices
from topkast_jax.errors import SparsityError

_OVERRIDE = "--config."
# What any use of a path can meet: a name that no file system takes, and a full disk.
_ANYWHERE = (errno.ENAMETOOLONG, *FULL)
INTERRUPTED = 130  # as a shell has it: 128 and the number of SIGINT
UNREAD = 141  # 128 and the number of SIGPIPE
_EXHAUSTED = "RESOURCE_EXHAUSTED: "  # as JAX names it
_LONGEST = 2000  # characters of a refusal: it holds what was found, of whatever length


class Parser(argparse.ArgumentParser):
    """A parser that raises UserError instead of printing its usage."""

    def __init__(self, **options: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses the flags; one that is given twice is a mistake."""
        flags = [arg.partition("=")[0] for arg in args or () if arg.startswith("--")]
        for flag in flags:
            if flags.count(flag) > 1:
                self.error(f"argument {flag}: found {flags.count(flag)} times; must be given once")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see --help")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses the flags, and returns the overrides `--config.KEY=VALUE` as `KEY=VALUE`."""
    overrides = [arg.removeprefix(_OVERRIDE) for arg in argv if arg.startswith(_OVERRIDE)]
    keys = [text.partition("=")[0] for text in overrides]
    for text in overrides:
        if "=" not in text:
            flag = f"{_OVERRIDE}{text}"
            raise UserError(f"{flag}: no value; expected {flag}=VALUE")
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{_OVERRIDE}{key}: found {keys.count(key)} times; must be given once")
    return parser.parse_args([arg for arg in argv if not arg.startswith(_OVERRIDE)]), overrides


class Main(Protocol):
    """A command, from its arguments to its exit status; None stands for the process's own."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Runs the command; returns the exit status."""
        ...


def command(body: Callable[[list[str]], int | None]) -> Main:
    """Turns the body of a command into its `main(argv=None)`, which returns the exit status.

    The body may return a status of its own. Its UserError or SparsityError is printed by `fail`,
    and so is what can happen anywhere: a path that is too long or that the user has no permission
    for, a full disk, memory that runs out, and devices that JAX_PLATFORMS names and that are
    absent. An interrupt from the keyboard is one line and `INTERRUPTED`. A command whose output
    goes to one that has ended, such as `head`, ends with `UNREAD`. All other exceptions keep their
    traceback.
    """

    @functools.wraps(body)
    def main(argv: Sequence[str] | None = None) -> int:
        # Orbax logs the traceback of an error in its threads, which is raised here as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        sys.unraisablehook = _without_orbax
        try:
            status = body(list(sys.argv[1:] if argv is None else argv)) or 0
            sys.stdout.flush()
            return status
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                return UNREAD
            if (mistake := in_one_line(error)) is None:
                raise
            return fail(mistake)
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            return INTERRUPTED

    return main


def in_one_line(error: Exception) -> UserError | SparsityError | None:
    """What a user is told of an error: in one line, or None where its traceback is kept."""
    if isinstance(error, UserError | SparsityError):
        return error
    if isinstance(error, OSError):
        forbidden = error.errno in (errno.EACCES, errno.EPERM) and error.filename is not None
        known = forbidden or error.errno in _ANYWHERE
        return UserError(f"{error.filename or 'a file'}: {error.strerror}") if known else None
    said = str(error).partition("\n")[0].rstrip(".")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _EXHAUSTED in said):
        said = said.rpartition(_EXHAUSTED)[2] or "Python says no more"
        return UserError(
            f"out of memory: {said}; needs a smaller model or batch, or more memory or devices"
        )
    if isinstance(error, RuntimeError | AssertionError):  # as of JAX where there is no such device
        try:
            all_devices()
        except UserError as absent:
            return absent
    return None


def _nobody_reads() -> bool:
    """Whether the pipe that stdout goes to is closed; if so, Python's last flush is spared."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(number, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return closed


def _without_orbax(unraisable: Any) -> None:
    """Python's own hook, but for what Orbax leaves behind when a save or a restore has failed.

    It no longer waits for the reads and writes that were under way: TensorStore tells their ends to
    an event loop that is closed, and their coroutines, of which there are no others here, are left
    to the garbage collector.
    """
    left = str(unraisable.exc_value) == "Event loop is closed"
    if not left and not isinstance(unraisable.object, types.CoroutineType):
        sys.__unraisablehook__(unraisable)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; must be an integer of at least 1")
    return int(text)


def shape(text: str) -> tuple[int, int]:
    """The inputs and outputs of a matrix, of at least 1 each, like 1024x3072."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"found {text!r}; must be a shape such as 1024x3072")
    return int(found[1]), int(found[2])


def count(text: str) -> int:
    """An integer of at least 0."""
    if not re.fullmatch("[0-9]+", text):
        raise argparse.ArgumentTypeError(f"found {text!r}; must be an integer of at least 0")
    return int(text)


def steps(text: str) -> tuple[int, int]:
    """Two numbers START:STOP, the first and the last of some steps."""
    found = re.fullmatch("([0-9]+):([0-9]+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(
            f"found {text!r}; must be START:STOP, the first and the last step, from 1 on"
        )
    return int(found[1]), int(found[2])


def path(text: str) -> str:
    """A path; an unset shell variable leaves it empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"found {text!r}; must be a path")
    return at_home(text)


def at_home(text: str) -> str:
    """A path that may be empty. A shell leaves the `~` of `--flag=~/folder` to the command."""
    found = os.path.expanduser(text)
    if found.startswith("~"):
        raise argparse.ArgumentTypeError(f"found {text!r}; there is no such home folder")
    return found


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of a flag that takes a comma list of some of the names."""
    allowed = list(names)

    def read(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(allowed):
            raise argparse.ArgumentTypeError(
                f"found {text!r}; must be a comma list of {', '.join(allowed)}"
            )
        return found

    return read


def fail(error: Exception) -> int:
    """Prints a user's mistake as one line; returns the exit status."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    print("error:", text, file=sys.stderr)
    return 2
