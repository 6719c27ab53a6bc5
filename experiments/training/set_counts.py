"""The sizes of the sets, added up over the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.training.representation import Representation
from experiments.training.state import TrainState
from topkast_jax.statistics import CountsOverSteps


class SetCounts:
    """Adds up what each step uses. The sets are counted where they change.

    No step waits for a count: it is fetched when the next one is there, or when the sums are asked
    for.
    """

    def __init__(self, held: Representation, state: TrainState, saved: Mapping[str, Any] | None):
        """Starts at a state, from nothing or from the saved sums of the steps before it.

        Args:
            held: the representation of the run.
            state: the state before the first step that is to be added.
            saved: what `CountsOverSteps.saved` returned after the steps before.
        """
        self._held, self._sums, self._window = held, CountsOverSteps(saved), CountsOverSteps()
        counts = held.leaf_counts(state)
        self._first, self._counts = int(state.step) + 1, lambda: counts

    def add(self, state: TrainState, step: int) -> None:
        """Adds a step, with the state after it; call it for each."""
        if new := self._held.new_counts(state, step):
            first, counts = new
            self._close(first)
            self._counts = counts

    def until(self, step: int) -> CountsOverSteps:
        """The sums of all steps up to this one."""
        self._close(step + 1)
        return self._sums

    def window(self, step: int) -> CountsOverSteps:
        """The sums of the steps of this process since the last call, up to this step."""
        self._close(step + 1)
        found, self._window = self._window, CountsOverSteps()
        return found

    def _close(self, first: int) -> None:
        """Adds the steps before `first`, all of which used the present counts."""
        steps = range(self._first, first)
        dense, counts = sum(map(self._held.needs_dense_gradient, steps)), self._counts()
        for sums in (self._sums, self._window):
            sums.add(counts, len(steps), dense)
        self._first = first
