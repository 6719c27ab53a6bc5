"""Tables of settings as JSON files.

A table is an object with the list "entries", each an object with exactly

    device, backend, product   for example "NVIDIA H200", "pallas_gpu", and one of `PRODUCTS`
    block, dtype               [rows, columns] of a block; the dtype of x and of the values
    shape, tokens              [K, N] of the kernel, and the rows of x; on one device of several
    settings                   fields of the kernel's settings; those left out have their defaults

and, for readers, "microseconds" and "default_microseconds" as the tuner measured them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from topkast_jax.always_sparse.products.tuning import (
    MODULES,
    PRODUCTS,
    Entry,
    Key,
    Table,
    defaults,
)
from topkast_jax.errors import SparsityError

PACKAGE = Path(__file__).with_name("tuned.json")
_TIMES = ("microseconds", "default_microseconds")


@functools.cache
def package_table() -> Table:
    """The table that is installed with the package, read once in a process."""
    return load(PACKAGE)


def load(path: str | os.PathLike[str]) -> Table:
    """Reads a table.

    Raises:
      SparsityError: the file cannot be read, is not such JSON, or an entry has a field that there
        is not, a wrong value, or settings that the kernel does not take; it names the entry.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise SparsityError(f"tuned table {path}: {error.strerror}") from error
    except ValueError as error:
        raise SparsityError(f"tuned table {path}: found no JSON ({error}); must be JSON") from error
    entries = found.get("entries") if isinstance(found, dict) and len(found) == 1 else None
    if not isinstance(entries, list):
        raise SparsityError(
            f'tuned table {path}: found {_short(found)}; must be an object with the list "entries"'
        )
    table: dict[tuple[Key, int], Entry] = {}
    for number, fields in enumerate(entries):
        try:
            entry = _entry(fields)
            if (entry.key, entry.tokens) in table:
                raise SparsityError("found twice; must be there once")
        except SparsityError as error:
            raise SparsityError(f"tuned table {path}, entry {number}: {error}") from error
        table[entry.key, entry.tokens] = entry
    return Table(tuple(table.values()))


def dumps(table: Table) -> str:
    """The text of a table's file, one line an entry, sorted."""
    lines = [json.dumps(_fields(entry)) for entry in sorted(table.entries, key=_order)]
    return '{"entries": [' + ",".join("\n" + line for line in lines) + "\n]}\n"


def _fields(entry: Entry) -> dict[str, Any]:
    """The entry as JSON has it; the inverse of `_entry`."""
    times = {name: getattr(entry, name) for name in _TIMES}
    return {
        **dataclasses.asdict(entry.key),
        "tokens": entry.tokens,
        "settings": dataclasses.asdict(entry.settings),
        **{name: time for name, time in times.items() if time is not None},
    }


def _order(entry: Entry) -> tuple[Any, ...]:
    return (*dataclasses.astuple(entry.key), entry.tokens)


def _entry(fields: Any) -> Entry:
    if not isinstance(fields, dict):
        raise SparsityError(f"found {_short(fields)}; must be an object")
    needed = {**_RULES, "settings": (lambda found: isinstance(found, dict), "an object")}
    for name in fields:
        if name not in (*needed, *_TIMES):
            raise SparsityError(f"{name}: no such field; must be {', '.join((*needed, *_TIMES))}")
    for name, (fits, rule) in needed.items():
        if name not in fields or not fits(fields[name]):
            found = _short(fields[name]) if name in fields else "nothing"
            raise SparsityError(f"{name}: found {found}; must be {rule}")
    for name in _TIMES:
        if type(fields.get(name, 1.0)) not in (int, float) or not fields.get(name, 1.0) > 0:
            raise SparsityError(f"{name}: found {_short(fields[name])}; must be a number above 0")
    key = {field.name: fields[field.name] for field in dataclasses.fields(Key)}
    key |= {"block": tuple(key["block"]), "shape": tuple(key["shape"])}
    kernel = type(defaults(key["backend"], key["product"]))
    settings = kernel.from_dict(fields["settings"])
    return Entry(Key(**key), fields["tokens"], settings, *(fields.get(name) for name in _TIMES))


def _is_size(found: Any) -> bool:
    return type(found) is int and found > 0


def _is_pair(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 2 and all(map(_is_size, found))


def _is_dtype(found: Any) -> bool:
    try:
        return isinstance(found, str) and jnp.issubdtype(jnp.dtype(found), jnp.floating)
    except TypeError:
        return False


_RULES: Mapping[str, tuple[Any, str]] = {
    "device": (lambda found: isinstance(found, str) and found, "a device kind"),
    "backend": (lambda found: found in tuple(MODULES), f"one of {', '.join(MODULES)}"),
    "product": (lambda found: found in PRODUCTS, f"one of {', '.join(PRODUCTS)}"),
    "block": (_is_pair, "two integers above 0"),
    "dtype": (_is_dtype, "the name of a floating dtype"),
    "shape": (_is_pair, "two integers above 0"),
    "tokens": (_is_size, "an integer above 0"),
}


def _short(found: Any) -> str:
    text = json.dumps(found)
    return text if len(text) <= 60 else f"{text[:57]}..."
