"""scripts/bench_peers.py without its peers, and its arithmetic on a clock that steps move."""

import functools
import importlib.util
import itertools
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.config import resolve
from experiments.errors import UserError
from scripts import bench_peers
from scripts.bench_peers import Side, compare
from topkast_jax import statistics


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what steps add to it."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


def steps_that_take(clock, seconds, losses=(1.0,), parameters=100):
    durations, values = itertools.cycle(seconds), itertools.cycle(losses)

    def step():
        clock.seconds += next(durations)
        return next(values)

    return Side(step, parameters)


def nothing_installed(monkeypatch, but=()):
    find = importlib.util.find_spec
    packages = {name for row in bench_peers.ROWS.values() for name in row.packages} - set(but)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in packages else find(name)
    )


def test_a_ratio_is_the_median_of_those_of_each_repeat(clock):
    """The machine becomes slower all the time; the ratio of one repeat stays the same."""
    slower = [2.0**i for i in range(9)]
    ours = steps_that_take(clock, [3 * s for s in slower])
    peer = steps_that_take(clock, [4 * s for s in slower], losses=[2.0, 1.0])
    found = compare(ours, peer, 5)
    uncounted = bench_peers.WARM + 1
    assert found == {
        "ratio": 0.75,
        "quartiles": [0.75, 0.75],
        "ours_seconds": 3 * 2.0 ** (uncounted + 2),
        "peer_seconds": 4 * 2.0 ** (uncounted + 2),
        "parameters": {"ours": 100, "peer": 100},
        "first_loss": {"ours": 1.0, "peer": 2.0},
    }


def test_outliers_of_one_repeat_do_not_count(clock):
    ours = steps_that_take(clock, [1.0] * bench_peers.WARM + [1.0, 1.0, 90.0, 1.0, 1.0, 1.0])
    found = compare(ours, steps_that_take(clock, [2.0]), 5)
    assert (found["ratio"], found["ours_seconds"], found["peer_seconds"]) == (0.5, 1.0, 2.0)


def test_sizes_must_agree(clock):
    ours = steps_that_take(clock, [1.0], parameters=10_000)
    assert compare(ours, steps_that_take(clock, [1.0], parameters=10_100), 1)["ratio"] == 1.0
    with pytest.raises(UserError, match=r"10000.*10102.*within 1 %") as error:
        compare(ours, steps_that_take(clock, [1.0], parameters=10_102), 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_must_be_finite(clock, bad):
    good = steps_that_take(clock, [1.0])
    for ours, peer, who in (
        (good, steps_that_take(clock, [1.0], [1.0, bad]), "peer"),
        (steps_that_take(clock, [1.0], [1.0, bad]), good, "ours"),
    ):
        with pytest.raises(UserError, match=f"step 2 of {who}: the loss is {bad}"):
            compare(ours, peer, 1)


def side_of_this_process():
    """Its loss is the number of the process, in which XLA has threads."""
    jax.block_until_ready(jax.numpy.ones(3) + 1)
    return Side(lambda: float(os.getpid()), 100)


def side_that_keeps_memory():
    """Its first loss is 1 if 100 MB that are freed stay with the process."""

    def resident():
        return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])

    def step():
        before = resident()
        np.ones(12_500_000)
        return float(resident() - before > 90_000_000)

    return Side(step, 100)


def test_each_side_has_a_process_of_its_own():
    record = bench_peers.compare_processes(side_of_this_process, side_that_keeps_memory, 1)
    assert record["first_loss"]["ours"] != float(os.getpid())
    assert record["first_loss"]["peer"] == 1.0
    assert record["threads"]["ours"] >= 1
    assert record["threads"]["peer"] is None  # No test has PyTorch.


def test_a_process_that_ends_is_one_line():
    with pytest.raises(UserError, match="process of one side ended; is there memory") as error:
        bench_peers.compare_processes(functools.partial(os._exit, 1), side_of_this_process, 1)
    assert "\n" not in str(error.value)


def test_no_peer_is_one_line(monkeypatch, capsys):
    nothing_installed(monkeypatch)
    assert bench_peers.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    for row in bench_peers.ROWS.values():
        assert row.install in err


def test_rows_without_their_peer_are_named(monkeypatch, capsys, tmp_path):
    """Of three rows, one is measured: torchvision is not there, and no checkout is named."""
    nothing_installed(monkeypatch, but=["jaxpruner", "chex"])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("torch") else True
    )
    monkeypatch.setattr(bench_peers, "use_all_cores", lambda: None)
    monkeypatch.setattr(bench_peers, "updates", lambda repeats: {"ratio": repeats / 4})
    assert bench_peers.main(["--rows=updates,resnet,transformer_xl", "--repeats=3"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["rows"] == {"updates": {"ratio": 0.75}}
    assert found["not_installed"] == {
        name: bench_peers.ROWS[name].install for name in ("resnet", "transformer_xl")
    }
    assert found["device"] == "cpu"
    assert found["threads"].keys() >= {"xla"}
    assert found["cores"] >= 1
    assert "jax" in found["versions"]


def test_a_thread_that_ends_while_threads_are_counted(monkeypatch):
    ended = iter((True, False, False))

    def comm(path):
        if next(ended):
            raise FileNotFoundError(path)
        return "tf_XLAEigen/1"

    monkeypatch.setattr(Path, "glob", lambda *_: [Path("1"), Path("2"), Path("3")])
    monkeypatch.setattr(Path, "read_text", comm)
    assert bench_peers.threads()["xla"] == 2


def test_a_checkout_is_needed_for_the_row_of_the_reference(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    row = bench_peers.ROWS["transformer_xl"]
    assert not row.installed(SimpleNamespace(transformer_xl=None))
    assert row.installed(SimpleNamespace(transformer_xl=str(tmp_path)))


def test_masked_steps_choose_when_they_are_asked_to():
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (20, 50)), "bias": np.ones(50)}}
    side = bench_peers.masked_top_kast(params, 100)

    def counts():
        return statistics.mask_statistics(side._params, side._state)

    for due in (True, False):
        side.step(lambda state, due=due: bench_peers.with_choice(state, due))
    found = jax.tree.map(float, counts())
    assert found["forward_density"] == pytest.approx(bench_peers.FORWARD)
    assert found["backward_density"] == pytest.approx(bench_peers.BACKWARD)


def test_our_step_trains(monkeypatch):
    config = resolve(f"{bench_peers.TRANSFORMER_XL},smoke", ())
    program = bench_peers.build(config)
    side = bench_peers.our_step(program, bench_peers.random_batch(program))
    abstract = program.representation.abstract().params
    assert side.parameters == sum(leaf.size for leaf in jax.tree.leaves(abstract))
    first = side.step()
    assert side.step() < first


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rows=gpu"], "transformer_xl, resnet, updates, sparse"),
        (["--repeats=0"], "at least 1"),
        (["--transformer_xl=/not/there"], "mem_transformer.py"),
        (["--transformer_xl="], "must be a path"),
    ],
)
def test_mistakes_are_one_line(capsys, flags, told):
    assert bench_peers.main(flags) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert told in err


def test_a_checkout_without_its_row_is_one_line(capsys, tmp_path):
    (tmp_path / "pytorch").mkdir()
    (tmp_path / "pytorch/mem_transformer.py").touch()
    assert bench_peers.main(["--rows=resnet", f"--transformer_xl={tmp_path}"]) == 2
    assert "read only for the row transformer_xl" in capsys.readouterr().err
