"""Sparsity methods by name; `register` adds one from outside the package."""

from __future__ import annotations

from collections.abc import Callable

import optax

from topkast_jax.errors import SparsityError
from topkast_jax.methods.dnw import dnw
from topkast_jax.methods.pruning import pruning
from topkast_jax.methods.rigl import rigl
from topkast_jax.methods.set import set_evolution
from topkast_jax.methods.snfs import snfs
from topkast_jax.methods.snip import snip
from topkast_jax.methods.srigl import srigl
from topkast_jax.methods.static import static_random
from topkast_jax.top_kast import top_kast

__all__ = [
    "Factory",
    "dnw",
    "get",
    "names",
    "pruning",
    "register",
    "rigl",
    "set_evolution",
    "snfs",
    "snip",
    "srigl",
    "static_random",
    "top_kast",
]

Factory = Callable[..., optax.GradientTransformationExtraArgs]

_FACTORIES: dict[str, Factory] = {}


def register(name: str, factory: Factory) -> None:
    """Makes a method known by name; `factory(inner, **options)` returns its transformation.

    Raises:
      SparsityError: another factory has that name.
    """
    if _FACTORIES.setdefault(name, factory) is not factory:
        raise SparsityError(f"method {name!r} is registered already, by {_FACTORIES[name]}")


def names() -> list[str]:
    """The names of all registered methods."""
    return sorted(_FACTORIES)


def get(name: str) -> Factory:
    """The factory of that name.

    Raises:
      SparsityError: no such method.
    """
    if name not in _FACTORIES:
        raise SparsityError(f"method {name!r} is unknown; there are: {', '.join(names())}")
    return _FACTORIES[name]


register("top_kast", top_kast)
register("static_random", static_random)
register("set", set_evolution)
register("rigl", rigl)
register("snfs", snfs)
register("snip", snip)
register("dnw", dnw)
register("pruning", pruning)
register("srigl", srigl)
