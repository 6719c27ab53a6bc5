"""Errors a user can cause."""


class UserError(Exception):
    """A user's mistake, told in one line: the thing, what was found and what is allowed."""
