"""The sets of a run while it trains, as files, and how far they moved (the paper's figure 3)."""

from __future__ import annotations

import io
from pathlib import Path
from zipfile import BadZipFile

import jax
import numpy as np

from experiments.errors import warn
from experiments.records import files, workdir
from topkast_jax.flags import BACKWARD, FORWARD

Flags = dict[str, np.ndarray]


class SetFiles:
    """Writes `sets/STEP.npz` every so many steps and after the last, each against those before.

    A file holds two arrays for each sparse leaf, NAME.forward and NAME.backward, packed as by
    `numpy.packbits`.
    """

    def __init__(self, directory: Path, every: int, steps: int):
        """Writes into the folder of a run of so many steps; `every=0` stands for never."""
        self._directory, self._every, self._steps = directory / workdir.SETS, every, steps

    def due(self, step: int) -> bool:
        """Whether the sets after this many finished steps are written."""
        return bool(self._every) and (step % self._every == 0 or step == self._steps)

    def write(self, step: int, flags: Flags) -> dict[str, float]:
        """Writes the sets, on the first host only.

        Args:
            step: the number of finished steps.
            flags: of each sparse leaf, as `topkast_jax.flags` says.

        Returns:
            How the sets differ from those that were written before them, after the step `since`:
            the mean, the least and the largest value over leaves of `differ`, the share of entries
            that are in one forward set alone, and of `woken`, the share of entries outside the last
            backward set that are in this forward set. Empty for the first sets, without any
            (nothing is written then), and, with a warning, where those before them cannot be read.
        """
        if not flags:
            return {}  # of a dense run
        now = {
            f"{name}.{kind}": np.packbits(leaf & bit != 0)
            for name, leaf in flags.items()
            for kind, bit in (("forward", FORWARD), ("backward", BACKWARD))
        }
        if jax.process_index() == 0:
            self._directory.mkdir(exist_ok=True)
            file = io.BytesIO()
            np.savez_compressed(file, **now)  # type: ignore[arg-type]
            files.replace(self._directory / f"{step}.npz", file.getvalue())
        since = (step - 1) // self._every * self._every
        before = self._directory / f"{since}.npz"
        if step == 0 or jax.process_index():
            return {}
        try:
            with np.load(io.BytesIO(before.read_bytes())) as arrays:
                then = {key: arrays[key] for key in now}
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            warn(f"{before}: cannot be read, so the sets of step {step} are not compared: {error}")
            return {}
        moved = _moved(then, now, {name: leaf.size for name, leaf in flags.items()})
        return {"since": since} | moved


def _moved(then: Flags, now: Flags, sizes: dict[str, int]) -> dict[str, float]:
    differ, woken = [], []
    for name, size in sizes.items():
        before, after = (np.unpackbits(x[f"{name}.forward"], count=size) for x in (then, now))
        reservoir = 1 - np.unpackbits(then[f"{name}.backward"], count=size)
        differ.append(float(np.mean(before != after)))
        woken.append(float((after & reservoir).sum() / max(1, reservoir.sum())))
    return {
        f"{what}_{of}": float(function(values))
        for what, values in (("differ", differ), ("woken", woken))
        for of, function in (("mean", np.mean), ("least", np.min), ("most", np.max))
    }
