"""The records of a run while it trains: `metrics.jsonl`, TensorBoard, and the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments.errors import warn
from experiments.records import files
from experiments.records.tensorboard import Board
from experiments.records.workdir import METRICS, TENSORBOARD, parsed


class Metrics:
    """Writes records, on the first host only.

    A record is `{"step", "split", values…}`, where `split` is "train", "masks", "sets" or a split
    of the data. Records of evaluations contain their `context`. Values that depend on the machine
    are under `timing`.
    """

    def __init__(self, workdir: Path, start: int, steps: int, every: int):
        """Continues after a step; records of later steps are dropped.

        Args:
            workdir: the folder of `metrics.jsonl`.
            start: the number of finished steps.
            steps: the number of steps of the whole run.
            every: after how many steps there is a record.
        """
        self._main = jax.process_index() == 0
        if not self._main:
            return
        _drop_after(workdir / METRICS, start, every)
        self._file = files.growing(workdir / METRICS)
        self._board = Board(workdir / TENSORBOARD, start)
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, unit="step") if on_terminal else None
        self._steps = steps

    def write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Writes one record."""
        if not self._main:
            return
        record = json.dumps({"step": step, "split": split} | values)
        self._file.write(f"{record}\n".encode())
        self._file.flush()
        numbers = {k: v for k, v in values.items() if isinstance(v, float)}
        for key, value in (numbers | values.get("timing", {})).items():
            self._board.add_scalar(f"{split}/{key}", value, step)
        self._board.flush()
        self._show(step, split, numbers, values.get("timing", {}))

    def tick(self, step: int) -> None:
        """Moves the progress bar."""
        if self._main and self._bar is not None:
            self._bar.update(step - self._bar.n)

    def say(self, line: str) -> None:
        """Prints one line."""
        if self._main:
            tqdm.write(line, file=sys.stderr) if self._bar else print(line, flush=True)

    def sync(self) -> None:
        """Puts the records on disk, which must happen before a checkpoint that relies on them."""
        if self._main:
            files.sync(self._file)

    def close(self) -> None:
        """Closes the files and the progress bar."""
        if self._main:
            # All is written already, unless the disk was full, which was an error then.
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._board.close()
            if self._bar is not None:
                self._bar.close()

    def _show(self, step: int, split: str, numbers: dict[str, float], timing: Any) -> None:
        shown = numbers | {k: v for k, v in timing.items() if k == "steps_per_second"}
        text = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        if self._bar is not None and split == "train":
            self._bar.set_postfix_str(text, refresh=False)
        elif self._bar is None or split != "masks":
            self.say(f"step {step}/{self._steps}  {split:6}  {text}")


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`.

    Lines that are no records are passed over, with a warning unless it is the last line, which may
    have been cut off.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The records, and whether lines were passed over with a warning."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    lines = text.split("\n") if text else []
    records, damaged = [], False
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            damaged = True
            warn(f"{path}, line {number}: not used, because it is no record: {line[:60]!r}")
    return records, damaged


def _record(line: str) -> dict[str, Any] | None:
    try:
        found = parsed(line)
    except ValueError:
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return None
    kinds = {"split": str, "context": dict, "timing": dict, "final": bool}
    fits = all(isinstance(v, kinds[k]) if k in kinds else is_value(v) for k, v in found.items())
    return found if fits and "split" in found else None


def is_value(value: Any) -> bool:
    """Whether a value is a number that a report can average: not finite, or at most 1e100."""
    return type(value) in (int, float) and not 1e100 < abs(value) < math.inf


def _drop_after(path: Path, step: int, every: int) -> None:
    """Leaves the records up to a step; a copy of a file with damaged lines is kept."""
    records, damaged = _read(path)
    if step >= every and not records:
        warn(f"{path}: holds no record of the {step} steps that are finished")
    if damaged:
        files.replace(path.with_name(f"{path.name}.damaged.{step}"), path.read_bytes())
    kept = [r for r in records if r["step"] <= step and not r.get("final")]
    files.replace(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
