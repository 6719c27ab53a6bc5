"""Tables of what a config can name; code outside the project can be named by its import path."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

from experiments.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """What one key of the config can name.

    A name is one of the table's, or an import path `package.module:attribute`. An import path needs
    no registration, so that a run can also be resumed, exported and reported by other commands.
    """

    def __init__(self, key: str, entries: Mapping[str, T]):
        """Starts with some entries; the key of the config is for error messages."""
        self._key, self._entries = key, dict(entries)

    def register(self, name: str, entry: T) -> None:
        """Adds an entry under a new name.

        Raises:
            UserError: another entry has the name.
        """
        if self._entries.setdefault(name, entry) is not entry:
            raise UserError(f"{self._key}: {name!r} is registered already")

    def names(self) -> list[str]:
        """The names in the table, in the order in which they were added."""
        return list(self._entries)

    def get(self, name: str) -> T:
        """The entry of that name, or what the import path leads to.

        Raises:
            UserError: there is none.
        """
        if name in self._entries:
            return self._entries[name]
        if re.fullmatch(r"\w+(\.\w+)*:\w+", name):
            return cast(T, import_path(self._key, name))
        raise UserError(
            f"{self._key}: found {name!r}; must be one of {', '.join(self._entries)}, or an import "
            "path package.module:name"
        )


def import_path(key: str, path: str) -> Any:
    """Imports `package.module:attribute`; an error inside that module keeps its traceback.

    Raises:
        UserError: there is no such module, or it has no such attribute; the message names the key.
    """
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{key}: found {path!r}; there is no module {error.name!r}") from None
    if not hasattr(found, attribute):
        raise UserError(f"{key}: found {path!r}; {module} has no {attribute!r}")
    return getattr(found, attribute)
