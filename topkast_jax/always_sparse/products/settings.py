"""The settings of a kernel: integers with the values that each may take."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Self

from topkast_jax.errors import SparsityError


def choice(default: int, allowed: Collection[int], tried: Collection[int]) -> Any:
    """A field of `Settings`.

    Args:
      default: what is used without a tuned table.
      allowed: all values with which the kernel is right for every shape that it takes.
      tried: those that are worth timing.
    """
    return dataclasses.field(default=default, metadata={"allowed": allowed, "tried": tried})


def powers(first: int, last: int) -> tuple[int, ...]:
    """The powers of 2 from `first` to `last`, both of them powers of 2."""
    return tuple(1 << n for n in range(first.bit_length() - 1, last.bit_length()))


@dataclasses.dataclass(frozen=True)
class Settings:
    """The base of each kernel's settings; every field is made by `choice`.

    No allowed value changes a result by more than the order of its sums. Some may ask for more
    than a device has (shared memory, VMEM): its compiler then refuses the kernel.

    Raises:
      SparsityError: the value of a field is not allowed.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), field.metadata["allowed"]
            if type(value) is not int or value not in allowed:
                raise SparsityError(f"{field.name}: found {value!r}; must be {_said(allowed)}")

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """The settings with these fields; the others have their defaults.

        Raises:
          SparsityError: there is no such field, or its value is not allowed.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in found:
            if name not in names:
                raise SparsityError(f"{name}: no such setting; must be one of {', '.join(names)}")
        return cls(**found)

    def varied(self, name: str) -> list[Self]:
        """These settings with field `name` changed to each other value worth timing."""
        (field,) = (field for field in dataclasses.fields(self) if field.name == name)
        values = (value for value in field.metadata["tried"] if value != getattr(self, name))
        return [dataclasses.replace(self, **{name: value}) for value in values]


def _said(allowed: Collection[int]) -> str:
    if isinstance(allowed, range):
        of = f" in steps of {allowed.step}" if allowed.step > 1 else ""
        return f"an integer from {allowed[0]} to {allowed[-1]}{of}"
    return f"one of {', '.join(map(str, allowed))}"
