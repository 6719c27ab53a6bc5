"""Refuses a platform where a step is lowered: before, which one it is for is not known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from topkast_jax.errors import SparsityError

# The identity, which lowers for some platforms only. A CPU host compiles for TPUs too, so a check
# that is made when a function is traced would come too early.
_only_on_p = Primitive("always_sparse_only_on")
_only_on_p.def_abstract_eval(lambda x, **_: x)
_only_on_p.def_impl(lambda x, **params: jax.jit(lambda y: _only_on_p.bind(y, **params))(x))
batching.defvectorized(_only_on_p)


def only_on(x: jax.Array, backend: str | Sequence[str] | None, platforms: Sequence[str]) -> Any:
    """x, in a program that is for none but these platforms.

    Args:
      x: any array that the program needs.
      backend: what was asked for, as the error names it.
      platforms: what it runs on, named as for lowering.

    Raises:
      SparsityError: when the program is lowered for another platform.
    """
    return _only_on_p.bind(x, backend=backend, platforms=tuple(platforms))


def _lower_only_on(ctx: Any, x: Any, *, backend: Any, platforms: tuple[str, ...]) -> list[Any]:
    found = tuple(ctx.platforms or ctx.module_context.platforms)
    if not set(found) <= set(platforms):
        allowed = " and ".join(platforms) or "nothing"
        raise SparsityError(
            f"backend {backend!r} with such a kernel runs on {allowed} "
            f"and this is {'/'.join(found)}: use backend 'xla', or none"
        )
    return [x]


mlir.register_lowering(_only_on_p, _lower_only_on)
