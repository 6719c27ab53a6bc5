"""How chosen sets reach the device: only what is new of them is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np

from topkast_jax.always_sparse import host as hosts
from topkast_jax.always_sparse.checks import check_sizes
from topkast_jax.always_sparse.convert import replace_nodes
from topkast_jax.always_sparse.host import Copies, Move, Reservoir
from topkast_jax.always_sparse.layout import Layout, on_host
from topkast_jax.always_sparse.moments import Moments
from topkast_jax.always_sparse.refresh import Mover, Place, Spares, committed
from topkast_jax.inner_state import map_parameter_shaped
from topkast_jax.sets import CompactState, find_compact
from topkast_jax.trees import flatten

Tree = Any
T = TypeVar("T")
Chosen = dict[str, Any]  # (flags, memory) by leaf


class Exchange:
    """Replaces the sets that the device holds.

    Attributes:
      prepared: moves that were worked out before their turn, by leaf, each with the flags that it
        leads to.
    """

    def __init__(
        self,
        layout: Layout,
        choose: hosts.Choice,
        moments: Moments,
        place: Place | None,
        copies: Copies,
    ):
        """See `AlwaysSparse`; spare arrays are kept where copies are."""
        self._layout, self._choose, self._moments = layout, choose, moments
        self._place, self._copies = place, copies
        self._spares: Spares = {}
        self.prepared: dict[str, tuple[np.ndarray, Move]] = {}

    def __call__(
        self,
        params: Tree,
        state: T,
        reservoir: Reservoir,
        chosen: Iterable[Chosen],
        *,
        ahead: bool = False,
    ) -> tuple[Tree, T, dict[str, Any]]:
        """Brings new sets to the device, a few leaves at a time.

        Args:
          params: the tree of values.
          state: the optimizer state.
          reservoir: its sets and memory are replaced leaf by leaf, so that none are held twice.
          chosen: for one group of leaves after another.
          ahead: whether θ has yet to become current on what leaves B.

        Returns:
          The tree of values, the optimizer state, and what was chosen of all leaves.
        """
        now: Chosen = {}
        compact: Any = find_compact(state)
        twice, outside = _held_twice((params, state)), outside_state(state)
        arrays, kernels = self._layout.flatten(params), self._layout.flatten(compact.kernels)
        by_path = dict(jax.tree_util.tree_leaves_with_path(compact.inner_state))
        numbers = {name: number for number, name in enumerate(self._layout.names)}
        for group in chosen:
            movers: list[Mover | None] = [None] * len(arrays)
            index = {name: kernels[numbers[name]].index for name in group}
            values = {name: arrays[numbers[name]] for name in group}
            moves = self._moves_to(group, reservoir, index, values, ahead)
            for name, move in moves.items():
                leaf, home = self._layout.sparse[name], committed(values[name])
                check_sizes(leaf, move.forward, move.source.shape[-1])
                spares = self._spares if ahead else None
                movers[numbers[name]] = Mover(
                    move, leaf.leaf.stack, self._place, home, twice, spares
                )
            outside = map_parameter_shaped(
                lambda array, mover: mover.carry(array),
                outside, params, self._layout.unflatten(movers),
            )  # fmt: skip
            for number, mover in enumerate(movers):
                if mover is not None:
                    arrays[number] = mover.values(arrays[number])
                    kernels[number] = mover.places(kernels[number])
                    moments = self._moments.moved(number, mover, by_path)
                    by_path |= moments
                    # What the moves read is freed before the next leaves are chosen.
                    jax.block_until_ready(
                        (arrays[number], kernels[number].index, list(moments.values()))
                    )
            for name, (flags, memory) in group.items():
                reservoir.sets[name], reservoir.memory[name] = flags, memory
            now |= group
            del movers, mover, moves, move, index, values  # Before the next leaves are chosen.
        self.prepared = {}
        if not self._copies.kept:
            self._spares.clear()
        inner = flatten(compact.inner_state)[1].unflatten(by_path.values())
        inside = CompactState(compact.step, self._layout.unflatten(kernels), inner)
        state = jax.tree.map(
            lambda old, new: inside if isinstance(old, CompactState) else new,
            state, outside, is_leaf=lambda node: isinstance(node, CompactState),
        )  # fmt: skip
        return self._layout.unflatten(arrays), state, now

    def _moves_to(
        self,
        chosen: Chosen,
        reservoir: Reservoir,
        index: dict[str, jax.Array],
        values: dict[str, jax.Array],
        ahead: bool,
    ) -> dict[str, Move]:
        """How leaves get to new flags; θ is current on all that is not in their B after it."""
        leaves, theta, old = self._layout.sparse, reservoir.theta, reservoir.sets
        flags = {name: new for name, (new, _) in chosen.items()}
        known = {name: self.prepared.pop(name, (None, None)) for name in chosen}
        if all(known[name][0] is flags[name] for name in chosen):
            moves: dict[str, Any] = {name: move for name, (_, move) in known.items()}
        else:
            self._choose.enter(theta, old, flags)
            held = {name: on_host(array) for name, array in index.items()}
            moves = hosts.moves(leaves, theta, held, old, flags, leaving=ahead)
        if ahead:
            for name, move in moves.items():
                leaves[name].write_leaving(theta[name], move, on_host(values[name]))
        return moves


def outside_state(state: Any) -> Any:
    """An optimizer state without that of the always-sparse transform."""
    return replace_nodes(state, CompactState, lambda _: None)


def _held_twice(tree: Any) -> Callable[[jax.Array], bool]:
    """Whether an array occurs more than once in a tree."""
    times = Counter(map(id, jax.tree.leaves(tree)))
    return lambda array: times[id(array)] > 1
