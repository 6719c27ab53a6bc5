"""What the records of training say about its speed."""

from __future__ import annotations

import functools
from typing import Any

import topkast_jax as tk
from experiments.chips import chip_count, peak_flops
from experiments.records.summary import leaf_flops
from experiments.training.metric_sums import Timing
from experiments.training.program import Program
from experiments.training.set_counts import SetCounts


class Speed:
    """Turns the times of a window of steps into the values of a record's `timing`."""

    def __init__(self, program: Program):
        """Looks at the devices of the run; nothing is traced before it is needed."""
        self._task, devices = program.task, list(program.mesh.devices.flat)
        self._chips, self._peak = chip_count(devices), peak_flops(devices[0])
        self._own = program.mesh.local_devices

    def of(self, timing: Timing, waited: float, counts: SetCounts, step: int) -> dict[str, float]:
        """The values; docs/reproducing.md says what they are.

        Args:
            timing: the times of the steps of the window.
            waited: the seconds that these steps waited for data.
            counts: the sizes of the sets.
            step: the last step of the window.
        """
        rate, unit = timing.steps / timing.seconds, self._task.unit
        units = rate * self._task.units_per_step
        found = {
            "steps_per_second": rate,
            "step_seconds": timing.seconds / timing.steps,
            f"{unit}_per_second": units,
            f"{unit}_per_second_per_chip": units / self._chips,
            "data_wait": min(1.0, waited / timing.seconds),
            "data_wait_seconds": waited,
        }
        if timing.refresh_seconds is not None:
            found["refresh_seconds"] = timing.refresh_seconds
        return found | self._utilisation(rate, counts, step) | self._memory()

    @functools.cached_property
    def _leaf_flops(self) -> dict[str, float]:
        return leaf_flops(self._task)

    def _utilisation(self, rate: float, counts: SetCounts, step: int) -> dict[str, float]:
        """Training takes three times the FLOPs of the forward pass, rematerialisation left out."""
        if self._peak is None:
            return {}
        flops = tk.statistics.flops(self._leaf_flops, counts.window(step).mean())
        dense = 3 * flops.dense * rate / (self._peak * self._chips)
        return {
            "mfu_dense_equivalent": dense,
            "mfu_density_adjusted": dense * flops.training_fraction,
        }

    def _memory(self) -> dict[str, float]:
        """The most that any device of this host holds and has held, where its backend says so."""
        stats: list[dict[str, Any]] = [d.memory_stats() or {} for d in self._own]
        names = {"bytes_in_use": "device_bytes", "peak_bytes_in_use": "device_bytes_peak"}
        return {
            name: max(s[key] for s in stats)
            for key, name in names.items()
            if all(key in s for s in stats)
        }
