"""Messages to the user: mistakes and warnings."""

import errno
import sys

# What the operating system says of a full disk, a full quota and a file that may not grow.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """A mistake of a user, in one line that names the thing, what was found and what is allowed."""


class VariantError(UserError):
    """A variant that a config file or a sweep file does not have; `load` adds which file it is."""


def warn(line: str) -> None:
    """Prints a warning."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
