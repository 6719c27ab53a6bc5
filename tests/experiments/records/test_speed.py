"""What the records of training say about its speed, against a clock and counts made by hand."""

import struct
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from toy_runs import records, run

from experiments import chips
from experiments.records import speed
from experiments.training import metric_sums
from experiments.training.metric_sums import Timing, Window

ENTRIES = 16 * 32 + 32 * 4  # of the toy task's two kernels


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when sums are fetched: by the seconds that they hold."""
    found = SimpleNamespace(now=50.0)

    def fetch(sums):
        found.now += sums["seconds"]
        return {}

    monkeypatch.setattr(metric_sums.time, "perf_counter", lambda: found.now)
    monkeypatch.setattr(jax, "device_get", fetch)
    return found


def test_a_window_times_its_steps_and_not_its_pauses(clock):
    window = Window(1)
    with window.paused():  # The sets of step 0 are written before the first step.
        clock.now += 7.0
    for step, seconds in enumerate((60.0, 1.0, 3.0, 2.0), start=1):
        clock.now += 0.5  # What the host does is a part of the step that runs meanwhile.
        window.add(step, {"seconds": seconds}, chooses=step in (1, 3))
    with window.paused():
        clock.now += 100.0
    window.add(5, {"seconds": 1.0})
    with window.paused():
        assert window.timing() == Timing(4, 8.0, 3.5 - 1.5)
        window.next(6)
        assert window.timing() is None
    window.add(6, {"seconds": 4.0}, chooses=True)
    with window.paused():
        assert window.timing() == Timing(1, 4.0, None)  # No other step to compare it with.
        window.next(7)
    window.add(7, {"seconds": 2.0})
    with window.paused():
        assert window.timing() == Timing(1, 2.0, 0.0)


def scalars(directory):
    """The values in the TensorBoard events of a run, by name and step."""
    found = {}
    for path in (directory / "tensorboard").iterdir():
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            place += length + 16
    return found


@pytest.fixture
def of_a_known_chip(monkeypatch):
    monkeypatch.setitem(chips._FLOPS, jax.devices()[0].device_kind, 1e9)


@pytest.mark.parametrize("always_sparse", [False, True])
def test_every_record_says_how_fast_it_was(tmp_path, of_a_known_chip, always_sparse):
    run(tmp_path, "80/60", f"method.always_sparse={always_sparse}", "eval_at_end=False")
    found = records(tmp_path, timing=True)
    trains, masks = ([r for r in found if r["split"] == s] for s in ("train", "masks"))
    assert len(trains) == 4
    for train, mask in zip(trains, masks, strict=True):
        timing = train["timing"]
        rate = timing["steps_per_second"]
        assert timing["step_seconds"] == pytest.approx(1 / rate)
        per_chip = timing["examples_per_second"] / jax.device_count()
        assert timing["examples_per_second_per_chip"] == pytest.approx(per_chip)
        assert timing["data_wait_seconds"] >= 0
        assert 0 <= timing["refresh_seconds"] < timing["step_seconds"] * 5
        dense = 3 * 2 * 32 * ENTRIES * rate / (1e9 * jax.device_count())
        assert timing["mfu_dense_equivalent"] == pytest.approx(dense)
        share = (2 * mask["forward_density"] + mask["backward_density"]) / 3
        assert timing["mfu_density_adjusted"] == pytest.approx(dense * share)
        assert "device_bytes" not in timing  # The backend of CPUs does not say.
    written = scalars(tmp_path)
    for train in trains:
        for key, value in train["timing"].items():
            assert written[f"train/{key}", train["step"]] == pytest.approx(value, rel=1e-5)


def device(number, kind="abacus", **more):
    stats = {"bytes_in_use": 100 + number, "peak_bytes_in_use": 300 - number}
    more = {"platform": "cpu", "memory_stats": lambda: stats} | more
    return SimpleNamespace(id=number, device_kind=kind, **more)


def values(devices):
    mesh = SimpleNamespace(devices=np.array(devices), local_devices=devices)
    task = SimpleNamespace(unit="tokens", units_per_step=30)
    program = SimpleNamespace(task=task, mesh=mesh)
    return speed.Speed(program).of(Timing(6, 3.0, None), 0.75, None, 6)


def test_what_a_machine_does_not_say_is_absent():
    expected = {
        "steps_per_second": 2.0,
        "step_seconds": 0.5,
        "tokens_per_second": 60.0,
        "tokens_per_second_per_chip": 20.0,
        "data_wait": 0.25,
        "data_wait_seconds": 0.75,
    }
    memory = {"device_bytes": 102, "device_bytes_peak": 300}
    assert values([device(n) for n in range(3)]) == expected | memory
    assert values([device(n, memory_stats=lambda: None) for n in range(3)]) == expected


def test_two_devices_of_one_chip_are_one_chip():
    cores = [
        device(n, platform="tpu", coords=(n // 2, 0, 0), core_on_chip=n % 2, slice_index=s)
        for s in range(2)
        for n in range(4)
    ]
    assert chips.chip_count(cores) == 4
    assert values(cores)["tokens_per_second_per_chip"] == 60.0 / 4
    assert chips.peak_flops(device(0, "TPU v5 lite")) == 197e12
    assert chips.peak_flops(device(0)) is None
