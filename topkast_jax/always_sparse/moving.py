"""What the device does at a refresh: a gather brings each array to the next backward set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.always_sparse.compact import CompactKernel
from topkast_jax.always_sparse.reservoir import Move

Place = Callable[[tuple[int, ...]], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class Mover:
    """Moves what the device holds of one leaf to the next backward set."""

    move: Move
    stack: tuple[int, ...]
    place: Place | None

    @functools.cached_property
    def source(self) -> np.ndarray:
        """`Move.source` with a layer axis only if the leaf is stacked."""
        return self.move.source.reshape(*self.stack, -1)

    def places(self, kernel: CompactKernel) -> CompactKernel:
        """A kernel without values, at its new places."""
        index = self._moved(kernel.index, self.move.index.reshape(*self.stack, -1))
        return dataclasses.replace(kernel, index=index, forward=self.move.forward)

    def values(self, values: jax.Array) -> jax.Array:
        """Values that stay, and those of the fresh units."""
        fresh = self.move.values
        return self._moved(values, fresh.reshape(*self.stack, *fresh.shape[1:]))

    def carry(self, moment: jax.Array) -> jax.Array:
        """A moment: that of units that stay, zero for the fresh ones."""
        return self._moved(moment, np.zeros((*self.stack, 1, *moment.shape[len(self.stack) + 1 :]),
                                            moment.dtype))  # fmt: skip

    def _moved(self, array: jax.Array, fresh: np.ndarray) -> jax.Array:
        shape = (*self.source.shape, *array.shape[self.source.ndim :])
        sharding = None if self.place is None else self.place(shape)
        moved = _compiled(len(self.stack), sharding, shape == array.shape)
        return moved(array, self.source, fresh)


@functools.lru_cache
def _compiled(stack: int, sharding: Any, donate: bool) -> Callable[..., jax.Array]:
    def move(array: jax.Array, source: jax.Array, fresh: jax.Array) -> jax.Array:
        stays = (source >= 0).reshape(-1, *(1,) * (array.ndim - 1))
        old = array[jnp.maximum(source, 0)]
        return jnp.where(stays, old, fresh[jnp.clip(-1 - source, 0, fresh.shape[0] - 1)])

    for _ in range(stack):
        move = jax.vmap(move)
    return jax.jit(move, out_shardings=sharding, donate_argnums=0 if donate else ())
