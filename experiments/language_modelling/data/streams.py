"""Segments of text for parallel lanes, read by Grain."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from experiments.errors import UserError
from experiments.grain_batches import EndlessBatches
from experiments.language_modelling.data.corpus import Tokens

Batch = dict[str, np.ndarray]
_ENDLESS = 1 << 48


@dataclasses.dataclass(frozen=True)
class Share:
    """The lanes of one host: an equal part of all lanes, in order."""

    host: int = 0
    hosts: int = 1

    def of(self, lanes: int) -> range:
        """The numbers of the lanes."""
        own = lanes // self.hosts
        return range(self.host * own, (self.host + 1) * own)


class TrainStream(EndlessBatches):
    """Endless segments: lane b starts at b/lanes of the text and reads on, round and round.

    The memory of a lane therefore always belongs to the text just before its segment, and no token
    is left out. The only break is where the end of the text meets its beginning. The content of a
    segment depends only on its number.
    """

    def __init__(self, tokens: Tokens, lanes: int, target: int, share: Share, text: dict[str, Any]):
        """Starts at the first segment.

        Args:
          tokens: the training part of the text.
          lanes: the number of lanes, over all hosts.
          target: the number of tokens in a segment.
          share: the lanes of this host.
          text: identifies the text that a position belongs to; values that JSON can hold.
        """
        starts = [lane * len(tokens) // lanes for lane in share.of(lanes)]
        segments = _TrainSegment(tokens, starts, target)
        super().__init__(grain.MapDataset.range(_ENDLESS).map(segments), _read)
        self._text = text

    def get_state(self) -> dict[str, Any]:
        """The position, and the text to which it belongs."""
        return {"segments": self.position, "text": self._text}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that `get_state` gave.

        Raises:
          UserError: the position belongs to another text.
        """
        for key, here in self._text.items():
            there = state["text"].get(key)
            if there != here:
                raise UserError(
                    f"the checkpoint was trained on another text: {key} is {_short(there)} there "
                    f"and {_short(here)} here; bring back that text, or choose another --workdir"
                )
        self.go_to(state["segments"])


@dataclasses.dataclass(frozen=True)
class EvalPlan:
    """Which lane counts which segments of a text, so that the result does not depend on the lanes.

    The segments are those of a single lane that reads the whole text. A lane that starts inside the
    text first reads `warmup` segments that it does not count. These are as many as its own segments
    can see through the memories of all layers. The first lane has no text before it and counts from
    its first segment on. After the end of the text there is padding of weight 0.

    Attributes:
      targets: the number of tokens to predict, which are all tokens except the first.
      target: the number of tokens in a segment.
      lanes: the number of lanes that share the work.
      warmup: the number of segments that a lane reads before its own.
    """

    targets: int
    target: int
    lanes: int
    warmup: int

    @property
    def segments(self) -> int:
        """The number of segments of the whole text."""
        return math.ceil(self.targets / self.target)

    @property
    def own(self) -> int:
        """The number of segments that each lane counts; the first lane counts `warmup` more."""
        return max(1, math.ceil((self.segments - self.warmup) / self.lanes))

    @property
    def steps(self) -> int:
        """The number of segments that each lane reads."""
        return min(self.warmup + self.own, self.segments)

    def weights(self, lane: int, step: int) -> tuple[int, np.ndarray]:
        """The start of the segment that a lane reads in a step, and the weights of its targets."""
        start = (lane * self.own + step) * self.target
        counted = (lane == 0 or step >= self.warmup) and lane < self.lanes
        left = np.arange(start, start + self.target) < self.targets
        return start, (left & counted).astype(np.float32)


def eval_segments(tokens: Tokens, plan: EvalPlan, rows: range) -> Iterator[Batch]:
    """The segments of some lanes. Lanes that the plan does not have are padding."""
    batches = iter(_read(grain.MapDataset.range(plan.steps).map(_EvalSegment(tokens, plan, rows))))
    try:
        yield from batches
    finally:
        batches.close()


def _read(batches: grain.MapDataset) -> grain.IterDataset:
    # One thread suffices, because the records of a text are read one after another.
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


class _TrainSegment(grain.transforms.Map):
    """The segments of all lanes, by number."""

    def __init__(self, tokens: Tokens, starts: list[int], target: int):
        self._tokens, self._starts, self._target = tokens, starts, target

    def map(self, element: int) -> Batch:
        rows = [self._round(start + int(element) * self._target) for start in self._starts]
        both = np.stack(rows)
        return {"tokens": both[:, :-1], "targets": both[:, 1:]}

    def _round(self, start: int) -> np.ndarray:
        total = len(self._tokens)
        start %= total
        stop = start + self._target + 1
        row = self._tokens.read(start, min(stop, total))
        return row if stop <= total else np.concatenate([row, self._tokens.read(0, stop - total)])


class _EvalSegment(grain.transforms.Map):
    """The segments of all lanes with their weights, by number."""

    def __init__(self, tokens: Tokens, plan: EvalPlan, lanes: range):
        self._tokens, self._plan, self._lanes = tokens, plan, lanes

    def map(self, element: int) -> Batch:
        rows, weights = [], []
        for lane in self._lanes:
            start, weight = self._plan.weights(lane, int(element))
            stop = min(start + self._plan.target + 1, len(self._tokens))
            row = self._tokens.read(min(start, stop), stop)
            rows.append(np.pad(row, (0, self._plan.target + 1 - len(row))))
            weights.append(weight)
        both = np.stack(rows)
        return {"tokens": both[:, :-1], "targets": both[:, 1:], "weights": np.stack(weights)}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"
