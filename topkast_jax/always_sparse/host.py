r"""The host's part: dense θ, the sets, and the choice of new ones.

Outside a refresh the device holds B alone, and θ here is current outside B only. Choosing runs the
method itself on JAX's cpu backend, so that a set is the one that the masked path would choose, bit
for bit and whatever the method.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from topkast_jax.always_sparse.kernel import CompactKernel, from_masks, units_of
from topkast_jax.errors import SparsityError
from topkast_jax.patterns import Block, Unstructured, units_in
from topkast_jax.rules import Leaf
from topkast_jax.sets import BACKWARD, FORWARD, frozen_flags
from topkast_jax.sparsify import Plan

T = TypeVar("T")


class Reservoir(NamedTuple):
    """NumPy arrays in the host's memory, by the name of each sparse leaf.

    Attributes:
      theta: the dense leaf; what it holds on B is as old as the last refresh.
      sets: uint8 of its shape, the flags of `topkast_jax.sets.SparsifyState`.
      memory: what the method remembers.
      chosen: (flags, memory) of the next refresh, chosen ahead; empty unless refreshes are delayed.
    """

    theta: dict[str, np.ndarray]
    sets: dict[str, np.ndarray]
    memory: dict[str, Any]
    chosen: dict[str, tuple[np.ndarray, Any]]


class Move(NamedTuple):
    """How one leaf's units get from the last backward set to the next, `[S, …]` for S layers.

    Attributes:
      source: int32 `[S, b]`; unit j of the next B is unit `source[j]` of the last one, or, where
        that is negative, fresh unit `-1 - source[j]`.
      index: int32 `[S, m]`, places of the fresh units, padded.
      values: `[S, m, *unit]`, θ of the fresh units, padded.
      forward: how many of the b units are in A.
    """

    source: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index
    values: np.ndarray
    forward: int


def host_device() -> jax.Device:
    """The device whose memory is the host's and which chooses sets.

    Raises:
      SparsityError: JAX was told to leave its cpu backend out.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except (RuntimeError, AssertionError):  # JAX asserts that a platform it was given has devices
        raise SparsityError(
            f"always sparse keeps θ in the host's memory through JAX's cpu backend, which "
            f"JAX_PLATFORMS={jax.config.jax_platforms!r} leaves out: add ',cpu' to it"  # type: ignore[attr-defined, unused-ignore]
        ) from None


def check(leaf: Leaf) -> None:
    """Raises SparsityError unless the leaf has a compact form at its density."""
    if not isinstance(leaf.pattern, Block | Unstructured):
        raise SparsityError(
            f"{leaf.path}: pattern {leaf.pattern} has no compact form; allowed: Unstructured(), "
            "Block(rows, cols)"
        )
    if not leaf.shape:
        raise SparsityError(f"{leaf.path} is a scalar, which has no compact form: must be dense")
    units = units_in(leaf.pattern, leaf.shape)
    if leaf.pattern.unit_shape and leaf.forward_density * units < 0.5:
        raise SparsityError(
            f"{leaf.path}: forward density {leaf.forward_density:g} of {units} blocks "
            f"{leaf.pattern} leaves less than one block; must be at least {0.5 / units:g}, or the "
            "blocks smaller, or the leaf dense"
        )


@dataclasses.dataclass(frozen=True)
class HostLeaf:
    """What the host does with one sparse leaf; layers are those of its stacked axes."""

    leaf: Leaf

    @property
    def pattern(self) -> Any:
        """A `Block` or `Unstructured`: `check` saw to it."""
        return self.leaf.pattern

    @functools.cached_property
    def grid(self) -> tuple[int, ...]:
        """Of the units of one layer."""
        return self.leaf.pattern.grid(self.leaf.shape)

    def layers(self, array: np.ndarray) -> np.ndarray:
        """A view `[S, *shape of one layer]`."""
        return array.reshape(-1, *self.leaf.shape)

    def units(self, layer: np.ndarray) -> np.ndarray:
        """A view of one layer by units."""
        return units_of(layer, self.pattern)

    def index(self, flags: np.ndarray) -> tuple[np.ndarray, int]:
        """Units of B, those of A first, both ascending: int32 `[S, b]`, and the size of A."""
        return _same_sizes(self.leaf, [self._layer_index(layer) for layer in self.layers(flags)])

    def _layer_index(self, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        units = self.units(flags)
        first = units if units.ndim == len(self.grid) else units[..., 0, 0]
        kept = first.reshape(-1) & np.uint8(FORWARD | BACKWARD)
        return np.flatnonzero(kept & FORWARD), np.flatnonzero(kept == BACKWARD)

    def gather(self, dense: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The units at `index [S, m]`: `[S, m, *unit]`."""
        rows = zip(self.layers(dense), index, strict=True)
        return np.stack([self.units(x)[np.unravel_index(i, self.grid)] for x, i in rows])

    def scatter(self, dense: np.ndarray, index: np.ndarray, values: np.ndarray) -> None:
        """Writes units `values [S, m, *unit]` at `index [S, m]` into the dense leaf."""
        values = values.reshape(*index.shape, *self.pattern.unit_shape)
        for x, i, v in zip(self.layers(dense), index, values, strict=True):
            self.units(x)[np.unravel_index(i, self.grid)] = v

    def kernel(self, theta: np.ndarray, flags: np.ndarray) -> CompactKernel:
        """The backward set as the device will hold it, in NumPy arrays."""
        layers = self.layers(flags)
        made = from_masks(
            self.layers(theta), layers & FORWARD != 0, layers & BACKWARD != 0, self.pattern, True
        )
        return jax.tree.map(lambda x: x.reshape(*self.leaf.stack, *x.shape[1:]), made)

    def move(self, theta: np.ndarray, old: np.ndarray, new: np.ndarray) -> Move:
        """From old flags to new ones; `theta` must be current on the old backward set."""
        (before, _), (after, forward) = self.index(old), self.index(new)
        place = np.empty(units_in(self.leaf.pattern, self.leaf.shape), np.int32)
        source, fresh = np.empty_like(after), []
        for s, (was, now) in enumerate(zip(before, after, strict=True)):
            place.fill(-1)
            place[was] = np.arange(was.size, dtype=np.int32)
            source[s] = place[now]
            entering = source[s] < 0
            source[s, entering] = -1 - np.arange(np.count_nonzero(entering), dtype=np.int32)
            fresh.append(now[entering])
        index = _padded(fresh, after.shape[1])
        return Move(source, index, self.gather(theta, index), forward)


def _same_sizes(leaf: Leaf, sets: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, int]:
    if len({(a.size, rest.size) for a, rest in sets}) != 1:
        raise SparsityError(
            f"{leaf.path}: layers of a stacked leaf must keep the same number of units each; found "
            f"forward sets of {[a.size for a, _ in sets]}"
        )
    rows = [np.concatenate(pair).astype(np.int32) for pair in sets]
    return np.stack(rows), sets[0][0].size


def _padded(fresh: list[np.ndarray], most: int) -> np.ndarray:
    """Rows filled up with unit 0 to one of few lengths, so that few programs are compiled."""
    need, length = max(row.size for row in fresh), 16
    while length < need:
        length *= 4
    index = np.zeros((len(fresh), min(length, most)), np.int32)
    for row, units in zip(index, fresh, strict=True):
        row[: units.size] = units
    return index


def start(plan: Plan, leaf: Leaf, theta: np.ndarray, frozen: bool) -> tuple[np.ndarray, Any]:
    """First flags and memory of a leaf, on the host."""
    with jax.default_device(host_device()):
        flags, memory = _call(_start, plan, leaf, plan.keys(leaf, 0), theta)
        return np.asarray(frozen_flags(flags) if frozen else flags), jax.device_get(memory)


def choose(
    plan: Plan, leaf: Leaf, step: int, theta: np.ndarray, flags: np.ndarray, memory: Any
) -> tuple[np.ndarray, Any]:
    """Next flags and memory of a leaf from θ after `step` finished steps, on the host."""
    with jax.default_device(host_device()):
        keys = plan.keys(leaf, step)
        new, memory = _call(_change, plan, leaf, keys, np.int32(step), theta, flags, memory)
        return np.asarray(new), jax.device_get(memory)


def freeze(flags: np.ndarray) -> np.ndarray:
    """Flags with B := A."""
    with jax.default_device(host_device()):
        return np.asarray(frozen_flags(flags))  # type: ignore[arg-type]


def writable(reservoir: Reservoir) -> Reservoir:
    """The same, in arrays that may be written to: those of a file may not."""
    own = lambda x: np.require(x, requirements=["C", "W"])  # noqa: E731
    return reservoir._replace(theta={name: own(x) for name, x in reservoir.theta.items()})


def as_precise_as_here(function: Callable[..., T]) -> Callable[..., T]:
    """`function` for another thread, with this thread's answer to whether 64 bits are on."""
    enabled = jax.config.jax_enable_x64  # type: ignore[attr-defined, unused-ignore]

    def there(*args: Any) -> T:
        with jax.enable_x64(enabled):
            return function(*args)

    return there


def in_parallel(function: Any, leaves: Mapping[str, HostLeaf], *columns: Any) -> dict[str, Any]:
    """`function(leaf, *what each column has of it)` for all leaves, by name, in threads."""
    function = as_precise_as_here(function)
    with ThreadPoolExecutor() as pool:
        futures = {
            name: pool.submit(function, leaf, *(column[name] for column in columns))
            for name, leaf in leaves.items()
        }
        return {name: future.result() for name, future in futures.items()}


class _NameRead(Exception):
    """A method looks at a leaf's name."""


class _Nameless(Leaf):
    """Leaves that differ in name alone are equal, and so share a compiled program."""

    def __getattribute__(self, attribute: str) -> Any:
        if attribute == "path":
            raise _NameRead
        return super().__getattribute__(attribute)

    def _rest(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Nameless) and self._rest() == other._rest()

    def __hash__(self) -> int:
        return hash(self._rest())


def _nameless(leaf: Leaf) -> _Nameless:
    return _Nameless(**(vars(leaf) | {"path": ""}))


_reads_names: weakref.WeakSet[Plan] = weakref.WeakSet()


def _call(function: Callable[..., Any], plan: Plan, leaf: Leaf, *arrays: Any) -> Any:
    """A compiled function of a leaf, the same for leaves of any name unless the method asks."""
    if plan not in _reads_names:
        try:
            return function(plan, _nameless(leaf), *arrays)
        except _NameRead:
            _reads_names.add(plan)
    return function(plan, leaf, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(plan: Plan, leaf: Leaf, keys: jax.Array, theta: jax.Array) -> Any:
    return plan.start(leaf, keys, theta)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _change(
    plan: Plan, leaf: Leaf, keys: jax.Array, step: Any, theta: Any, flags: Any, memory: Any
) -> Any:
    return plan.change(leaf, keys, step, theta, None, flags, memory)
