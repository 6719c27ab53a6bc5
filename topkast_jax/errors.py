"""Errors a user can cause."""

from typing import Any


class SparsityError(ValueError):
    """A user's mistake, told in one line: the thing, what was found and what is allowed."""


def shown(value: Any, most: int = 80) -> str:
    """The repr of a value on one line, for a message: an array's has many."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[:most]}, …"
