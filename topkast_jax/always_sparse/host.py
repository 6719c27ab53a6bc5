r"""The host's part: dense θ, the sets, and the choice of new ones.

Outside a refresh the device holds B alone, and θ here is current outside B only. Choosing runs the
method itself on JAX's cpu backend, so that each set is the one that a masked run would choose, for
any method.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from topkast_jax.always_sparse.kernel import CompactKernel, units_of
from topkast_jax.choosing import (
    Chooser,
    Static,
    allocated,
    choose_leaf,
    kind_of,
    layer_keys,
    leaf_keys,
    leaf_of,
    over_stack,
)
from topkast_jax.errors import SparsityError
from topkast_jax.flags import BACKWARD, FORWARD, frozen_flags
from topkast_jax.method import Counts, Leaf, enters_anew
from topkast_jax.patterns import Block, units_in
from topkast_jax.sparsify import Plan

T = TypeVar("T")
Task = Callable[[], Any]
_AT_ONCE = 2**17  # flags whose temporaries stay in the cache of a core


class Reservoir(NamedTuple):
    """NumPy arrays in the host's memory, by the name of each sparse leaf.

    Attributes:
      theta: the dense leaf; what it holds on B is as old as the last refresh.
      sets: uint8 of its shape, the flags of `topkast_jax.sets.SparsifyState`.
      memory: what the method remembers of the leaf: a tree of NumPy arrays, stacked axes in front.
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
      index: int32 `[S, m]`, indices of the fresh units, padded.
      values: `[S, m, *unit]`, θ of the fresh units, padded.
      forward: how many of the b units are in A.
      leaving: for each layer, if asked for, the units that leave B: their numbers in the last one
        and their indices.
    """

    source: np.ndarray | jax.Array
    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index
    values: np.ndarray
    forward: int
    leaving: list[tuple[np.ndarray, np.ndarray]]


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


def check(host: HostLeaf) -> None:
    """Raises SparsityError unless the leaf has a compact representation at its density."""
    leaf = host.leaf
    if leaf.pattern.unit_shape and not isinstance(leaf.pattern, Block):
        raise SparsityError(
            f"{host.path}: pattern {leaf.pattern} has no compact form; allowed: patterns of single "
            "entries, and Block(rows, cols)"
        )
    if not leaf.shape:
        raise SparsityError(f"{host.path} is a scalar, which has no compact form: must be dense")
    if leaf.axes != tuple(range(len(leaf.axes))):
        raise SparsityError(
            f"{host.path}: stacked axes {leaf.axes} have no compact form; allowed: leading axes "
            "in order"
        )
    if 0 in leaf.stack:
        raise SparsityError(
            f"{host.path}: a stack of 0 layers has no compact form, found shape {leaf.full_shape}: "
            "must be dense"
        )
    units = units_in(leaf.pattern, leaf.shape)
    density = float(leaf.forward_density)
    if leaf.pattern.unit_shape and density * units < 0.5:
        raise SparsityError(
            f"{host.path}: forward density {density:g} of {units} blocks "
            f"{leaf.pattern} leaves less than one block; must be at least {0.5 / units:g}, or the "
            "blocks smaller, or the leaf dense"
        )


@dataclasses.dataclass(frozen=True)
class HostLeaf:
    """What the host does with one sparse leaf; layers are those of its stacked axes.

    Attributes:
      path: its place in the tree.
      leaf: what does not change about it.
    """

    path: str
    leaf: Leaf

    @property
    def pattern(self) -> Any:
        """A `Block` or a pattern of single entries: `check` saw to it."""
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
        sets = [self._layer_index(layer) for layer in self.layers(flags)]
        self._check_same(sets)
        return np.stack([units for units, _ in sets]), sets[0][1]

    def _layer_index(self, flags: np.ndarray) -> tuple[np.ndarray, int]:
        units = self.units(flags)
        first = units if units.ndim == len(self.grid) else units[..., 0, 0]
        flat = np.ravel(first)
        forward: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for start in range(0, flat.size, _AT_ONCE):
            kept = flat[start : start + _AT_ONCE] & np.uint8(FORWARD | BACKWARD)
            # NumPy finds what is True in an array of bool much faster than what is not 0.
            for found, places in ((forward, kept & FORWARD != 0), (rest, kept == BACKWARD)):
                found.append((np.flatnonzero(places) + start).astype(np.int32))
        return np.concatenate([*forward, *rest]), sum(places.size for places in forward)

    def _check_same(self, sets: Sequence[tuple[np.ndarray, int]]) -> None:
        if len({(units.size, forward) for units, forward in sets}) != 1:
            raise SparsityError(
                f"{self.path}: layers of a stacked leaf must keep the same number of units each; "
                f"found forward sets of {[forward for _, forward in sets]}"
            )

    def _at(self, layer: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, Any]:
        """A view of one layer, and the NumPy index with which it gives the units at `index`."""
        if self.pattern.unit_shape:
            return self.units(layer), np.unravel_index(index, self.grid)
        return layer.reshape(-1), index

    def gather(self, dense: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The units at `index [S, m]`: `[S, m, *unit]`."""
        found = np.empty((*index.shape, *self.pattern.unit_shape), dense.dtype)

        for layer, places, row in zip(self.layers(dense), index, found, strict=True):
            units, at = self._at(layer, places)
            row[...] = units[at]
        return found

    def writes(self, dense: np.ndarray, index: np.ndarray, values: np.ndarray) -> list[Task]:
        """What `in_threads` does to bring units into the dense leaf, one task a layer.

        Args:
          dense: is written to.
          index: indices of the units, `[*stack, m]`.
          values: the units, `[*stack, m, *unit]`.
        """
        index = index.reshape(-1, index.shape[-1])
        values = values.reshape(*index.shape, *self.pattern.unit_shape)
        rows = zip(self.layers(dense), index, values, strict=True)
        return [functools.partial(self._write, *row) for row in rows]

    def _write(self, layer: np.ndarray, index: np.ndarray, values: np.ndarray) -> None:
        units, places = self._at(layer, index)
        units[places] = values

    def write_leaving(self, theta: np.ndarray, move: Move, values: np.ndarray) -> None:
        """Makes θ current on the units that leave B with a move."""
        values = values.reshape(-1, *values.shape[len(self.leaf.stack) :])
        for layer, (numbers, places), held in zip(
            self.layers(theta), move.leaving, values, strict=True
        ):
            self._write(layer, places, held[numbers])

    def kernel(self, theta: np.ndarray, flags: np.ndarray) -> CompactKernel:
        """The backward set as the device will hold it, in NumPy arrays."""
        index, forward = self.index(flags)
        values = self.gather(theta, index)
        return CompactKernel(
            values.reshape(*self.leaf.stack, *values.shape[1:]),  # type: ignore[arg-type]
            index.reshape(*self.leaf.stack, -1),  # type: ignore[arg-type]
            self.leaf.shape, self.leaf.pattern, forward,
        )  # fmt: skip

    def _moved_layers(
        self, index: np.ndarray, old: np.ndarray, new: np.ndarray, leaving: bool
    ) -> list[Task]:
        rows = zip(
            index.reshape(-1, index.shape[-1]), self.layers(old), self.layers(new), strict=True
        )
        return [functools.partial(self._move_layer, *row, leaving) for row in rows]

    def _move(self, theta: np.ndarray, layers: list[tuple[Any, ...]]) -> Move:
        """The parts of the layers are taken out of `layers`, so that none is held twice."""
        self._check_same([(source, forward) for source, forward, _, _ in layers])
        _, forward, fresh, left = zip(*layers, strict=True)
        source = np.empty((len(layers), layers[0][0].size), np.int32)
        for row in source:
            row[...] = layers.pop(0)[0]
        first = 4 if self.pattern.unit_shape else 16  # A block is large.
        index = _padded(fresh, first, source.shape[-1])
        return Move(source, index, self.gather(theta, index), forward[0], list(left))

    def _move_layer(
        self, was: np.ndarray, old: np.ndarray, new: np.ndarray, leaving: bool
    ) -> tuple[Any, ...]:
        now, forward = self._layer_index(new)
        number = np.empty(units_in(self.leaf.pattern, self.leaf.shape), np.int32)
        number[was] = np.arange(was.size, dtype=np.int32)
        source = number[now]
        entering = np.flatnonzero(self._in_b(old, now) == 0)
        source[entering] = -1 - np.arange(entering.size, dtype=np.int32)
        # No view of what the device holds: with one it could not be moved in place.
        left = np.flatnonzero(self._in_b(new, was) == 0) if leaving else np.empty(0, np.intp)
        return source, forward, now[entering], (left, was[left])

    def entered(self, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Which units of the new B, in the order of `index`, were not in the old one: `[S, b]`."""
        rows = zip(self.layers(old), self.index(new)[0], strict=True)
        return np.stack([self._in_b(layer, index) == 0 for layer, index in rows])

    def _in_b(self, flags: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Not 0 where the units at `index` of one layer are in B."""
        units, places = self._at(flags, index)
        found = units[places]
        return (found[..., 0, 0] if self.pattern.unit_shape else found) & np.uint8(BACKWARD)


def moves(
    leaves: Mapping[str, HostLeaf],
    theta: Mapping[str, np.ndarray],
    index: Mapping[str, np.ndarray],
    old: Mapping[str, np.ndarray],
    new: Mapping[str, np.ndarray],
    leaving: bool = False,
) -> dict[str, Move]:
    """From the sets that the device holds to others, of the leaves in `new`, by name.

    Args:
      leaves: at least those in `new`, as in all that follows.
      theta: dense; must be current on the units that enter B.
      index: the indices of the units that the device holds, in their order, `[*stack, b]`.
      old: the flags of the same.
      new: the flags of what the device will hold.
      leaving: whether to say which units leave B.
    """
    tasks = {n: leaves[n]._moved_layers(index[n], old[n], new[n], leaving) for n in new}
    done = in_threads([task for of_leaf in tasks.values() for task in of_leaf])
    return {n: leaves[n]._move(theta[n], [done.pop(0) for _ in tasks[n]]) for n in new}


def _padded(fresh: Sequence[np.ndarray], first: int, most: int) -> np.ndarray:
    """Rows filled up with unit 0 to `first`, 4, 16, … times as many: few programs are compiled."""
    need, length = max(row.size for row in fresh), first
    while length < need:
        length *= 4
    index = np.zeros((len(fresh), min(length, most)), np.int32)
    for row, units in zip(index, fresh, strict=True):
        row[: units.size] = units
    return index


class Choice:
    """Chooses on the host: the method itself on JAX's cpu backend, one program a kind of leaf."""

    def __init__(self, plan: Plan, leaves: Mapping[str, HostLeaf]):
        self._method = plan.method
        self._leaves = leaves
        with jax.default_device(host_device()):
            chooser = Chooser.of(plan.method, {p: h.leaf for p, h in leaves.items()}, plan.seed)
            self.chooser = jax.device_get(chooser)

    def first_memory(self, host: HostLeaf, theta: Any) -> Any:
        """Shapes and types of what the method remembers about a leaf."""
        one = functools.partial(_choose, self.chooser.frame, Static(kind_of(host.leaf)), True)
        keys = jax.eval_shape(lambda: layer_keys(self.chooser.keys(0)[0], host.leaf))
        count: Any = jax.ShapeDtypeStruct(host.leaf.stack, np.int32)
        counts = Counts(count, count)
        return jax.eval_shape(one, self.chooser.numbers, theta, None, None, None, counts, keys, 0)[
            1
        ]

    def __call__(
        self,
        step: int,
        theta: dict[str, np.ndarray],
        sets: dict[str, np.ndarray] | None = None,
        memory: dict[str, Any] | None = None,
        gradients: dict[str, np.ndarray] | None = None,
    ) -> dict[str, tuple[np.ndarray, Any]]:
        """Flags and memory of each leaf after `step` finished steps; without sets, the first.

        `gradients`: dense ones, for a method that chooses by them.
        """
        parts = self.in_groups([tuple(theta)], step, theta, sets, memory, gradients)
        return next(iter(parts))

    def in_groups(
        self,
        groups: Sequence[tuple[str, ...]],
        step: int,
        theta: dict[str, np.ndarray],
        sets: dict[str, np.ndarray] | None = None,
        memory: dict[str, Any] | None = None,
        gradients: dict[str, np.ndarray] | None = None,
    ) -> Iterable[dict[str, tuple[np.ndarray, Any]]]:
        """The same for one group of leaves after another, each chosen when it is asked for.

        Each layer of a stacked leaf is chosen on its own, so that none waits for another.
        """
        if not self._method.needs_gradient:
            gradients = None
        with jax.default_device(host_device()):
            counts = self._counts(np.int32(step), theta, sets, memory)
        empty = dict.fromkeys(theta)
        columns = theta, gradients or empty, sets or empty, memory or empty, counts
        for group in groups:
            yield self._of_group(group, step, sets is None, columns)

    def _of_group(
        self, group: tuple[str, ...], step: int, first: bool, columns: tuple[Any, ...]
    ) -> dict[str, tuple[np.ndarray, Any]]:
        flags = {name: np.empty(columns[0][name].shape, np.uint8) for name in group}

        def choose(kind: Static, into: np.ndarray, key: Any, here: tuple[Any, ...]) -> Any:
            with jax.default_device(host_device()):
                new, remembered = _choose(
                    self.chooser.frame, kind, first, self.chooser.numbers, *here, key,
                    np.int32(step),
                )  # fmt: skip
                into[...] = new
                return jax.device_get(remembered)

        tasks: dict[str, list[Task]] = {}
        for name in group:
            host = self._leaves[name]
            kind = Static(kind_of(dataclasses.replace(host.leaf, stack=(), axes=())))
            with jax.default_device(host_device()):
                own = leaf_keys(self.chooser.seed, [name], step)[0]
                keys = layer_keys(own, host.leaf).reshape(-1)
            rows = _by_layer(tuple(column[name] for column in columns), host)
            layers = zip(host.layers(flags[name]), keys, rows, strict=True)
            tasks[name] = [functools.partial(choose, kind, *layer) for layer in layers]
        remembered = iter(in_threads([task for of_leaf in tasks.values() for task in of_leaf]))
        result = {}
        for name in group:
            stack, found = self._leaves[name].leaf.stack, [next(remembered) for _ in tasks[name]]
            whole = jax.tree.map(lambda *x, stack=stack: _whole(x, stack), *found)
            result[name] = flags[name], whole
        return result

    def _counts(self, step: Any, theta: Any, sets: Any, memory: Any) -> dict[str, Counts]:
        chooser = self.chooser
        # A method that allocates, which alone would need keys, is refused by `check_plan`.
        counts = allocated(chooser.method, chooser.leaves, theta, None, sets, memory, {}, step)
        found: dict[str, Counts] = jax.device_get(counts)
        return found

    def enter(self, theta: dict[str, np.ndarray], old: Any, new: Any) -> None:
        """Writes into θ what the method gives to entries that have just entered B."""
        if not enters_anew(self._method):
            return

        def enter(host: HostLeaf, theta: np.ndarray, old: np.ndarray, new: np.ndarray) -> None:
            enters = (new & BACKWARD != 0) & (old & BACKWARD == 0)
            with jax.default_device(host_device()):
                fresh = over_stack(lambda x: self._method.enter(x, host.leaf), host.leaf)(theta)
            theta[enters] = np.asarray(fresh)[enters]

        for name in new:
            enter(self._leaves[name], theta[name], old[name], new[name])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _choose(
    frame: Static,
    kind: Static,
    first: bool,
    numbers: Any,
    theta: Any,
    grad: Any,
    flags: Any,
    memory: Any,
    counts: Any,
    keys: Any,
    step: Any,
) -> Any:
    leaf = leaf_of(kind.value, counts)
    return choose_leaf(frame, leaf, first, theta, grad, flags, memory, counts, keys, step, numbers)


def freeze(flags: np.ndarray) -> np.ndarray:
    """Flags with B := A."""
    with jax.default_device(host_device()):
        return np.asarray(frozen_flags(flags))  # type: ignore[arg-type]


def writable(reservoir: Reservoir) -> Reservoir:
    """The same, in arrays that may be written to: those of a file may not."""
    own = lambda x: np.require(x, requirements=["C", "W"])  # noqa: E731
    return reservoir._replace(theta={name: own(x) for name, x in reservoir.theta.items()})


def as_precise_as_here(function: Callable[..., T]) -> Callable[..., T]:
    """`function` for another thread, with this thread's types and random numbers.

    What a thread has set by a context manager (`jax.enable_x64`, `jax.threefry_partitionable`,
    `jax.default_prng_impl`) holds in no other.
    """
    config: Any = jax.config
    enabled, partitionable, generator = (
        config.jax_enable_x64, config.jax_threefry_partitionable, config.jax_default_prng_impl,
    )  # fmt: skip

    def there(*args: Any) -> T:
        with (
            jax.enable_x64(enabled),
            jax.threefry_partitionable(partitionable),
            jax.default_prng_impl(generator),
        ):
            return function(*args)

    return there


class Copies:
    """Copies of the arrays of a CPU device, in memory that is used again.

    To allocate new memory for each copy would take longer than the copy itself.
    """

    def __init__(self, kept: Iterable[str]):
        """The memory of the arrays of these names is kept."""
        self._held: dict[str, np.ndarray] = {}
        self._kept = tuple(kept)

    def of(self, arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        """Copies by name, valid until the next call."""
        copies, tasks = {}, []
        for name, array in arrays.items():
            held = self._held.get(name)
            if held is None or (held.shape, held.dtype) != (array.shape, array.dtype):
                held = np.empty(array.shape, array.dtype)
            # Unlike `np.asarray`, the array does not keep this view: it may be donated again.
            view = np.from_dlpack(array)  # type: ignore[arg-type]
            tasks.append(functools.partial(np.copyto, held, view))
            copies[name] = held
        self._held = {name: copies[name] for name in self._kept}
        in_threads(tasks)
        return copies

    @property
    def kept(self) -> bool:
        """Whether memory is held."""
        return bool(self._held)

    @staticmethod
    def takes(array: jax.Array) -> bool:
        """Whether NumPy can look at an array without copying it."""
        devices = array.devices()
        return (
            array.dtype in (np.float32, np.float64)
            and len(devices) == 1
            and next(iter(devices)).platform == "cpu"
        )


def in_threads(tasks: Sequence[Task]) -> list[Any]:
    """What the tasks return, in order; as many at once as this process may use cores.

    If a task raises an exception, it is raised here after all tasks have ended. No task may call
    this function.
    """
    there = as_precise_as_here(lambda task: task())
    running = [_pool().submit(there, task) for task in tasks]
    wait(running)
    return [task.result() for task in running]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """One for all: the memory that a thread has freed serves that thread alone."""
    return ThreadPoolExecutor(cores(), "topkast")


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _by_layer(columns: tuple[Any, ...], host: HostLeaf) -> list[tuple[Any, ...]]:
    """What each column has of each layer of a leaf; its stacked axes are in front."""
    stack = host.leaf.stack
    flat = jax.tree.map(lambda x: np.reshape(x, (-1, *np.shape(x)[len(stack) :])), columns)
    layers = math.prod(stack)
    return [jax.tree.map(lambda x, s=s: x[s], flat) for s in range(layers)]


def _whole(layers: Sequence[Any], stack: tuple[int, ...]) -> np.ndarray:
    """The inverse of `_by_layer` for one array."""
    return np.reshape(np.stack(layers), (*stack, *np.shape(layers[0])))
