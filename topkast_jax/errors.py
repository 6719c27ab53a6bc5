"""Errors a user can cause."""


class SparsityError(ValueError):
    """A user's mistake, told in one line: the thing, what was found and what is allowed."""
