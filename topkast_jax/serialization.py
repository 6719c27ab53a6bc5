"""Tells Flax how to write the parts of a state that are no tuples and dictionaries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

_KINDS: dict[type, tuple[Sequence[str], Callable[[Any, dict[str, Any]], Any]]] = {}


def serializable(
    kind: type, names: Sequence[str], replaced: Callable[[Any, dict[str, Any]], Any]
) -> None:
    """Makes a class known to `flax.serialization` as soon as Flax is in use.

    Args:
      kind: a class of tree nodes.
      names: its attributes that hold arrays; the rest is a part of the structure.
      replaced: from a node and a dict of such attributes, the node with these.
    """
    _KINDS[kind] = (names, replaced)
    register_with_flax()


def register_with_flax() -> None:
    """Registers the classes with `flax.serialization`, if the program has imported Flax."""
    if "flax" not in sys.modules:
        return
    from flax import serialization

    for kind, (names, replaced) in list(_KINDS.items()):

        def write(node: Any, names: Sequence[str] = names) -> dict[str, Any]:
            return {name: serialization.to_state_dict(getattr(node, name)) for name in names}

        def read(
            node: Any,
            stored: dict[str, Any],
            names: Sequence[str] = names,
            replaced: Callable[[Any, dict[str, Any]], Any] = replaced,
        ) -> Any:
            restored = {
                name: serialization.from_state_dict(getattr(node, name), stored[name], name=name)
                for name in names
            }
            return replaced(node, restored)

        serialization.register_serialization_state(kind, write, read, override=True)
        del _KINDS[kind]
