"""A run's forward set in a file, and a run in its other form."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_runs

import topkast_jax as tk
from experiments import convert, export
from experiments.errors import UserError
from experiments.records import checkpoints, exported, restore, workdir
from experiments.records.checkpoints import Checkpoints
from experiments.training.program import build
from topkast_jax.always_sparse import FORMS, to_dense
from topkast_jax.trees import flatten_with_names

COMPACT = ("method.always_sparse=True", "method.refresh_every=4")
MASKED = ("method.inner_state=reset", "method.refresh_every=4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run in both forms, stopped after 9 steps."""
    directory = tmp_path_factory.mktemp("runs")
    for name, own in (("compact", COMPACT), ("masked", MASKED)):
        toy_runs.run(directory / name, "80/60", *own, stop_at=9)
    toy_runs.run(directory / "dense", "dense", stop_at=9)
    return directory


def view(directory, own):
    run = build(toy_runs.config("80/60", *own))
    state, _ = toy_runs.last_state(directory, "80/60", *own)
    if state.reservoir == ():
        return tk.forward_params(state.params, state.opt_state)
    params, opt_state = run.representation.sparse.to_masked(
        state.params, state.opt_state, state.reservoir
    )
    return tk.forward_params(params, opt_state)


def dense(leaf):
    return (
        to_dense(leaf)
        if hasattr(leaf, "pattern")
        else np.asarray(getattr(leaf, "todense", lambda: leaf)())
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "own"), [("compact", COMPACT), ("masked", MASKED)])
def test_a_file_of_any_form_is_the_forward_set(runs, tmp_path, capsys, name, own, form, suffix):
    out = tmp_path / f"file{suffix}"
    flags = [f"--workdir={runs / name}", f"--out={out}", f"--form={form}"]
    assert export.main(flags) == 0
    found, metadata = exported.load(out)
    expected = view(runs / name, own)
    for layer in ("in", "out"):
        np.testing.assert_array_equal(dense(found[layer]["kernel"]), expected[layer]["kernel"])
        np.testing.assert_array_equal(found[layer]["bias"], expected[layer]["bias"])
    assert found["model_state"]["mean"].shape == (16,)
    assert metadata["config"]["method"]["forward_density"] == pytest.approx(0.2)
    if form == "compact":
        values = found["in"]["kernel"].values
        assert values.size == round(0.2 * expected["in"]["kernel"].size)
    assert export.main(flags) == 2
    assert "exists; nothing is written over" in capsys.readouterr().err


def test_there_and_back_again_to_the_bit(runs, tmp_path):
    for way, to in (("masked", "masked"), ("back", "always_sparse")):
        source = runs / "compact" if way == "masked" else tmp_path / "masked"
        flags = [f"--workdir={source}", f"--out={tmp_path / way}", f"--to={to}"]
        assert convert.main(flags) == 0
    one, _ = toy_runs.last_state(runs / "compact", "80/60", *COMPACT)
    two, _ = toy_runs.last_state(tmp_path / "back", "80/60", *COMPACT)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True
    ):
        if ".theta" not in jax.tree_util.keystr(path):  # is stale on B until a refresh
            np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("name", "own", "to", "new"),
    [("compact", COMPACT, "masked", MASKED), ("masked", MASKED, "always_sparse", COMPACT)],
)
def test_a_converted_run_goes_on(runs, tmp_path, name, own, to, new):
    out, sets = tmp_path / "out", runs / name / "sets"
    sets.mkdir()
    (sets / "4.npz").write_bytes(b"sets of step 4")
    assert convert.main([f"--workdir={runs / name}", f"--out={out}", f"--to={to}"]) == 0
    shutil.rmtree(sets)
    assert (out / "sets" / "4.npz").read_bytes() == b"sets of step 4"
    assert toy_runs.run(out, "80/60", *new) == "finished"
    whole = tmp_path / "whole"
    toy_runs.run(whole, "80/60", *own)
    a, b = (toy_runs.records(d) for d in (whole, out))
    assert len(a) == len(b) > 2
    for one, two in zip(a, b, strict=True):
        numbers = {k: v for k, v in one.items() if isinstance(v, int | float)}
        assert {k: two[k] for k in numbers} == pytest.approx(numbers, rel=1e-4)
    ours, theirs = view(whole, own), view(out, new)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_dense_run_is_exported_as_it_is(runs, tmp_path):
    assert export.main([f"--workdir={runs / 'dense'}", f"--out={tmp_path / 'file.npz'}"]) == 0
    found, metadata = exported.load(tmp_path / "file.npz")
    assert (metadata["form"], metadata["leaves"]) == ("dense", {})
    assert "in/kernel" in flatten_with_names(found)[0]


def test_a_masked_run_that_has_no_compact_form_is_exported(tmp_path):
    own = ("method.pattern=block:4x4", "method.forward_density=0.001", "method.always_sparse=False")
    toy_runs.run(tmp_path / "run", "80/60", *own, stop_at=3)
    out = tmp_path / "file.npz"
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={out}", "--form=bcoo"]) == 0
    expected = view(tmp_path / "run", own)["in"]["kernel"]
    assert np.count_nonzero(expected) == 16
    np.testing.assert_array_equal(dense(exported.load(out)[0]["in"]["kernel"]), expected)


MISTAKES = {
    "convert RUNS/compact NEW --to=always_sparse": "is that already",
    "convert RUNS/dense NEW --to=masked": "the run is dense",
    "convert RUNS/compact RUNS --to=masked": "must be a new or an empty",
    "convert RUNS/compact NEW --to=dense": "invalid choice",
    "convert RUNS/none NEW --to=masked": "must be a run's folder",
    "export RUNS/none NEW.npz": "must be a run's folder",
    "export RUNS/compact NEW.bin": "must end in .safetensors or .npz",
    "convert RUNS/compact /proc/x --to=masked": "--out=/proc/x: cannot be written",
    "convert RUNS/compact gs://bucket/x --to=masked": "--out=gs:/bucket/x: is an address",
    "export RUNS/none NEW/no/o.npz": "cannot be written: there is no folder",
    "export RUNS/compact /proc/o.safetensors": "--out=/proc/o.safetensors: cannot be written",
    "export RUNS/compact NEW.npz --form=csr": "invalid choice: 'csr'",
}


@pytest.mark.parametrize(("command", "words"), MISTAKES.items())
def test_mistakes_are_one_line(runs, tmp_path, capsys, command, words):
    places = command.replace("RUNS", str(runs)).replace("NEW", str(tmp_path / "new"))
    tool, source, out, *flags = places.split()
    main = {"convert": convert.main, "export": export.main}[tool]
    assert main([f"--workdir={source}", f"--out={out}", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_conversion_is_whole_or_not_there(runs, tmp_path, capsys, monkeypatch, error):
    def save(store, *_):
        (store.directory / "half").write_text("a part of it")
        raise error

    monkeypatch.setattr(Checkpoints, "save", save)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "empty"):
        flags = [f"--workdir={runs / 'compact'}", f"--out={out}", "--to=masked"]
        if isinstance(error, OSError):
            assert convert.main(flags) == 2
            expected = f"error: --out={out}: cannot be written: No space left on device\n"
            assert capsys.readouterr().err == expected
        else:
            assert convert.main(flags) == 130
            assert capsys.readouterr().err == "error: interrupted\n"
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]


def test_an_empty_folder_is_converted_into(runs, tmp_path):
    assert convert.main([f"--workdir={runs / 'compact'}", f"--out={tmp_path}", "--to=masked"]) == 0
    assert (tmp_path / workdir.CONFIG).exists()
    assert not list(tmp_path.parent.glob("*unfinished*"))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_file_is_whole_or_not_there(runs, tmp_path, capsys, monkeypatch, suffix):
    def save(*args, **_):
        path = next(arg for arg in args if isinstance(arg, Path))
        path.write_bytes(b"a part of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", save)
    monkeypatch.setattr(exported.safetensors.numpy, "save_file", save)
    out = tmp_path / f"file{suffix}"
    assert export.main([f"--workdir={runs / 'compact'}", f"--out={out}"]) == 2
    assert capsys.readouterr().err.endswith("cannot be written: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_read_on_any_platform():
    blocks = (*COMPACT, "method.pattern=block:4x4", "method.backend=pallas_gpu")
    config = toy_runs.config("80/60", *blocks)
    build(restore.on_one_device(config), jax.devices()[:1])
    assert config.method.backend == "pallas_gpu"


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=1)
    (tmp_path / "b.safetensors").write_bytes(b"no")
    (tmp_path / "d.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-9])
    (tmp_path / "e.npz").write_bytes(b"")
    with pytest.raises(UserError, match="was not written by"):
        exported.load(tmp_path / "a.npz")
    for name in ("b.safetensors", "c.npz", "d.npz", "e.npz"):
        with pytest.raises(UserError, match=f"{name}: (was not written by|no such file)"):
            exported.load(tmp_path / name)
    with pytest.raises(UserError, match="is no file; must be a file from"):
        exported.load(tmp_path)


OTHER_CONFIGS = {
    "seed": ("config.seed: is missing",),
    "optimizer.l2": ("config.optimizer.l2: ", "x", -1, [0.9]),
    "optimizer.schedule.name": ("config.optimizer.schedule.name: ", "x", 3, None),
    "method.name": ("config.method.name: ", "x", 3, None),
    "method.always_sparse": ("config.method.", "x", 3, None),
    "method.refresh_every": ("config.method.refresh_every", "x", 0, -3),
    "data": ("config.data", 3),
    "derived": ("config.derived", 3, {}),
    "task": ("config.task: found", "x", 3, ["toy"]),
}


def test_a_run_from_before_a_key_that_changes_no_number_is_exported(runs, tmp_path):
    run = shutil.copytree(runs / "compact", tmp_path / "run")
    config = json.loads((run / workdir.CONFIG).read_text())
    del config["write_sets_every"]
    (run / workdir.CONFIG).write_text(json.dumps(config))
    assert export.main([f"--workdir={run}", f"--out={tmp_path}/o.npz"]) == 0
    assert convert.main([f"--workdir={run}", f"--out={tmp_path}/masked", "--to=masked"]) == 0


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("mesh", 7, ": config.mesh: found 7; must be a section with keys"),
        ("seed", 10**400, ": cannot be read as JSON: an integer of 401 digits"),
    ],
)
def test_a_config_with_what_no_run_writes_is_one_line(runs, tmp_path, capsys, key, value, told):
    config = json.loads((runs / "compact" / workdir.CONFIG).read_text()) | {key: value}
    (tmp_path / workdir.CONFIG).write_text(json.dumps(config))
    assert export.main([f"--workdir={tmp_path}", f"--out={tmp_path}/out.npz"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {tmp_path / workdir.CONFIG}{told}"


def test_positions_of_several_hosts_are_not_dropped(runs, tmp_path, capsys, monkeypatch):
    """Two hosts of a task whose iterators have positions of their own, in one process."""
    read = checkpoints._restore

    def of_two_hosts(checkpoint, abstract):
        state, (meta,) = read(checkpoint, abstract)
        return state, [meta, {**meta, "data": "elsewhere"}]

    monkeypatch.setattr(checkpoints, "_restore", of_two_hosts)
    flags = [f"--workdir={runs / 'compact'}", f"--out={tmp_path}/out.npz"]
    assert convert.main([*flags, "--to=masked"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: saved by 2 hosts, each with a position of its own in the data")
    assert not (tmp_path / "out.npz").exists()
    assert export.main(flags) == 0


@pytest.mark.parametrize("tool", ["export", "convert"])
@pytest.mark.parametrize("key", OTHER_CONFIGS)
def test_a_config_of_another_version_is_one_line(runs, tmp_path, capsys, key, tool):
    saved = json.loads((runs / "compact" / workdir.CONFIG).read_text())
    told, *values = OTHER_CONFIGS[key]
    *parents, last = key.split(".")
    for value in (None, *values):
        config = json.loads(json.dumps(saved))
        section = config
        for parent in parents:
            section = section[parent]
        if value is None:
            del section[last]
        else:
            section[last] = value
        (tmp_path / workdir.CONFIG).write_text(json.dumps(config))
        flags = [f"--workdir={tmp_path}", f"--out={tmp_path}/out.npz"]
        main = export.main if tool == "export" else convert.main
        assert main([*flags, *(["--to=masked"] if tool == "convert" else [])]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path / workdir.CONFIG}: {told}")


def test_the_converted_config_is_that_of_a_run_made_so(runs, tmp_path):
    convert.main([f"--workdir={runs / 'compact'}", f"--out={tmp_path / 'o'}", "--to=masked"])
    found = json.loads((tmp_path / "o" / workdir.CONFIG).read_text())
    expected = workdir.as_json(toy_runs.config("80/60", *MASKED))
    assert found.pop("command") == []  # That of the compact run would not make it.
    assert {k: v for k, v in found.items() if k != "name"} == {
        k: v for k, v in expected.items() if k not in ("name", "command")
    }
