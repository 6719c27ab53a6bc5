"""Errors a user can cause."""

from typing import Any


class SparsityError(ValueError):
    """A user's mistake, in one line that names the thing, what was found and what is allowed."""


def shown(value: Any, most: int = 80) -> str:
    """The repr of a value on one line, for a message.

    Args:
      value: any object; an array's repr has many lines.
      most: characters after which the text is cut and ends in ", …".
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[:most]}, …"
