"""What the device does at a refresh: a gather brings each array to the next backward set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.always_sparse.host import Move
from topkast_jax.always_sparse.kernel import CompactKernel
from topkast_jax.errors import SparsityError
from topkast_jax.inner_state import map_parameter_shaped

Place = Callable[[tuple[int, ...]], jax.sharding.Sharding]
Home = jax.sharding.Sharding | None
Spares = dict[Any, jax.Array]


def check_wrapper(init: Callable[[Any], Any], values: Any, leaves: Any) -> None:
    """Raises SparsityError unless all that a wrapper remembers of units starts at zero.

    Units that enter B get zeros there. An array that starts otherwise holds copies of parameters as
    a rule (schedule-free, Mechanic). With these, a wrapper also moves entries that have left B,
    which an always-sparse run cannot.

    Args:
      init: makes what is around the state of the always-sparse transform.
      values: abstract tree of values.
      leaves: a tree of its structure, None where a leaf is dense.
    """

    def remembered(value: Any) -> dict[str, jax.Array]:
        here = jax.tree.map(lambda x: jnp.full(x.shape, value).astype(x.dtype), values)
        return {path: jnp.ravel(x)[:1] for path, x in remembered_units(init(here), here, leaves)}

    if jax.eval_shape(remembered, 0.5):
        for path, first in jax.jit(remembered)(0.5).items():
            if np.any(first):
                raise SparsityError(
                    f"a wrapper's state{path} is not zero at first, so that units that enter B "
                    "cannot start there: make the wrapper the inner optimizer, as in "
                    "top_kast(wrapper(...), ...), or take a wrapper whose arrays start at zero"
                )


def remembered_units(outside: Any, params: Any, leaves: Any) -> list[tuple[str, Any]]:
    """What an optimizer's state holds in the shape of the leaves that are not None in `leaves`.

    Returns:
      Pairs of `keystr` of a path in the state and the array.
    """
    is_marked = lambda node: isinstance(node, _Remembered)  # noqa: E731
    marked = map_parameter_shaped(lambda array, _: _Remembered(array), outside, params, leaves)
    found = jax.tree_util.tree_leaves_with_path(marked, is_leaf=is_marked)
    return [(jax.tree_util.keystr(path), x.array) for path, x in found if is_marked(x)]


@dataclasses.dataclass(frozen=True)
class _Remembered:
    array: Any


def committed(array: Any) -> Home:
    """The sharding of an array that is committed to its devices, None of any other.

    The functions that JAX compiles tell committed arrays from others. What is computed of arrays
    that are not committed must not be either, or the next step would be compiled again.
    """
    return array.sharding if isinstance(array, jax.Array) and array.committed else None


def sent(source: np.ndarray | jax.Array, stack: tuple[int, ...], home: Home) -> jax.Array:
    """`Move.source` on the devices of a leaf's values, with a layer axis if the leaf is stacked."""
    if isinstance(source, jax.Array):
        return source
    source = source.reshape(*stack, -1)
    if home is None:
        return jnp.asarray(source)
    if isinstance(home, jax.sharding.NamedSharding):
        home = jax.sharding.NamedSharding(home.mesh, jax.sharding.PartitionSpec())
    return jax.make_array_from_callback(source.shape, home, source.__getitem__)


@dataclasses.dataclass(frozen=True)
class Mover:
    """Moves what the device holds of one leaf to the next backward set.

    Attributes:
      move: from the last set to the next.
      stack: the leaf's stacked axes.
      place: shape → sharding, or None.
      home: what its values are committed to.
      keeps: whether an array must outlive its move: somebody else holds it too.
      spares: arrays that are no longer used, into which others of their kind are moved; None: an
        array is moved in place.
    """

    move: Move
    stack: tuple[int, ...]
    place: Place | None
    home: Home
    keeps: Callable[[jax.Array], bool]
    spares: Spares | None = None

    @functools.cached_property
    def source(self) -> jax.Array:
        """`Move.source` on the device, sent once."""
        return sent(self.move.source, self.stack, self.home)

    @functools.cached_property
    def fresh(self) -> np.ndarray:
        """θ of the fresh units, `[*stack, m, …]`."""
        return self.move.values.reshape(*self.stack, *self.move.values.shape[1:])

    def places(self, kernel: CompactKernel) -> CompactKernel:
        """A kernel without values, with its new indices."""
        index = self._moved(kernel.index, self.move.index.reshape(*self.stack, -1))
        return dataclasses.replace(kernel, index=index, forward=self.move.forward)

    def values(self, values: jax.Array) -> jax.Array:
        """Values that stay, and those of the fresh units."""
        return self._moved(values, self.fresh)

    def moment(self, moment: jax.Array, first: jax.Array, axis: int) -> jax.Array:
        """A moment with units along `axis`; `first` are those of the fresh ones."""
        return self._moved(moment, first, axis)

    def carry(self, array: jax.Array) -> jax.Array:
        """An array of the values' shape: zero for the fresh ones."""
        rest = array.shape[len(self.stack) + 1 :]
        return self._moved(array, np.zeros((*self.stack, 1, *rest), array.dtype))

    def _moved(self, array: jax.Array, fresh: Any, axis: int | None = None) -> jax.Array:
        if not isinstance(array, jax.Array):  # It comes from a file.
            array = jax.device_put(array, self._sharding(array.shape))
        axis = len(self.stack) if axis is None else axis
        shape = (*array.shape[:axis], self.source.shape[-1], *array.shape[axis + 1 :])
        sharding = self._sharding(shape)
        donate = shape == array.shape and not self.keeps(array)
        if donate and self.spares is not None:
            home = committed(array)
            kind = (shape, array.dtype, home)
            spare = self.spares.pop(kind, None)
            if spare is None:
                spare = jnp.zeros(shape, array.dtype, device=home)
            moved = _compiled_apart(len(self.stack), axis, sharding)(
                spare, array, self.source, fresh
            )
            self.spares[kind] = array
            return moved
        return _compiled(len(self.stack), axis, sharding, donate)(array, self.source, fresh)

    def _sharding(self, shape: tuple[int, ...]) -> Home:
        return None if self.place is None else self.place(shape)


@functools.lru_cache
def _compiled_apart(stack: int, axis: int, sharding: Any) -> Callable[..., jax.Array]:
    """The same move, of all layers at once into the memory of a spare array, the first argument."""
    above = axis - stack

    def move(spare: jax.Array, array: jax.Array, source: jax.Array, fresh: jax.Array) -> jax.Array:
        del spare
        one = functools.partial(_moved_layer, above)
        for _ in range(stack):
            one = jax.vmap(one, in_axes=(above, 0, above), out_axes=above)
        return one(array, source, jnp.asarray(fresh))

    # The spare is written to, though nothing of it is read.
    return jax.jit(move, out_shardings=sharding, donate_argnums=0, keep_unused=True)


def _moved_layer(above: int, array: jax.Array, source: jax.Array, fresh: jax.Array) -> jax.Array:
    """One layer `[…, units, …]` after the move."""

    def at(units: jax.Array, numbers: jax.Array) -> jax.Array:
        return units.at[(*(slice(None),) * above, numbers)].get(mode="promise_in_bounds")

    stays = (source >= 0).reshape(-1, *(1,) * (array.ndim - above - 1))
    number = jnp.clip(-1 - source, 0, fresh.shape[above] - 1)
    return jnp.where(stays, at(array, jnp.maximum(source, 0)), at(fresh, number))


@functools.lru_cache
def _compiled(stack: int, axis: int, sharding: Any, donate: bool) -> Callable[..., jax.Array]:
    """The move of an array `[…, *stack axes, units, …]` with units along `axis`.

    Layer after layer, so that an array which keeps its size is moved in place: it never needs new
    memory for more than one layer. `fresh` holds the fresh units in the order in which `source`
    numbers them.
    """
    above = axis - stack

    def move(array: jax.Array, source: jax.Array, fresh: jax.Array) -> jax.Array:
        by_layer = lambda x: x.reshape(*x.shape[:above], -1, *x.shape[axis:])  # noqa: E731
        held, rows, fresh = by_layer(array), source.reshape(-1, source.shape[-1]), by_layer(fresh)
        shape = (*held.shape[: above + 1], rows.shape[-1], *held.shape[above + 2 :])

        def body(i: jax.Array, moved: jax.Array) -> jax.Array:
            old, new = (
                jax.lax.dynamic_index_in_dim(x, i, above, keepdims=False)
                for x in (moved if shape == held.shape else held, fresh)
            )
            here = _moved_layer(above, old, rows[i], new)
            return jax.lax.dynamic_update_index_in_dim(moved, here, i, above)

        start = held if shape == held.shape else jnp.zeros(shape, held.dtype)
        moved = jax.lax.fori_loop(0, rows.shape[0], body, start)
        return moved.reshape(*array.shape[:axis], *shape[above + 1 :])

    return jax.jit(move, out_shardings=sharding, donate_argnums=0 if donate else ())
