"""What always-sparse training refuses, each in one line that names it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.always_sparse import host as hosts
from topkast_jax.always_sparse.host import HostLeaf
from topkast_jax.always_sparse.kernel import is_compact
from topkast_jax.errors import SparsityError
from topkast_jax.method import allocates
from topkast_jax.sparsify import Plan


def check_plan(plan: Plan, leaves: dict[str, HostLeaf], delay: int) -> None:
    """Raises SparsityError unless the method and its leaves can be always sparse."""
    method = type(plan.method).__name__
    if plan.method.first_choice == "first_update":
        raise SparsityError(
            f"{method} makes its first step with whole leaves, which always sparse never holds: "
            "use it on dense arrays"
        )
    if plan.method.observes_gradient:
        raise SparsityError(
            f"{method} observes the dense gradient in every step, which always sparse never makes: "
            "use it on dense arrays"
        )
    if allocates(plan.method):
        raise SparsityError(
            f"{method} keeps other numbers of units as it goes on, and always sparse holds arrays "
            "of one size: use it on dense arrays"
        )
    for name, value in (
        ("forward_density", plan.forward_density), ("backward_density", plan.backward_density),
        ("refresh_every", plan.refresh_every), ("stop_exploring_at", plan.stop_exploring_at),
        ("seed", plan.seed),
    ):  # fmt: skip
        if isinstance(value, jax.core.Tracer):
            raise SparsityError(f"{name} is traced: always sparse needs a plain number")
    if delay and plan.refresh_every is None:
        raise SparsityError(f"delay={delay}: must be 0 where sets never change")
    if delay and plan.refresh_every is not None and delay >= int(plan.refresh_every):
        raise SparsityError(
            f"delay={delay}: must be below refresh_every={plan.refresh_every}, so that one choice "
            "is in use before the next begins"
        )
    for leaf in leaves.values():
        hosts.check(leaf)
    hosts.host_device()


def check_inner_state(plan: Plan, dense: Any, values: Any) -> None:
    """Raises SparsityError where an optimizer treats the values of B as another kind of leaf.

    Values are vectors where the leaf is a matrix: an optimizer that treats matrices in a way of its
    own (Muon) would train them as something else, and keeps their state in another place.
    """
    if _slots(plan.inner.init, dense) != _slots(plan.inner.init, values):
        raise SparsityError(
            "the inner optimizer treats leaves by their number of axes, and always sparse it sees "
            "the values of each leaf as a vector: take an optimizer that works entry by entry"
        )


def _slots(init: Callable[[Any], Any], params: Any) -> set[tuple[tuple[str, ...], ...]]:
    """For each parameter, the places in an optimizer's state that hold something of it."""

    def paths(tree: Any) -> list[tuple[str, ...]]:
        return [tuple(map(str, path)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    names = set(paths(params))
    return {
        (path[:i], path[i:j])
        for path in paths(jax.eval_shape(init, params))
        for i in range(len(path))
        for j in range(i, len(path) + 1)
        if path[i:j] in names
    }


def unit_counts(leaf: HostLeaf, frozen: bool) -> tuple[int, int]:
    """Units in A and in B."""
    forward, backward = (int(count) for count in leaf.leaf.counts)
    return forward, forward if frozen else backward


def check_sizes(leaf: HostLeaf, forward: int, backward: int) -> None:
    """Raises SparsityError unless these are the units in A and B that the densities say."""
    expected = {unit_counts(leaf, frozen) for frozen in (False, True)}
    if (forward, backward) not in expected:
        raise SparsityError(
            f"{leaf.path}: always sparse needs sets of fixed size; densities ask for "
            f"{sorted(expected)} units in A and B, the method chose {(forward, backward)}"
        )


def check_reservoir(reservoir: Any, expected: Mapping[str, Any]) -> None:
    """Raises SparsityError unless it is a reservoir of these leaves.

    Args:
      reservoir: may be anything, such as a state that was mistaken for it.
      expected: abstract arrays of the dense shapes, by the name of each sparse leaf.
    """
    if not isinstance(reservoir, hosts.Reservoir):
        raise SparsityError(
            f"reservoir: found a {type(reservoir).__name__}, must be what start or the last "
            "refresh returned"
        )
    check_arrays("reservoir: theta", reservoir.theta, expected)


def check_arrays(what: str, arrays: Any, expected: Mapping[str, Any]) -> None:
    """Raises SparsityError unless `arrays`, by name, have the shapes of `expected`."""
    if not isinstance(arrays, Mapping):
        raise SparsityError(
            f"{what}: found a {type(arrays).__name__}, must be a dict of arrays by the name of "
            "each sparse leaf"
        )
    for name, like in expected.items():
        found = np.shape(arrays[name]) if name in arrays else "nothing"
        if found != like.shape:
            raise SparsityError(f"{what}: {name} must be of shape {like.shape}, found {found}")


def whole_number(name: str, value: Any) -> int:
    """The value as an int; SparsityError unless it is one, not traced, and at least 0."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or number < 0:
        raise SparsityError(f"{name}={value!r}: must be an integer of at least 0, outside jit")
    return number


def leaves_like(
    what: str, tree: Any, treedef: Any, names: Sequence[str], expected: Sequence[Any]
) -> list[Any]:
    """The leaves of a tree that must hold arrays of the expected shapes and types.

    Args:
      what: is being called.
      tree: what it was given.
      treedef: the structure of the parameters.
      names: of their leaves.
      expected: abstract arrays.

    Raises:
      SparsityError: another structure, shape or type, or no arrays.
    """
    try:
        leaves: list[Any] = treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise SparsityError(f"{what}: not a tree of the parameters' structure: {reason}") from None
    for name, leaf, like in zip(names, leaves, expected, strict=True):
        found = _describe(leaf)
        if found != f"{like.dtype}{list(like.shape)}":
            raise SparsityError(
                f"{what}: {name} must be an array {like.dtype}{list(like.shape)}, found {found}"
            )
    return leaves


def _describe(leaf: Any) -> str:
    if is_compact(leaf):
        return "a compact kernel: take values_of(...)"
    if isinstance(leaf, jax.core.Tracer):
        return "a traced one: call it outside jit"
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return f"an abstract one: {leaf}"
    try:
        return f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
    except (TypeError, ValueError):
        return f"a {type(leaf).__name__}"
