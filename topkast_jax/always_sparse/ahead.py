"""A choice of sets in a thread, while the steps between the choice and its use run."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.always_sparse import host as hosts
from topkast_jax.always_sparse.exchange import Chosen, Exchange
from topkast_jax.always_sparse.host import Copies, Reservoir
from topkast_jax.always_sparse.layout import Layout, is_here, on_host
from topkast_jax.always_sparse.refresh import committed, sent


class ChoiceAhead:
    """The choice that a thread makes for a later step."""

    def __init__(
        self,
        layout: Layout,
        choose: hosts.Choice,
        exchange: Exchange,
        copies: Copies,
        *,
        moves: bool,
    ):
        """With `moves`, the thread also works out how leaves get to the new sets."""
        self._layout, self._choose, self._exchange = layout, choose, exchange
        self._copies, self._moves = copies, moves
        self._thread = ThreadPoolExecutor(1)
        self._choice: Future[Chosen] | None = None
        self._theta: dict[str, np.ndarray] = {}  # what the choice is made from

    def start(
        self, step: int, values: dict[str, Any], reservoir: Reservoir, gradients: Any
    ) -> Reservoir:
        """Begins a choice from a copy of the values that the next steps cannot take away.

        The reservoir that comes back holds no choice until the thread is done.
        """
        self.forget()  # The thread may read the last copies.
        here = all(map(is_here, values.values()))
        copies: dict[str, Any]
        if all(isinstance(x, jax.Array) and self._copies.takes(x) for x in values.values()):
            copies = self._copies.of(jax.block_until_ready(values))
        else:
            copies = {name: jnp.copy(x) if here else on_host(x) for name, x in values.items()}
        # Without a reference to the arrays, which would keep them.
        homes = {name: committed(x) for name, x in values.items()}
        reservoir = hosts.writable(reservoir)._replace(chosen={})

        def choose() -> Chosen:
            theta, sets = reservoir.theta, reservoir.sets
            index = {name: leaf.index(sets[name])[0] for name, leaf in self._layout.sparse.items()}
            self._layout.write_back(theta, index, copies)
            copies.clear()
            chosen = self._choose(step, theta, sets, reservoir.memory, gradients)
            if self._moves:
                flags = {name: new for name, (new, _) in chosen.items()}
                moves = hosts.moves(self._layout.sparse, theta, index, sets, flags, leaving=True)
                for name, move in moves.items():
                    if here:
                        stack = self._layout.sparse[name].leaf.stack
                        move = move._replace(source=sent(move.source, stack, homes[name]))
                    self._exchange.prepared[name] = flags[name], move
            return chosen

        self._theta = reservoir.theta
        self._choice = self._thread.submit(hosts.as_precise_as_here(choose))
        return reservoir

    def settled(self, reservoir: Reservoir) -> Reservoir:
        """The reservoir with the choice that is made for it, once the thread has made it."""
        theta = reservoir.theta
        if self._choice is not None and all(theta[name] is x for name, x in self._theta.items()):
            reservoir = reservoir._replace(chosen=self._choice.result())
        return reservoir

    def forget(self) -> None:
        """Waits for the thread. What it has chosen is no longer wanted."""
        wait([self._choice] if self._choice else [])
        self.used()
        self._exchange.prepared = {}

    def used(self) -> None:
        """The choice is applied."""
        self._choice, self._theta = None, {}
