"""Tables of what a config can name; code outside the project can be named by its import path."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, cast

from experiments.errors import UserError

T = TypeVar("T")
# A condition on what an import path leads to, and the words for it that complete "must be …".
Kind = tuple[Callable[[Any], bool], str]


class Registry(Generic[T]):
    """What one key of the config can name.

    A name is one of the table's, or an import path `package.module:attribute`. An import path needs
    no registration, so that a run can also be resumed, exported and reported by other commands.
    """

    def __init__(self, key: str, entries: Mapping[str, T], kind: Kind):
        """Starts with some entries.

        Args:
            key: the key of the config, for error messages.
            entries: the entries by name.
            kind: what an import path must lead to.
        """
        self._key, self._entries, self._kind = key, dict(entries), kind

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
            UserError: there is none, or it is of another kind.
        """
        if name in self._entries:
            return self._entries[name]
        if re.fullmatch(r"\w+(\.\w+)*:\w+", name):
            found = import_path(self._key, name)
            fits, rule = self._kind
            if not fits(found):
                raise UserError(
                    f"{self._key}: found {name!r}, a {type(found).__name__}; must be {rule}"
                )
            return cast(T, found)
        raise UserError(
            f"{self._key}: found {name!r}; must be one of {', '.join(self._entries)}, or an import "
            "path package.module:name"
        )


def function_of(*arguments: str) -> Kind:
    """A function that can be called with these arguments, by position."""

    def fits(value: Any) -> bool:
        try:
            inspect.signature(value).bind(*arguments)
        except ValueError:  # Some functions that are written in C do not tell what they take.
            return callable(value)
        except TypeError:
            return False
        return True

    return fits, f"a function of ({', '.join(arguments)})"


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
