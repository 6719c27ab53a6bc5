"""What the device does at a refresh: a gather brings each array to the next backward set.

`unit_axes` says which arrays of an optimizer's state those are, whatever the optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.always_sparse.host import Move
from topkast_jax.always_sparse.kernel import CompactKernel
from topkast_jax.errors import SparsityError
from topkast_jax.method import Leaf
from topkast_jax.trees import flatten

Path = tuple[Any, ...]
Place = Callable[[tuple[int, ...]], jax.sharding.Sharding]


def unit_axes(
    init: Callable[[Any], Any], values: Any, leaves: Mapping[str, Leaf | None]
) -> dict[Path, tuple[int, int]]:
    """Which axis of which array of an optimizer's state numbers the units of which leaf.

    An array does if with one unit fewer it would be shorter by one along one axis. Nothing asks
    which optimizer it is, nor where in its state the array lies.

    Args:
      init: of the optimizer.
      values: abstract tree of values.
      leaves: by path, in flattening order; None where a leaf is dense.

    Returns:
      Path in the state → (number of the leaf, axis).

    Raises:
      SparsityError: an array depends on the units in a way that a refresh cannot follow.
    """
    shapes = _shapes_of(init, values)
    arrays, treedef = flatten(values)
    axes = {}
    for number, (name, leaf) in enumerate(leaves.items()):
        if leaf is None:
            continue
        fewer = list(arrays)
        fewer[number] = _without_one_unit(arrays[number], len(leaf.stack))
        others = _shapes_of(init, treedef.unflatten(fewer))
        for path, shape in shapes.items():
            if others.get(path) != shape:
                units = arrays[number].shape[len(leaf.stack)]
                axis = _unit_axis(shape, others.get(path), leaf.stack, units)
                if axis is None:
                    raise SparsityError(
                        f"the inner optimizer's state{jax.tree_util.keystr(path)} {shape} depends "
                        f"on the units of {name} in a way that a refresh cannot follow: take "
                        "another optimizer, or pattern"
                    )
                axes[path] = number, axis
    return axes


def _shapes_of(init: Callable[[Any], Any], values: Any) -> dict[Path, tuple[int, ...]]:
    state = jax.eval_shape(init, values)
    return {path: x.shape for path, x in jax.tree_util.tree_leaves_with_path(state)}


def _without_one_unit(values: jax.ShapeDtypeStruct, stack: int) -> jax.ShapeDtypeStruct:
    *layers, units = values.shape[: stack + 1]
    return jax.ShapeDtypeStruct((*layers, units - 1, *values.shape[stack + 1 :]), values.dtype)


def _unit_axis(
    shape: tuple[int, ...], fewer: tuple[int, ...] | None, stack: tuple[int, ...], units: int
) -> int | None:
    """The axis that is shorter by one with one unit fewer; None if that is not all that differs."""
    if fewer is None or len(fewer) != len(shape):
        return None
    differ = [i for i, pair in enumerate(zip(shape, fewer, strict=True)) if len({*pair}) > 1]
    if len(differ) != 1:
        return None
    (axis,) = differ
    first = axis - len(stack)
    numbers_units = shape[axis] == units == fewer[axis] + 1
    return axis if first >= 0 and shape[first:axis] == stack and numbers_units else None


def first_arrays(
    init: Callable[[Any], Any], axes: dict[Path, tuple[int, int]], number: int, values: Any
) -> Callable[[Any], dict[str, jax.Array]]:
    """What an optimizer's `init` makes of one leaf: its values → arrays by `keystr` of their paths.

    Compiled for this leaf alone, so that no others take memory: of `values`, the abstract tree, all
    others are zeros there.
    """
    others, treedef = flatten(values)

    def first(mine_alone: Any) -> dict[str, jax.Array]:
        arrays = [jnp.zeros(x.shape, x.dtype) for x in others]
        arrays[number] = mine_alone
        state = jax.tree_util.tree_leaves_with_path(init(treedef.unflatten(arrays)))
        mine = {path for path, (of, _) in axes.items() if of == number}
        return {jax.tree_util.keystr(path): x for path, x in state if path in mine}

    return jax.jit(first)


def sent(source: np.ndarray | jax.Array, stack: tuple[int, ...], like: jax.Array) -> jax.Array:
    """`Move.source` on the devices of `like`, with a layer axis if the leaf is stacked."""
    if isinstance(source, jax.Array):
        return source
    source, sharding = source.reshape(*stack, -1), like.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.make_array_from_callback(source.shape, sharding, source.__getitem__)


@dataclasses.dataclass(frozen=True)
class Mover:
    """Moves what the device holds of one leaf to the next backward set.

    Attributes:
      move: from the last set to the next.
      stack: the leaf's stacked axes.
      place: shape → sharding, or None.
      like: an array on the devices that all of it is on.
      keeps: whether an array must outlive its move: somebody else holds it too.
    """

    move: Move
    stack: tuple[int, ...]
    place: Place | None
    like: jax.Array
    keeps: Callable[[jax.Array], bool]

    @functools.cached_property
    def source(self) -> jax.Array:
        """`Move.source` on the device, sent once."""
        return sent(self.move.source, self.stack, self.like)

    def places(self, kernel: CompactKernel) -> CompactKernel:
        """A kernel without values, at its new places."""
        index = self._moved(kernel.index, self.move.index.reshape(*self.stack, -1))
        return dataclasses.replace(kernel, index=index, forward=self.move.forward)

    def values(self, values: jax.Array) -> jax.Array:
        """Values that stay, and those of the fresh units."""
        fresh = self.move.values
        return self._moved(values, fresh.reshape(*self.stack, *fresh.shape[1:]))

    def moment(self, moment: jax.Array, first: jax.Array, axis: int) -> jax.Array:
        """A moment with units along `axis`: for fresh ones what `first` holds in their places."""
        return self._moved(moment, first, axis, True)

    def carry(self, array: jax.Array) -> jax.Array:
        """An array of the values' shape: zero for the fresh ones."""
        rest = array.shape[len(self.stack) + 1 :]
        return self._moved(array, np.zeros((*self.stack, 1, *rest), array.dtype))

    def _moved(
        self, array: jax.Array, fresh: Any, axis: int | None = None, in_place: bool = False
    ) -> jax.Array:
        axis = len(self.stack) if axis is None else axis
        shape = (*array.shape[:axis], self.source.shape[-1], *array.shape[axis + 1 :])
        sharding = None if self.place is None else self.place(shape)
        donate = shape == array.shape and not self.keeps(array)
        moved = _compiled(len(self.stack), axis - len(self.stack), in_place, sharding, donate)
        return moved(array, self.source, fresh)


@functools.lru_cache
def _compiled(
    stack: int, above: int, in_place: bool, sharding: Any, donate: bool
) -> Callable[..., jax.Array]:
    """The move of an array `[*above axes, *stack axes, units, …]`.

    `fresh` holds the fresh units in their places, or in the order in which `source` numbers them.
    """

    def move(array: jax.Array, source: jax.Array, fresh: jax.Array) -> jax.Array:
        stays = (source >= 0).reshape(-1, *(1,) * (array.ndim - 1))
        old = array.at[jnp.maximum(source, 0)].get(mode="promise_in_bounds")
        number = jnp.clip(-1 - source, 0, fresh.shape[0] - 1)
        new = fresh if in_place else fresh.at[number].get(mode="promise_in_bounds")
        return jnp.where(stays, old, new)

    for _ in range(stack):
        move = jax.vmap(move)
    for _ in range(above):
        move = jax.vmap(move, in_axes=(0, None, 0 if in_place else None))
    return jax.jit(move, out_shardings=sharding, donate_argnums=0 if donate else ())
