r"""The host's part: dense θ, the sets, and the choice of new ones.

Outside a refresh the device holds B alone, and θ here is current outside B only. Choosing runs the
method itself on JAX's cpu backend, so that a set is the one that the masked path would choose, bit
for bit and whatever the method.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from topkast_jax.always_sparse.kernel import CompactKernel, from_masks, units_of
from topkast_jax.choosing import (
    Chooser,
    Static,
    allocated,
    choose_leaf,
    kind_of,
    layer_keys,
    leaf_of,
    over_stack,
)
from topkast_jax.errors import SparsityError
from topkast_jax.flags import BACKWARD, FORWARD, frozen_flags
from topkast_jax.method import Counts, Leaf, enters_anew
from topkast_jax.patterns import Block, units_in
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


def check(host: HostLeaf) -> None:
    """Raises SparsityError unless the leaf has a compact form at its density."""
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
        return _same_sizes(self.path, [self._layer_index(layer) for layer in self.layers(flags)])

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


def _same_sizes(path: str, sets: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, int]:
    if len({(a.size, rest.size) for a, rest in sets}) != 1:
        raise SparsityError(
            f"{path}: layers of a stacked leaf must keep the same number of units each; found "
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
        keys = jax.eval_shape(lambda: layer_keys(0, [host.path], host.leaf, 0)[0])
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
        if not self._method.needs_gradient:
            gradients = None
        with jax.default_device(host_device()):
            counts = self._counts(np.int32(step), theta, sets, memory)
        empty = dict.fromkeys(theta)
        columns = theta, gradients or empty, sets or empty, memory or empty, counts

        def choose(
            host: HostLeaf, theta: Any, grad: Any, flags: Any, memory: Any, counts: Counts
        ) -> Any:
            chooser = self.chooser
            with jax.default_device(host_device()):
                keys = layer_keys(chooser.seed, [host.path], host.leaf, step)[0]
                new, remembered = _choose(
                    chooser.frame, Static(kind_of(host.leaf)), sets is None, chooser.numbers,
                    theta, grad, flags, memory, counts, keys, np.int32(step),
                )  # fmt: skip
                return np.asarray(new), jax.device_get(remembered)

        return in_parallel(choose, self._leaves, *columns)

    def _counts(self, step: Any, theta: Any, sets: Any, memory: Any) -> dict[str, Counts]:
        chooser = self.chooser
        counts = allocated(
            chooser.method, chooser.leaves, theta, None, sets, memory, chooser.seed, step
        )
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

        in_parallel(enter, self._leaves, theta, old, new)


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
