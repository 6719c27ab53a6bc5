"""A damaged checkpoint is named and never used; the newest whole one is."""

import shutil

import pytest
from toy_runs import CONFIG, assert_same, last_state, records, run

from experiments.errors import UserError
from experiments.main import main
from experiments.records import checkpoints
from experiments.records.checkpoints import MANIFEST, Kept, damage, load

OPTIONS = ("checkpoint_every=5", "keep_checkpoints=3")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "run"
    run(directory, "80/60", *OPTIONS, stop_at=15)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def largest(checkpoint):
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST]
    return max(files, key=lambda p: p.stat().st_size)


def flip(checkpoint):
    data = bytearray(largest(checkpoint).read_bytes())
    data[len(data) // 2] ^= 1
    largest(checkpoint).write_bytes(data)


def truncate(checkpoint):
    path = largest(checkpoint)
    path.write_bytes(path.read_bytes()[:-10])


def remove(checkpoint):
    largest(checkpoint).unlink()


def cut_off(checkpoint):
    (checkpoint / MANIFEST).unlink()


def empty_manifest(checkpoint):
    (checkpoint / MANIFEST).write_text("{}")


def manifest_of_another_kind(checkpoint):
    (checkpoint / MANIFEST).write_text('{"state/x": 3}')


DAMAGES = {
    "checksum": flip,
    "bytes instead of": truncate,
    "missing": remove,
    "no readable MANIFEST": cut_off,
    "lists no state or no meta": empty_manifest,
    "no readable MANIFEST.json": manifest_of_another_kind,
}


def test_keeps_as_many_as_asked(tmp_path, saved):
    names = lambda d: sorted(p.name for p in (d / "checkpoints").iterdir() if p.name.isdigit())  # noqa: E731
    assert names(saved) == ["10", "15", "5"]
    run(tmp_path / "run", "80/60", "checkpoint_every=5", "keep_checkpoints=1", stop_at=15)
    assert names(tmp_path / "run") == ["15"]
    assert damage(tmp_path / "run" / "checkpoints" / "15") is None


@pytest.mark.parametrize("why", DAMAGES)
def test_damaged_newest(copy, saved, capsys, why):
    DAMAGES[why](copy / "checkpoints" / "15")
    capsys.readouterr()
    assert run(copy, "80/60", *OPTIONS, stop_at=15) == "stopped"
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    assert err.startswith(f"warning: checkpoint {copy}/checkpoints/15 is not used")
    assert why in err
    assert "from the checkpoint of step 10" in out
    assert (copy / "checkpoints" / "damaged" / "15").is_dir()
    assert_same(*(last_state(d, "80/60", *OPTIONS) for d in (saved, copy)))
    assert records(copy) == records(saved)


def test_two_damaged(copy, capsys):
    flip(copy / "checkpoints" / "15")
    truncate(copy / "checkpoints" / "10")
    run(copy, "80/60", *OPTIONS, stop_at=6)
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 2
    assert "from the checkpoint of step 5" in out


def test_at_a_start_only_the_checkpoint_that_is_used_is_read(copy, capsys, monkeypatch):
    verified = []
    monkeypatch.setattr(checkpoints, "damage", lambda path: verified.append(path.name))
    run(copy, "80/60", *OPTIONS, stop_at=16)
    assert verified == ["15"]
    assert "from the checkpoint of step 15" in capsys.readouterr().out


def test_every_one_damaged(copy):
    for step in (5, 10, 15):
        flip(copy / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"every checkpoint is damaged \(5: .*; 10: .*; 15: "):
        run(copy, "80/60", *OPTIONS)
    assert (copy / "checkpoints" / "15").is_dir()


def test_every_manifest_is_gone(copy):
    """No run is cut off like that: it is refused, and does not begin anew over its records."""
    for step in (5, 10, 15):
        cut_off(copy / "checkpoints" / str(step))
    before = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"every checkpoint is damaged \(5: no readable MANIFEST"):
        run(copy, "80/60", *OPTIONS)
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_a_deletion_that_was_cut_off_is_ended(copy, capsys, monkeypatch):
    """Killed while an old checkpoint is deleted: half of it is no damaged one."""

    def killed(path):
        largest(path).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("experiments.records.files.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run(copy, "80/60", *OPTIONS)
    names = {p.name for p in (copy / "checkpoints").iterdir()}
    assert names == {"5.deleted", "10", "15", "20"}
    capsys.readouterr()
    assert run(copy, "80/60", *OPTIONS) == "finished"
    assert "damaged" not in capsys.readouterr().err
    assert {p.name for p in (copy / "checkpoints").iterdir()} == {"10", "15", "20"}


def test_what_a_killed_save_left_is_removed(copy):
    (copy / "checkpoints" / "20.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    run(copy, "80/60", *OPTIONS)
    assert {p.name for p in (copy / "checkpoints").iterdir()} == {"10", "15", "20"}


def test_first_save_cut_off_begins_anew(tmp_path, capsys):
    run(tmp_path / "run", "80/60", stop_at=5)
    cut_off(tmp_path / "run" / "checkpoints" / "5")
    assert run(tmp_path / "run", "80/60", stop_at=5) == "stopped"
    out, err = capsys.readouterr()
    assert "going on" not in out
    assert len(err.splitlines()) == 1
    assert len(records(tmp_path / "run")) == 2


def test_reading_alone_changes_nothing(copy, capsys):
    flip(copy / "checkpoints" / "15")
    before = sorted(copy.rglob("*"))
    state, _ = last_state(copy, "80/60", *OPTIONS)
    assert int(state.step) == 10
    assert "checkpoints/15 is damaged" in capsys.readouterr().err
    assert sorted(copy.rglob("*")) == before


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="no whole checkpoint"):
        load(tmp_path, lambda step: {})


KEPT = {
    (2, 0, ""): {40, 50},
    (1, 20, ""): {20, 40, 50},
    (1, 0, "max accuracy"): {20, 50},
    (1, 0, "min loss"): {10, 50},
    (1, 30, "min accuracy"): {30, 40, 50},
}


@pytest.mark.parametrize("asked", KEPT)
def test_which_are_kept(asked):
    values = {
        "accuracy": {10: 0.4, 20: 0.9, 30: None, 40: 0.2, 50: None},
        "loss": {10: 0.1, 20: 0.1, 30: 0.5, 40: 0.6, 50: 0.7},
        "": dict.fromkeys((10, 20, 30, 40, 50)),
    }
    assert Kept(*asked).among(values[Kept(*asked).metric]) == KEPT[asked]


def test_the_best_one_is_kept_over_a_restart(tmp_path):
    """The first process leaves the best one by its own, the lowest accuracy, behind."""
    options = ("checkpoint_every=4", "eval_every=2", "keep_checkpoints=1")
    options += ("keep_best_checkpoint=min accuracy",)
    run(tmp_path / "run", "80/60", *options, stop_at=9)
    run(tmp_path / "run", "80/60", *options)
    found = {
        r["step"]: r["accuracy"]
        for r in records(tmp_path / "run")
        if r["split"] == "test" and r["step"] % 4 == 0 and not r.get("final")
    }
    assert sorted(found) == [4, 8, 12, 16]
    best = min(found, key=found.get)
    assert best < 9
    kept = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {best, 20}


MISTAKES = {
    "keep_checkpoints_every=7 checkpoint_every=5": "must be a multiple of checkpoint_every=5",
    "keep_checkpoints_every=7": "must be a multiple of checkpoint_every=0",
    "keep_best_checkpoint=loss": "found 'loss'; must be 'max NAME' or 'min NAME' of a metric",
    "keep_best_checkpoint=min@loss checkpoint_every=5": "nothing to rank by: checkpoint_every=5",
    "keep_best_checkpoint=min@loss checkpoint_every=5 eval_every=2": "multiple of eval_every=2",
    "keep_best_checkpoint=max@acc checkpoint_every=4 eval_every=2": "one of accuracy, loss",
}


@pytest.mark.parametrize(("options", "words"), MISTAKES.items())
def test_what_cannot_be_kept(tmp_path, capsys, options, words):
    flags = [f"--config.{option.replace('@', ' ')}" for option in options.split()]
    assert main([f"--config={CONFIG}:80/60", f"--workdir={tmp_path}/run", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "run").exists()


def test_killed_before_the_checksums_are_written(tmp_path, capsys, monkeypatch):
    """Orbax has finished, and the checkpoint is not complete: the one before it is still there."""
    options = ("checkpoint_every=5", "keep_checkpoints=1")

    def killed(checkpoint):
        if checkpoint.name == "10":
            raise KeyboardInterrupt
        write(checkpoint)

    write = checkpoints._write_manifest
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", "80/60", *options)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"5", "10"}
    run(tmp_path / "run", "80/60", *options)
    out, err = capsys.readouterr()
    assert "from the checkpoint of step 5" in out
    assert "10 is not used" in err
