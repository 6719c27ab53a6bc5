"""Tells Flax how to write the parts of a state that are no tuples and dictionaries."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_FLAX = "flax.serialization"
_KINDS: list[tuple[type, Sequence[str], Callable[[Any, dict[str, Any]], Any]]] = []


def serializable(
    kind: type, names: Sequence[str], replaced: Callable[[Any, dict[str, Any]], Any]
) -> None:
    """Makes a class known to `flax.serialization`, now or when the program imports it.

    Args:
      kind: a class of tree nodes.
      names: its attributes that hold arrays; the rest is a part of the structure.
      replaced: from a node and a dict of such attributes, the node with these.
    """
    _KINDS.append((kind, names, replaced))
    if _FLAX in sys.modules:
        _register(sys.modules[_FLAX], kind, names, replaced)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the classes as soon as `flax.serialization` has been imported.

    The library does not need Flax, and importing it takes longer than importing the library.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        del path, target
        if name != _FLAX:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                for kind, names, replaced in _KINDS:
                    _register(module, kind, names, replaced)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _FLAX not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())


def _register(
    flax: Any, kind: type, names: Sequence[str], replaced: Callable[[Any, dict[str, Any]], Any]
) -> None:
    def write(node: Any) -> dict[str, Any]:
        return {name: flax.to_state_dict(getattr(node, name)) for name in names}

    def read(node: Any, stored: dict[str, Any]) -> Any:
        restored = {
            name: flax.from_state_dict(getattr(node, name), stored[name], name=name)
            for name in names
        }
        return replaced(node, restored)

    flax.register_serialization_state(kind, write, read, override=True)
