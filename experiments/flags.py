"""Command lines: every mistake is one line and status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from experiments.errors import UserError

_OVERRIDE = "--config."


class Parser(argparse.ArgumentParser):
    """A parser that raises instead of printing its usage."""

    def __init__(self, **options: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see --help")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The parser's flags, and the overrides `--config.KEY=VALUE` as `KEY=VALUE`."""
    overrides = [arg.removeprefix(_OVERRIDE) for arg in argv if arg.startswith(_OVERRIDE)]
    return parser.parse_args([arg for arg in argv if not arg.startswith(_OVERRIDE)]), overrides


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; must be an integer of at least 1")
    return int(text)


def fail(error: Exception) -> int:
    """Prints a user's mistake as one line; returns the exit status."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return 2
