"""The time of a profile: of synthetic planes, and of a real trace on this CPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from experiments.benchmarks import device_clock


def plane(name, **lines):
    """An XPlane as text; each line a list of (first, last) in ns, underscores for spaces."""
    text = [f'planes {{ name: "{name}" event_metadata {{ key: 1 value {{ id: 1 name: "k" }} }}']
    text.append('stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }')
    for number, (line, events) in enumerate(lines.items()):
        text.append(f'lines {{ id: {number} name: "{line.replace("_", " ")}" timestamp_ns: 1000')
        for first, last in events:
            stat = "stats { metadata_id: 1 int64_value: 3 }" if "xla" in line else ""
            text.append(
                f"events {{ metadata_id: 1 offset_ps: {first * 1000} "
                f"duration_ps: {(last - first) * 1000} {stat} }}"
            )
        text.append("}")
    return "\n".join([*text, "}"])


def busy(*planes, on_host=False):
    profile = ProfileData.from_serialized_xspace(
        ProfileData.text_proto_to_serialized_xspace("\n".join(planes))
    )
    return device_clock.busy_seconds(profile, on_host)


HOST = plane("/host:CPU", python=[(0, 10_000)], xla_thread=[(0, 100), (20, 50), (90, 120)])


def test_kernels_of_streams_that_overlap_count_once():
    gpu = plane(
        "/device:GPU:0",
        Steps=[(0, 9_000)],
        **{"Stream_#7(Compute)": [(0, 100), (200, 250)], "Stream_#9(Compute)": [(50, 120)]},
    )
    seconds, clock = busy(HOST, gpu)
    assert clock == "device"
    assert seconds == pytest.approx(170e-9)


def test_operations_of_a_tpu_where_a_loop_holds_others():
    tpu = plane("/device:TPU:0", XLA_Modules=[(0, 500)], XLA_Ops=[(0, 300), (10, 20), (400, 500)])
    assert busy(HOST, tpu) == (pytest.approx(400e-9), "device")


def test_the_host_counts_where_there_is_no_device():
    assert busy(HOST, plane("/device:GPU:0"), on_host=True) == (pytest.approx(120e-9), "host")
    assert busy(HOST, plane("/device:GPU:0")) is None  # A GPU that tells nothing.
    assert busy(plane("/host:CPU", python=[(0, 10)]), on_host=True) is None


def test_a_real_trace_on_the_cpu():
    """A program that does much more takes longer, and waiting for the host is not counted."""
    x = jnp.ones((256, 256))

    def power(times):
        run = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: y @ x / 256, x))
        return device_clock.measure(lambda: run(x), repeats=3)

    short, long = power(2), power(64)
    assert short.clock == long.clock == "host"
    assert 0 < 4 * short.seconds < long.seconds


def test_without_a_profile_the_clock_on_the_wall_is_named(monkeypatch):
    monkeypatch.setattr(device_clock, "busy_seconds", lambda *_: None)
    found = device_clock.measure(lambda: jnp.ones(3) + 1, repeats=2)
    assert found.clock == "wall"
    assert found.seconds > 0
