"""The error for mistakes of a user."""


class UserError(Exception):
    """A mistake of a user, in one line that names the thing, what was found and what is allowed."""
