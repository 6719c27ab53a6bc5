"""The sets that a run writes, and how far they moved."""

import numpy as np
import pytest
import toy_runs

from topkast_jax.flags import BACKWARD, FORWARD

EVERY = ("write_sets_every=3", "method.refresh_every=2", "steps=12")
COMPACT = (*EVERY, "method.always_sparse=True")


def written(directory, step):
    """The forward and the backward set of each sparse leaf, from the file."""
    with np.load(directory / "sets" / f"{step}.npz") as file:
        bits = {name: np.unpackbits(file[name]).astype(bool) for name in file.files}
    names = sorted(name.removesuffix(".forward") for name in bits if name.endswith(".forward"))
    return [(bits[f"{name}.forward"], bits[f"{name}.backward"]) for name in names]


@pytest.mark.parametrize("own", [EVERY, COMPACT], ids=["masked", "always sparse"])
def test_files_hold_the_sets_and_records_say_how_they_moved(tmp_path, own):
    toy_runs.run(tmp_path, "80/60", *own)
    state, _ = toy_runs.last_state(tmp_path, "80/60", *own)
    if own is EVERY:
        expected = toy_runs.sets(state)
    else:
        flags = state.reservoir.sets.values()
        expected = [(f & FORWARD != 0, f & BACKWARD != 0) for f in flags]
    for found, sets in zip(written(tmp_path, 12), expected, strict=True):
        for one, other in zip(found, sets, strict=True):
            np.testing.assert_array_equal(one, np.ravel(other))
    records = [r for r in toy_runs.records(tmp_path) if r["split"] == "sets"]
    assert [r["step"] for r in records] == [3, 6, 9, 12]
    for record in records:
        pairs = list(
            zip(
                written(tmp_path, record["step"] - 3),
                written(tmp_path, record["step"]),
                strict=True,
            )
        )
        differ = [np.mean(then[0] ^ now[0]) for then, now in pairs]
        woken = [np.mean(now[0][~then[1]]) for then, now in pairs]
        expected = {"step": record["step"], "split": "sets", "since": record["step"] - 3}
        for name, values in (("differ", differ), ("woken", woken)):
            expected[f"{name}_mean"] = pytest.approx(np.mean(values))
            expected[f"{name}_least"] = pytest.approx(min(values))
            expected[f"{name}_most"] = pytest.approx(max(values))
        assert record == expected
    assert max(r["differ_most"] for r in records) > 0


def test_the_last_sets_are_written_whatever_their_step(tmp_path):
    """So that figure 3's last pair, from step 30,000 to the end at 32,000, has its number."""
    toy_runs.run(tmp_path, "80/60", "write_sets_every=5", *EVERY[1:])
    records = [r for r in toy_runs.records(tmp_path) if r["split"] == "sets"]
    assert [r["step"] for r in records] == [5, 10, 12]
    pairs = zip(written(tmp_path, 10), written(tmp_path, 12), strict=True)
    differ = [np.mean(then[0] ^ now[0]) for then, now in pairs]
    assert records[-1]["differ_mean"] == pytest.approx(np.mean(differ))


def test_an_interrupted_run_writes_the_same(tmp_path):
    toy_runs.run(tmp_path / "whole", "80/60", *EVERY)
    for stop_at in (4, 9, None):
        toy_runs.run(tmp_path / "parts", "80/60", *EVERY, stop_at=stop_at)
    whole, parts = (toy_runs.records(tmp_path / name) for name in ("whole", "parts"))
    assert whole == parts
    for step in (0, 3, 6, 9, 12):
        for one, other in zip(
            *(written(tmp_path / n, step) for n in ("whole", "parts")), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_a_run_may_begin_to_write_sets_later(tmp_path, capsys):
    toy_runs.run(tmp_path, "80/60", *EVERY[1:], stop_at=4)
    toy_runs.run(tmp_path, "80/60", *EVERY)
    assert [r["step"] for r in toy_runs.records(tmp_path) if r["split"] == "sets"] == [9, 12]
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert line.startswith(f"warning: {tmp_path}/sets/3.npz: cannot be read, so the sets of step 6")


def test_a_dense_run_has_no_sets_to_write(tmp_path):
    toy_runs.run(tmp_path, "dense", "write_sets_every=3", "steps=6")
    assert not (tmp_path / "sets").exists()
    assert not [r for r in toy_runs.records(tmp_path) if r["split"] == "sets"]
