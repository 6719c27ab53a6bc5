"""Dense gradients for methods that choose by them, of a few leaves at a time.

At a refresh, RigL needs the gradient of entries that the device does not hold. The loss is
differentiated once for each group of leaves. The leaves of the group are dense arrays, zero outside
A, and all others stay compact. The device thus holds the forward view and the gradient of one group
at a time, and never the dense gradient of the whole model, which no framework avoids according to
Jayakumar et al. (2020, appendix C).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from topkast_jax.always_sparse.host import HostLeaf
from topkast_jax.always_sparse.kernel import CompactKernel, dense_tile
from topkast_jax.always_sparse.layout import Layout, on_host

Tree = Any
Group = tuple[str, ...]


def groups(leaves: Mapping[str, HostLeaf]) -> list[Group]:
    """The sparse leaves in groups that have at most as many entries as the largest leaf.

    Each group costs one forward and one backward pass, so they are filled, largest leaf first.
    """
    sizes = {path: host.leaf.size for path, host in leaves.items()}
    most = max(sizes.values(), default=0)
    found: list[list[str]] = []
    room: list[int] = []
    for path in sorted(sizes, key=lambda p: -sizes[p]):
        fitting = [i for i, free in enumerate(room) if sizes[path] <= free]
        if not fitting:
            found.append([])
            room.append(most)
        number = fitting[0] if fitting else len(room) - 1
        found[number].append(path)
        room[number] -= sizes[path]
    return [tuple(group) for group in found]


class DenseGradients:
    """The gradients of the sparse leaves of one layout, on the host.

    Args of the constructor:
      layout: the leaves.
      place: shape → sharding on the device, or None.
    """

    def __init__(self, layout: Layout, place: Callable[[tuple[int, ...]], Any] | None):
        self._layout, self._place = layout, place
        self._groups = groups(layout.sparse)
        # `loss` and the group are static: one program for each, kept with this object.
        self._of_group = jax.jit(self._gradient, static_argnums=(0, 1, 2))

    def __call__(
        self, loss: Callable[..., Any], has_aux: bool, view: Tree, args: Sequence[Any]
    ) -> dict[str, np.ndarray]:
        """Dense gradients of `loss(view, *args)` by name, brought to the host group by group."""
        result: dict[str, np.ndarray] = {}
        for group in self._groups:
            found = self._of_group(loss, has_aux, group, view, args)
            result |= {name: on_host(found.pop(name)) for name in group}
        return result

    def _gradient(
        self, loss: Callable[..., Any], has_aux: bool, group: Group, view: Tree, args: Any
    ) -> dict[str, jax.Array]:
        held = dict(zip(self._layout.names, self._layout.flatten(view), strict=True))

        def at(dense: dict[str, jax.Array]) -> Any:
            value = loss(self._layout.unflatten((held | dense).values()), *args)
            return value[0] if has_aux else value

        gradient = jax.grad(at)({name: self._dense(name, held[name]) for name in group})
        return {name: self._placed(x) for name, x in gradient.items()}

    def _dense(self, name: str, kernel: CompactKernel) -> jax.Array:
        tile: Callable[[CompactKernel], jax.Array] = dense_tile
        for _ in self._layout.sparse[name].leaf.stack:
            tile = jax.vmap(tile)
        return self._placed(tile(kernel))

    def _placed(self, array: jax.Array) -> jax.Array:
        if self._place is None:
            return array
        return jax.lax.with_sharding_constraint(array, self._place(array.shape))
