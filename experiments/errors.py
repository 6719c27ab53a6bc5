"""What a user is told: mistakes, and warnings."""

import sys


class UserError(Exception):
    """A mistake of a user, in one line that names the thing, what was found and what is allowed."""


def warn(line: str) -> None:
    """Prints a warning."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
