"""Which leaves are sparse, and at which densities: ordered rules over parameter paths."""

from __future__ import annotations

import dataclasses
import logging
import math
import numbers
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from topkast_jax.errors import SparsityError
from topkast_jax.patterns import Pattern
from topkast_jax.trees import flatten_with_names

logger = logging.getLogger("topkast_jax")

Density = float | jax.Array


@dataclasses.dataclass(frozen=True)
class Dense:
    """Leaves that stay dense."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse:
    """Leaves that are sparse; what is None is taken from the arguments of the transform.

    Attributes:
      forward_density: share of the entries the network runs on, in (0, 1].
      backward_density: share of the entries that are updated, forward_density to 1.
      pattern: what is kept together.
      distribution: "uniform" gives each leaf these densities; "erk" shares them out over all
        "erk" leaves with the same densities, in proportion to sum(shape) / prod(shape)
        (Erdős–Rényi-Kernel, as in RigL).
      stacked: how many leading axes number separate layers (layers under `lax.scan`); each is
        selected on its own.
    """

    forward_density: float | None = None
    backward_density: float | None = None
    pattern: Pattern | None = None
    distribution: Literal["uniform", "erk"] = "uniform"
    stacked: int = 0

    def __post_init__(self) -> None:
        if self.distribution not in ("uniform", "erk"):
            raise SparsityError(f"distribution={self.distribution!r}: must be 'uniform' or 'erk'")
        if not isinstance(self.stacked, int) or self.stacked < 0:
            raise SparsityError(f"stacked={self.stacked!r}: must be an integer of at least 0")


Spec = Dense | Sparse
Rules = Sequence[tuple[str, Spec]]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One sparse leaf, everything about it that does not change.

    Attributes:
      path: its place in the tree, "/"-joined.
      shape: shape of one layer of it, without the stacked axes.
      forward_density: as nominal in the rule, before rounding to whole units.
      backward_density: likewise.
      pattern: what is kept together.
      stack: the stacked axes, which number separate layers.
    """

    path: str
    shape: tuple[int, ...]
    forward_density: Density
    backward_density: Density
    pattern: Pattern
    stack: tuple[int, ...] = ()


def resolve(
    params: Any,
    rules: Rules | None,
    forward_density: Density,
    backward_density: Density,
    pattern: Pattern,
    log: Callable[[str], None] | None = None,
) -> list[Leaf | None]:
    """Decides for each leaf, in flattening order, how it is sparse, or None where it is dense.

    Args:
      params: tree of arrays (or abstract arrays).
      rules: ordered (regular expression → spec); the first that matches a whole path wins. None:
        floating leaves with two or more axes are sparse, all others dense.
      forward_density: for specs that name none.
      backward_density: for specs that name none.
      pattern: for specs that name none.
      log: called with a line for each leaf.

    Raises:
      SparsityError: a leaf no rule covers, a rule no leaf matches, a spec that does not fit, two
        leaves of one name.
    """
    names, arrays, _ = flatten_with_names(params)
    _refuse_duplicates(names)
    specs = _default_specs(arrays) if rules is None else _match(names, rules)
    leaves = [
        _leaf(name, array, spec, forward_density, backward_density, pattern)
        if isinstance(spec, Sparse)
        else None
        for name, array, spec in zip(names, arrays, specs, strict=True)
    ]
    leaves = _share_out(leaves, specs)
    for name, array, leaf in zip(names, arrays, leaves, strict=True):
        if log:
            log(f"{name} {jnp.shape(array)}: {_describe(leaf)}")
    return leaves


def _refuse_duplicates(names: Sequence[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise SparsityError(f"{times} leaves are named {name!r}: keys joined by '/' must differ")


def _describe(leaf: Leaf | None) -> str:
    if leaf is None:
        return "dense"
    return f"forward {leaf.forward_density}, backward {leaf.backward_density}, {leaf.pattern}"


def _is_floating(array: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jnp.floating)


def _default_specs(arrays: Sequence[Any]) -> list[Spec]:
    return [Sparse() if _is_floating(a) and jnp.ndim(a) >= 2 else Dense() for a in arrays]


def _match(names: Sequence[str], rules: Rules) -> list[Spec]:
    compiled = [(_compile(expression), spec) for expression, spec in _checked(rules)]
    first = [next((i for i, (r, _) in enumerate(compiled) if r.fullmatch(n)), None) for n in names]
    uncovered = [name for name, i in zip(names, first, strict=True) if i is None]
    if uncovered:
        raise SparsityError(
            f"no rule covers {', '.join(uncovered)}; end the rules with ('.*', Dense()) or "
            "('.*', Sparse())"
        )
    for regex, _ in compiled:
        if not any(regex.fullmatch(name) for name in names):
            raise SparsityError(
                f"rule {regex.pattern!r} matches no parameter; there are: {', '.join(names)}"
            )
    return [compiled[i][1] for i in first if i is not None]


def _checked(rules: Rules) -> Rules:
    for rule in rules:
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[1], Dense | Sparse)):
            raise SparsityError(
                f"rule {rule!r}: must be (regular expression, Dense() or Sparse(...))"
            )
    return rules


def _compile(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, TypeError) as error:
        raise SparsityError(f"rule {expression!r} is no regular expression: {error}") from None


def check_densities(forward: Density, backward: Density, where: str = "") -> None:
    """Raises SparsityError unless 0 < forward ≤ backward ≤ 1; traced values pass unseen."""
    for name, density in (("forward_density", forward), ("backward_density", backward)):
        if isinstance(density, jax.core.Tracer):
            return
        number = isinstance(density, numbers.Real) or getattr(density, "ndim", None) == 0
        if isinstance(density, bool) or not number or not 0.0 < float(density) <= 1.0:
            raise SparsityError(f"{where}{name}={density!r}: must be a number in (0, 1]")
    if float(backward) < float(forward):
        raise SparsityError(
            f"{where}backward_density={backward} is below forward_density={forward}: the backward "
            "set contains the forward set"
        )


def _leaf(
    name: str, array: Any, spec: Sparse, forward: Density, backward: Density, pattern: Pattern
) -> Leaf:
    if not _is_floating(array):
        raise SparsityError(f"{name} has type {jnp.result_type(array)}: only floats can be sparse")
    shape = jnp.shape(array)
    if spec.stacked >= max(1, len(shape)):
        raise SparsityError(f"{name}: stacked={spec.stacked} leaves no axis of shape {shape}")
    if spec.forward_density is not None:
        forward = spec.forward_density
        if spec.backward_density is None and not isinstance(backward, jax.core.Tracer):
            backward = max(float(backward), float(forward))
    if spec.backward_density is not None:
        backward = spec.backward_density
    check_densities(forward, backward, f"{name}: ")
    forward, backward = (
        d if isinstance(d, jax.core.Tracer) else float(d) for d in (forward, backward)
    )
    leaf = Leaf(
        path=name,
        shape=tuple(shape[spec.stacked :]),
        forward_density=forward,
        backward_density=backward,
        pattern=spec.pattern or pattern,
        stack=tuple(shape[: spec.stacked]),
    )
    try:
        leaf.pattern.grid(leaf.shape)
    except SparsityError as error:
        raise SparsityError(f"{name}: {error}") from None
    return leaf


def _share_out(leaves: list[Leaf | None], specs: Sequence[Spec]) -> list[Leaf | None]:
    """Replaces the densities of "erk" leaves by their share of the common budget."""
    groups: dict[tuple[float, float], list[int]] = {}
    for i, (leaf, spec) in enumerate(zip(leaves, specs, strict=True)):
        if leaf and isinstance(spec, Sparse) and spec.distribution == "erk":
            if isinstance(leaf.forward_density, jax.core.Tracer):
                raise SparsityError(
                    "distribution='erk' needs plain numbers as densities; under "
                    "inject_hyperparams name them in static_args"
                )
            key = (float(leaf.forward_density), float(leaf.backward_density))
            groups.setdefault(key, []).append(i)
    shared = list(leaves)
    for (forward, backward), members in groups.items():
        group = [leaf for i in members if (leaf := leaves[i])]
        copies = [math.prod(leaf.stack) for leaf in group]
        shapes = [leaf.shape for leaf in group]
        forwards = erk_densities(shapes, forward, copies)
        backwards = erk_densities(shapes, backward, copies)
        for i, leaf, a, b in zip(members, group, forwards, backwards, strict=True):
            shared[i] = dataclasses.replace(leaf, forward_density=a, backward_density=max(a, b))
    return shared


def erk_densities(
    shapes: Sequence[tuple[int, ...]], density: float, copies: Sequence[int] | None = None
) -> list[float]:
    """Erdős–Rényi-Kernel densities of several leaves whose mean over all entries is `density`.

    A leaf's density is ε · sum(shape) / prod(shape); one that would pass 1 becomes dense and ε is
    solved again for the rest (RigL, section 3).

    Args:
      shapes: one shape a leaf.
      density: kept entries over all entries, in (0, 1].
      copies: how many layers of that shape there are; one each by default.

    Returns:
      One density a leaf, in (0, 1].
    """
    check_densities(density, density)
    counts = copies or [1] * len(shapes)
    sizes = [math.prod(s) * c for s, c in zip(shapes, counts, strict=True)]
    raw = [sum(s) / math.prod(s) for s in shapes]
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in full]
        if not rest:
            return [1.0] * len(shapes)
        budget = density * sum(sizes) - sum(sizes[i] for i in full)
        epsilon = budget / sum(raw[i] * sizes[i] for i in rest)
        over = {i for i in rest if epsilon * raw[i] > 1.0}
        if not over:
            return [1.0 if i in full else epsilon * raw[i] for i in range(len(shapes))]
        full |= over
