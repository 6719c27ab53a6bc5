"""Checks of single values of a config."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.errors import UserError

# A condition, and the words for it that complete "must be …".
Check = tuple[Callable[[Any], bool], str]


def number(low: float, high: float = 3.4e38, *, above: bool = False, below: bool = False) -> Check:
    """A number between two bounds; `above` and `below` leave out the bound itself.

    Without another bound it is one that float32 holds.
    """

    def fits(v: Any) -> bool:
        real = isinstance(v, numbers.Real) and not isinstance(v, bool)
        return real and (low < v if above else low <= v) and (v < high if below else v <= high)

    text = f"a number {'above' if above else 'of at least'} {low:g}"
    return fits, f"{text} and {'below' if below else 'at most'} {high:g}"


def integer(low: int, below: int = 2**31) -> Check:
    """An integer between two bounds."""
    power = below.bit_length() - 1
    bound = f"below 2**{power}" if below == 2**power else f"at most {below - 1}"
    return (
        lambda v: type(v) is int and low <= v < below
    ), f"an integer of at least {low} and {bound}"


def optional(check: Check) -> Check:
    """None, or what passes another check."""
    return (lambda v: v is None or check[0](v)), f"None or {check[1]}"


def one_of(*allowed: Any) -> Check:
    """One of some values."""
    return (lambda v: v in allowed), "one of " + ", ".join(map(repr, allowed))


def check_values(section: Any, checks: Mapping[str, Check], prefix: str = "config") -> None:
    """Checks the values that are there.

    Args:
        section: a config or a section of it.
        checks: by key, with dots between the levels.
        prefix: how the section is called in the error message.

    Raises:
        UserError: a value does not pass.
    """
    for key, (fits, rule) in checks.items():
        *parents, last = key.split(".")
        parent = section
        for name in parents:
            parent = parent.get(name, {})
        if last in parent and not fits(parent[last]):
            raise UserError(f"{prefix}.{key}: found {parent[last]!r}; must be {rule}")


def check_unread(data: Any, reads: Mapping[str, Sequence[str]], keys: Sequence[str]) -> None:
    """Checks that the data set reads each of the keys that is set.

    Args:
        data: the section `data`.
        reads: the keys that data sets read, by name; one that is not there may read all.
        keys: the keys to check.

    Raises:
        UserError: a key has a value, and nothing reads it.
    """
    for key in keys:
        if data.get(key) and key not in reads.get(data.name, keys):
            raise UserError(
                f"config.data.{key}: found {data[key]!r}; must be empty, {data.name} does not read "
                "it"
            )
