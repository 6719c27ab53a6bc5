"""The search for settings, the budget of a bench, and its checks of kernels."""

import dataclasses

import jax
import pytest

from experiments.benchmarks import device_clock, kernel_checks, stack, tuner
from experiments.benchmarks.budget import Budget
from experiments.benchmarks.device_clock import Timing
from experiments.benchmarks.tuner import Problem
from topkast_jax import Block
from topkast_jax.always_sparse.products import pallas_gpu, tuning, xla

DEFAULT = pallas_gpu.SpmmSettings()
FOREVER = lambda: 1.0  # noqa: E731
PROBLEM = Problem("xla", (8, 8), "float32", (32, 48), 7, [(0.1, 0.2), (0.5, 0.5)])


def seconds(settings):
    """Least at 4 warps, and then with steps of 128; tiles of 256 tokens do not run."""
    if settings.tokens == 256:
        return None
    slow = 1.0 if settings.num_warps == 4 else 2.0
    return slow - (0.5 if settings.step == 128 and settings.num_warps == 4 else 0)


def test_the_search_finds_fields_that_help_together():
    asked = []
    best, times = tuner.search(DEFAULT, lambda s: asked.append(s) or seconds(s), FOREVER)
    assert best == dataclasses.replace(DEFAULT, num_warps=4, step=128)
    assert times[best] == 0.5
    assert len(asked) == len(set(asked))
    assert all(s.tokens != 256 for s in times)


def test_a_gain_within_noise_is_none():
    best, _ = tuner.search(DEFAULT, lambda s: 1.0 if s == DEFAULT else 0.99, FOREVER)
    assert best == DEFAULT


def test_without_time_the_defaults_stay():
    best, times = tuner.search(DEFAULT, seconds, lambda: 0.0)
    assert (best, set(times)) == (DEFAULT, {DEFAULT})


@pytest.mark.parametrize("product", tuning.PRODUCTS)
def test_wrong_and_refused_candidates_are_dropped(monkeypatch, product):
    """At once 1 is refused, 2 gives another product; the rest are the faster the more at once."""
    said = []
    bound = tuning.bound

    def faulty(backend, product, block, shape, settings, interpret=False):
        run = bound(backend, product, block, shape, settings, interpret)
        if settings.at_once == 1:
            raise RuntimeError("too much\nshared memory")
        return (lambda *arrays: 1.5 * run(*arrays)) if settings.at_once == 2 else run

    times = iter(range(10, 0, -1))
    monkeypatch.setattr(tuning, "bound", faulty)
    monkeypatch.setattr(device_clock, "measure", lambda *_: Timing(float(next(times)), "host"))
    entry, clock = tuner.tune(PROBLEM, product, 1, FOREVER, said.append)
    assert entry.settings.at_once == 64
    assert entry.microseconds < entry.default_microseconds == 1e7
    assert (entry.tokens, clock) == (7, "host")
    assert entry.key == tuning.Key("cpu", "xla", product, (8, 8), "float32", (32, 48))
    dropped = [line for line in said if "dropped" in line]
    assert dropped == [
        "  at_once=1: dropped, too much",
        "  at_once=2: dropped, it gives another product than the defaults",
    ]


@pytest.mark.parametrize(("where", "what"), [(xla, "spmm"), (device_clock, "measure")])
def test_defaults_that_do_not_run_are_an_error(monkeypatch, where, what):
    monkeypatch.setattr(where, what, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuner.tune(PROBLEM, "spmm", 1, FOREVER, print)


class Clock:
    """A clock that moves by hand."""

    now = 0.0

    def __call__(self):
        return self.now

    def row(self, seconds):
        def make():
            self.now += seconds
            return {"took": seconds}

        return make


def test_rows_that_no_longer_fit_are_named():
    clock = Clock()
    budget = Budget(10, clock)
    assert budget.row("long", "a", clock.row(3)) == {"took": 3}
    assert budget.row("long", "b", clock.row(4)) == {"took": 4}
    assert budget.left() == 3
    assert budget.row("long", "c", clock.row(3)) is None  # The longest took 4.
    assert budget.row("other", "d", clock.row(1), first=5.0) is None
    assert budget.row("short", "e", clock.row(1), first=1.0) == {"took": 1}
    assert budget.left_out == ["c", "d"]
    assert budget.failed == []


def test_an_error_is_one_row_and_not_the_end():
    budget = Budget(10, Clock())

    def fails():
        raise ValueError("no such tile\nat line 3")

    assert budget.row("kind", "a", fails) is None
    assert budget.row("kind", "b", dict) == {}
    assert budget.failed == [{"row": "a", "error": "ValueError: no such tile"}]
    assert budget.left_out == []


CASE = kernel_checks.Case((64, 96), 5, 16, "float32")


def test_kernels_that_agree_and_that_do_not(monkeypatch):
    """A block that is left out is seen in each product that it is left out of."""
    assert kernel_checks.check(CASE, "pallas_gpu", interpret=True)["ok"]
    spmm, sddmm = pallas_gpu.spmm, pallas_gpu.sddmm

    def without_the_last(x, values, source, target, *rest, **extra):
        return spmm(x, values, source[:-1], target[:-1], *rest, **extra)

    monkeypatch.setattr(pallas_gpu, "spmm", without_the_last)
    found = kernel_checks.check(CASE, "pallas_gpu", interpret=True)
    assert not found["ok"]
    assert min(found["y"], found["dx"]) > found["tolerance"] > found["dw"]
    monkeypatch.setattr(pallas_gpu, "spmm", spmm)
    monkeypatch.setattr(pallas_gpu, "sddmm", lambda *args, **kw: sddmm(*args, **kw) * float("nan"))
    found = kernel_checks.check(CASE, "pallas_gpu", interpret=True)
    assert not found["ok"]
    assert found["y"] <= found["tolerance"]


def test_a_stack_is_timed_in_parts():
    sizes = stack.Sizes(32, 64, 5, "float32")
    for kernels in (
        stack.dense_kernels(sizes),
        stack.sparse_kernels(sizes, Block(16, 16), (0.25, 0.5)),
    ):
        row = stack.times(sizes, kernels, "xla", interpret=False, repeats=1)
        assert set(row) == {*stack.PARTS, "memory", "clock"}
        assert all(row[part] > 0 for part in stack.PARTS)
        assert row["memory"]["program_bytes"] > 0
    assert [stack.limit(part, 0.1, 0.2) for part in stack.PARTS] == [
        0.1,
        0.1,
        0.2,
        pytest.approx(0.4 / 3),
    ]


def test_the_gradients_of_a_stack_are_those_of_its_products():
    """Each function that is timed computes what its name says."""
    sizes = stack.Sizes(8, 12, 5, "float32")
    first, second = stack.dense_kernels(sizes)
    keys = jax.random.split(jax.random.key(0), 3)
    x, h, dy = (jax.random.normal(key, (5, n)) for key, n in zip(keys, (8, 12, 8), strict=True))
    expected = {
        "y": (x @ first, h @ second),
        "dx": (h @ first.T, dy @ second.T),
        "dw": (x.T @ h, h.T @ dy),
    }
    assert set(expected) == set(stack.PRODUCTS)
    for name, pair in expected.items():
        for reads, other in zip(((x, h, first), (h, dy, second)), pair, strict=True):
            assert jax.numpy.allclose(stack.PRODUCTS[name](*reads), other, atol=1e-5)
