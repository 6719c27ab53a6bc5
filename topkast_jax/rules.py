"""Which leaves are sparse, and at which densities: ordered rules over parameter paths."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.errors import SparsityError, shown
from topkast_jax.method import Counts, Density, Leaf
from topkast_jax.patterns import NEEDED, NOfM, Pattern, completed
from topkast_jax.selection import DTYPES, MOST_ENTRIES
from topkast_jax.trees import flatten_with_names
from topkast_jax.values import is_integer, is_number

logger = logging.getLogger("topkast_jax")


@dataclasses.dataclass(frozen=True)
class Dense:
    """Leaves that stay dense."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse:
    """Leaves that are sparse; what is None is taken from the arguments of the transform.

    Attributes:
      forward_density: share of the units the network runs on, in (0, 1].
      backward_density: share of the units that are updated, forward_density to 1. If it is None and
        forward_density is given, the larger of that and the transform's backward density; if the
        transform has none either, forward_density.
      pattern: which entries are kept or dropped together.
      distribution: "uniform" gives each leaf these densities; "erk" shares them out over all
        "erk" leaves with the same densities, in proportion to sum(shape) / prod(shape)
        (Erdős–Rényi-Kernel, as in RigL).
      stacked: the axis or axes that number separate layers (layers under `lax.scan`); each layer
        is selected on its own. None: the leaf is one layer.

    Raises:
      SparsityError: another distribution, no pattern, or axes that are not integers. Whether the
        densities, the pattern and the axes fit a leaf is checked by the `init` of the transform.
    """

    forward_density: float | None = None
    backward_density: float | None = None
    pattern: Pattern | None = None
    distribution: Literal["uniform", "erk"] = "uniform"
    stacked: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.distribution not in ("uniform", "erk"):
            raise SparsityError(
                f"distribution={shown(self.distribution)}: must be 'uniform' or 'erk'"
            )
        if self.pattern is not None:
            check_pattern(self.pattern)
        if self.stacked is None:
            return
        axes = self.stacked if isinstance(self.stacked, tuple) else (self.stacked,)
        if not all(map(is_integer, axes)):
            raise SparsityError(f"stacked={shown(self.stacked)}: must be an axis, several, or None")
        axes = tuple(map(int, axes))
        object.__setattr__(self, "stacked", axes if isinstance(self.stacked, tuple) else axes[0])


Spec = Dense | Sparse
Rules = Sequence[tuple[str, Spec]]


# How Flax, Haiku and Equinox name what is no matrix: biases and scales, and the layers that norm.
_NO_MATRIX = re.compile(r"(\w+_)?(bias(es)?|scale|offset)|bias_\w+|gamma|beta|gain", re.IGNORECASE)
_NORM = re.compile(r".*norm(_?\d+|s)?|(ln|bn)(_\w+|\d+\w?|\w)?", re.IGNORECASE)

_told: set[str] = set()


def resolve(
    params: Any,
    rules: Rules | None,
    forward_density: Density,
    backward_density: Density | None,
    pattern: Pattern,
) -> dict[str, Leaf | None]:
    """Decides for each leaf, in flattening order, how it is sparse, or None where it is dense.

    Args:
      params: tree of arrays (or abstract arrays).
      rules: ordered (regular expression → spec); the first that matches a whole path wins. None:
        floating leaves with two or more axes longer than one are sparse, but for those that are
        named as biases, scales or a part of a norm, or have no entries; all others are dense.
      forward_density: for specs that name none.
      backward_density: for specs that name none; None: the forward density of the leaf.
      pattern: for specs that name none.

    Returns:
      Leaf path → `Leaf`, or None for a dense leaf.

    Raises:
      SparsityError: a leaf that is no array, one that no rule covers, a rule that matches no leaf
        or that earlier ones hide, a spec that does not fit, two leaves of one name, nothing sparse
        at all.
    """
    names, arrays, _ = flatten_with_names(params)
    check_arrays(names, arrays)
    _refuse_duplicates(names)
    specs = default_specs(names, arrays) if rules is None else _match(names, rules)
    leaves = [
        _leaf(name, array, spec, forward_density, backward_density, pattern)
        if isinstance(spec, Sparse)
        else None
        for name, array, spec in zip(names, arrays, specs, strict=True)
    ]
    if names and not any(leaves):
        found = ", ".join(f"{n} {jnp.shape(a)}" for n, a in zip(names, arrays, strict=True))
        raise SparsityError(
            f"nothing is sparse: {_shortened(found)}; give rules=[(path expression, Sparse(…)), …]"
        )
    result = dict(zip(names, _share_out(leaves, specs), strict=True))
    if rules is None and names:
        _tell_default(result)
    return result


def _tell_default(leaves: dict[str, Leaf | None]) -> None:
    """Says on standard error, once for each outcome, what the default rules took."""
    sparse = _shortened(", ".join(name for name, leaf in leaves.items() if leaf))
    dense = _shortened(", ".join(name for name, leaf in leaves.items() if not leaf)) or "none"
    line = f"no rules given; sparse: {sparse}; dense: {dense} (topkast_jax.describe shows a table)"
    if line not in _told:
        _told.add(line)
        logger.warning(line)


def _shortened(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[:most]}, …"


def _refuse_duplicates(names: Sequence[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise SparsityError(f"{times} leaves are named {name!r}: keys joined by '/' must differ")


def check_arrays(names: Sequence[str], leaves: Sequence[Any]) -> None:
    """Raises SparsityError unless all leaves are arrays, abstract arrays or numbers."""
    for name, leaf in zip(names, leaves, strict=True):
        if not _is_array(leaf):
            raise SparsityError(
                f"{name}={shown(leaf)}: must be an array; take the arrays out of a model first, as "
                "equinox.partition(model, equinox.is_inexact_array) does"
            )


def _is_array(leaf: Any) -> bool:
    try:
        jnp.result_type(leaf)
    except TypeError:
        return False
    return not isinstance(leaf, str | type)  # names of types, and types, have one too


def _is_floating(array: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jnp.floating)


def default_specs(names: Sequence[str], arrays: Sequence[Any]) -> list[Spec]:
    """What leaves are where no rules are given.

    Args:
      names: their paths.
      arrays: the leaves, or their shapes.
    """

    def is_matrix(array: Any) -> bool:
        shape = jnp.shape(array)
        return _is_floating(array) and sum(n > 1 for n in shape) >= 2 and 0 not in shape

    vectors = named_as_vectors(names)
    rows = zip(names, arrays, strict=True)
    return [Sparse() if is_matrix(a) and name not in vectors else Dense() for name, a in rows]


def named_as_vectors(names: Sequence[str]) -> set[str]:
    """Those of the paths that are named as biases, scales or a part of a norm, stacked or not."""
    present = set(names)

    def is_vector(name: str) -> bool:
        *layers, last = name.split("/")
        beside_w = last == "b" and "/".join([*layers, "w"]) in present  # Haiku's linear layers
        is_norm = any(map(_NORM.fullmatch, [*layers, last]))
        return bool(_NO_MATRIX.fullmatch(last) or beside_w or is_norm)

    return {name for name in names if is_vector(name)}


def _match(names: Sequence[str], rules: Rules) -> list[Spec]:
    compiled = [(_compile(expression), spec) for expression, spec in rules]
    first = [next((i for i, (r, _) in enumerate(compiled) if r.fullmatch(n)), None) for n in names]
    uncovered = [name for name, i in zip(names, first, strict=True) if i is None]
    if uncovered:
        raise SparsityError(
            f"no rule covers {_shortened(', '.join(uncovered))}; end the rules with "
            "('.*', Dense()) or ('.*', Sparse())"
        )
    for number, (regex, _) in enumerate(compiled):
        matched = [name for name in names if regex.fullmatch(name)]
        if names and not matched:
            there_are = _shortened(", ".join(names))
            raise SparsityError(
                f"rule {regex.pattern!r} matches no parameter; there are: {there_are}"
            )
        if names and number not in first:
            raise SparsityError(
                f"rule {regex.pattern!r} is hidden: earlier rules match all that it matches "
                f"({_shortened(', '.join(matched))})"
            )
    return [compiled[i][1] for i in first if i is not None]


def check_rules(rules: Any) -> None:
    """Raises SparsityError unless these are rules: ordered pairs of an expression and a spec."""
    wanted = "must be a list of (regular expression, Dense() or Sparse(...))"
    if rules is None:
        return
    if isinstance(rules, str | bytes | Mapping) or not isinstance(rules, Sequence):
        raise SparsityError(f"rules={shown(rules)}: {wanted}")
    for rule in rules:
        pair = isinstance(rule, tuple) and len(rule) == 2
        if not pair or not isinstance(rule[0], str) or not isinstance(rule[1], Dense | Sparse):
            raise SparsityError(f"rule {shown(rule)}: {wanted}")
        _compile(rule[0])


def check_pattern(pattern: Any) -> None:
    """Raises SparsityError unless this is a pattern."""
    missing = [name for name in NEEDED if not hasattr(pattern, name)]
    if isinstance(pattern, type) or "grid" in missing or "top" in missing:
        raise SparsityError(
            f"pattern={shown(pattern)}: must be Unstructured(), Block(rows, cols), …"
        )
    if missing:
        raise SparsityError(f"pattern={shown(pattern)}: has no {', '.join(missing)}")


def _compile(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, TypeError, OverflowError) as error:
        raise SparsityError(f"rule {expression!r} is no regular expression: {error}") from None


def check_densities(forward: Density, backward: Density, where: str = "") -> None:
    """Raises SparsityError unless 0 < forward ≤ backward ≤ 1; traced values pass unseen."""
    for name, density in (("forward_density", forward), ("backward_density", backward)):
        if isinstance(density, jax.core.Tracer):
            continue
        if not is_number(density) or not 0 < density <= 1:
            raise SparsityError(f"{where}{name}={shown(density)}: must be a number in (0, 1]")
    if any(isinstance(density, jax.core.Tracer) for density in (forward, backward)):
        return
    kind = _coarser_type(forward, backward)
    if kind.type(float(backward)) < kind.type(float(forward)):
        raise SparsityError(
            f"{where}backward_density={float(backward):.6g} is below "
            f"forward_density={float(forward):.6g}: the backward set contains the forward set"
        )


def _coarser_type(*densities: Density) -> np.dtype:
    """The floating type of least precision: hyperparameters of optax have been rounded to one."""
    kinds = [np.dtype(getattr(density, "dtype", np.float64)) for density in densities]
    floating = [kind for kind in kinds if jnp.issubdtype(kind, jnp.floating)]
    return max(floating, key=lambda kind: float(jnp.finfo(kind).eps), default=np.dtype(np.float64))


def _leaf(
    name: str,
    array: Any,
    spec: Sparse,
    forward: Density,
    backward: Density | None,
    pattern: Pattern,
) -> Leaf:
    dtype = jnp.result_type(array)
    if not _is_floating(array):
        raise SparsityError(f"{name} has type {dtype}: only floats can be sparse")
    if dtype.name not in DTYPES:
        raise SparsityError(f"{name} has type {dtype}; allowed: {', '.join(DTYPES)}, or Dense()")
    shape = jnp.shape(array)
    axes = _stacked_axes(name, shape, spec)
    stack = tuple(shape[axis] for axis in axes)
    layer = tuple(size for axis, size in enumerate(shape) if axis not in axes)
    kept, updated = _densities(name, spec, forward, backward)
    pattern = completed(spec.pattern or pattern)
    try:
        pattern.grid(layer)
        if isinstance(pattern, NOfM):
            _check_groups(pattern, spec, kept, updated)
    except SparsityError as error:
        raise SparsityError(f"{name}: {error}") from None
    if not 0 < math.prod(layer) <= MOST_ENTRIES:
        raise SparsityError(
            f"{name}: a layer of {math.prod(layer)} entries; allowed: 1 to {MOST_ENTRIES} (name "
            "the axes that number separate layers as stacked, or leave it dense)"
        )
    counts = _counts(pattern, layer, kept, updated)
    return Leaf(layer, dtype, pattern, kept, updated, counts, stack, axes)


def _densities(
    name: str, spec: Sparse, forward: Density, backward: Density | None
) -> tuple[Density, Density]:
    """The densities of a leaf: its own where the spec names them, else those of the transform."""
    if backward is None:
        backward = forward if spec.forward_density is None else spec.forward_density
    if spec.forward_density is not None:
        forward = spec.forward_density
        check_densities(forward, 1.0, f"{name}: ")
        if spec.backward_density is None and isinstance(backward, jax.Array):
            backward = jnp.maximum(backward, jnp.asarray(forward, backward.dtype))
        elif spec.backward_density is None:
            backward = max(float(backward), float(forward))
    if spec.backward_density is not None:
        backward = spec.backward_density
    check_densities(forward, backward, f"{name}: ")
    forward, backward = (d if isinstance(d, jax.Array) else float(d) for d in (forward, backward))
    return forward, backward


def _check_groups(pattern: NOfM, spec: Sparse, forward: Density, backward: Density) -> None:
    """Raises SparsityError unless the groups of a pattern can keep these densities."""
    if spec.distribution == "erk":
        raise SparsityError(
            f"distribution='erk' with NOfM({pattern.n}, {pattern.m}), whose forward density is "
            f"{pattern.n / pattern.m:g} in every leaf: must be 'uniform', or another pattern"
        )
    pattern.check_densities(forward, backward)


def _stacked_axes(name: str, shape: tuple[int, ...], spec: Sparse) -> tuple[int, ...]:
    if spec.stacked is None:
        return ()
    axes = spec.stacked if isinstance(spec.stacked, tuple) else (spec.stacked,)
    rank = len(shape)
    outside = any(not -rank <= axis < rank for axis in axes)
    axes = tuple(axis % rank for axis in axes) if not outside else axes
    if outside or len(set(axes)) < len(axes) or len(axes) >= rank:
        raise SparsityError(
            f"{name}: stacked={spec.stacked} must name different axes of {shape} and leave one"
        )
    return axes


def _counts(
    pattern: Pattern, shape: tuple[int, ...], forward: Density, backward: Density
) -> Counts:
    kept = pattern.count(shape, forward)
    if isinstance(pattern, NOfM) and isinstance(forward, jax.Array):
        # Whatever a traced density says, which cannot be checked: the pattern fixes the number.
        kept = jnp.asarray(pattern.n * pattern.groups(shape), jnp.int32)
    updated = pattern.count(shape, backward)
    if isinstance(kept, int) and isinstance(updated, int):
        return Counts(kept, max(kept, updated))
    return Counts(kept, jnp.maximum(kept, updated))


def _share_out(leaves: list[Leaf | None], specs: Sequence[Spec]) -> list[Leaf | None]:
    """Replaces the densities of "erk" leaves by their share of the common budget."""
    groups: dict[tuple[float, float], list[int]] = {}
    for i, (leaf, spec) in enumerate(zip(leaves, specs, strict=True)):
        if leaf and isinstance(spec, Sparse) and spec.distribution == "erk":
            densities = (leaf.forward_density, leaf.backward_density)
            if any(isinstance(density, jax.Array) for density in densities):
                raise SparsityError(
                    "distribution='erk' needs plain numbers as densities; under "
                    "inject_hyperparams name them in static_args"
                )
            key = (float(densities[0]), float(densities[1]))
            groups.setdefault(key, []).append(i)
    shared = list(leaves)
    for (forward, backward), members in groups.items():
        group = [leaf for i in members if (leaf := leaves[i])]
        copies = [math.prod(leaf.stack) for leaf in group]
        shapes = [leaf.shape for leaf in group]
        forwards = erk_densities(shapes, forward, copies)
        backwards = erk_densities(shapes, backward, copies)
        for i, leaf, a, b in zip(members, group, forwards, backwards, strict=True):
            counts = _counts(leaf.pattern, leaf.shape, a, max(a, b))
            shared[i] = dataclasses.replace(
                leaf, forward_density=a, backward_density=max(a, b), counts=counts
            )
    return shared


def erk_densities(
    shapes: Sequence[tuple[int, ...]], density: float, copies: Sequence[int] | None = None
) -> list[float]:
    """Erdős–Rényi-Kernel densities of several leaves whose mean over all entries is `density`.

    A leaf's density is ε · sum(shape) / prod(shape); one that would pass 1 becomes dense and ε is
    solved again for the rest (RigL, section 3).

    Args:
      shapes: one shape for each leaf.
      density: kept entries over all entries, in (0, 1].
      copies: how many layers of that shape there are; one each by default.

    Returns:
      One density for each leaf, in (0, 1].

    Raises:
      SparsityError: `density` is not a number in (0, 1].
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
