"""A run whose folder is in a bucket is the run whose folder is on disk."""

import json

import gcs
import pytest
import toy_runs

from experiments import convert, report
from experiments.main import main
from experiments.records import files, workdir
from experiments.records.checkpoints import damage

OPTIONS = ("checkpoint_every=5", "eval_every=5", "write_sets_every=5", "method.inner_state=reset")
FORMS = {"masked": OPTIONS, "always_sparse": (*OPTIONS[:3], "method.always_sparse=True")}


@pytest.fixture(scope="module")
def store():
    with pytest.MonkeyPatch.context() as environment, gcs.serving(environment) as store:
        yield store


@pytest.fixture(scope="module", params=FORMS)
def pair(request, store, tmp_path_factory):
    """One run in a bucket, stopped twice on its way, and the same run on disk."""
    options, name = FORMS[request.param], request.param
    for stop in ("--stop_at=7", "--stop_at=12", "--stop_at=20"):
        flags = [f"--config.{option}" for option in options]
        address = f"--workdir=gs://bucket/{name}/run"
        assert main([f"--config={toy_runs.CONFIG}:80/60", address, *flags, stop]) == 0
    local = tmp_path_factory.mktemp(name) / "run"
    toy_runs.run(local, "80/60", *options)
    return files.path(f"gs://bucket/{name}/run"), local, options


def test_it_holds_the_same(pair):
    there, here, options = pair
    assert toy_runs.records(there) == toy_runs.records(here)
    states = [toy_runs.last_state(d, "80/60", *options) for d in (there, here)]
    assert states[0][1] == states[1][1] == {"position": 20}
    toy_runs.assert_same(states[0][0], states[1][0])
    for step in (0, 5, 10, 15, 20):
        name = f"sets/{step}.npz"
        assert (there / name).read_bytes() == (here / name).read_bytes()
    assert workdir.read_json(there / workdir.CONFIG) == workdir.read_json(here / workdir.CONFIG)
    finals = [workdir.read_json(d / workdir.FINAL) for d in (there, here)]
    assert finals[0]["test"] == finals[1]["test"]
    steps = [sorted(p.name for p in files.listed(d / "checkpoints")) for d in (there, here)]
    assert steps[0] == steps[1] == ["15", "20"]
    events = files.named(there, "events.out.tfevents.*")
    assert len(events) == 3
    assert all(event.read_bytes() for event in events)


def test_it_can_be_reported_and_converted(pair, tmp_path, capsys):
    there, _, _ = pair
    assert report.main([str(there.parent), f"--out={tmp_path}/report"]) == 0
    assert "toy" in (tmp_path / "report" / "report.html").read_text()
    to = "masked" if "always_sparse" in str(there) else "always_sparse"
    assert convert.main([f"--workdir={there}", f"--out={tmp_path}/new", f"--to={to}"]) == 0
    assert damage(tmp_path / "new" / "checkpoints" / "20") is None


def largest(checkpoint):
    names = [name for name in files.below(checkpoint) if name != "MANIFEST.json"]
    return max((checkpoint / name for name in names), key=files.size)


def flip(checkpoint):
    data = bytearray(largest(checkpoint).read_bytes())
    data[len(data) // 2] ^= 1
    largest(checkpoint).write_bytes(bytes(data))


DAMAGES = {
    "another checksum": flip,
    "no readable MANIFEST": lambda checkpoint: (checkpoint / "MANIFEST.json").unlink(),
}


@pytest.mark.parametrize("why", DAMAGES)
def test_damage(store, capsys, why):
    directory = files.path(f"gs://bucket/{why.replace(' ', '-')}")
    toy_runs.run(directory, "80/60", *OPTIONS, stop_at=10)
    before = toy_runs.records(directory)
    DAMAGES[why](directory / "checkpoints" / "10")
    names = list(files.below(directory / "checkpoints" / "10"))
    capsys.readouterr()
    toy_runs.run(directory, "80/60", *OPTIONS, stop_at=10)
    out, err = capsys.readouterr()
    assert "from the checkpoint of step 5" in out
    (line,) = err.splitlines()
    assert line.startswith(f"warning: checkpoint {directory}/checkpoints/10 is not used and moved")
    assert why in line
    assert list(files.below(directory / "checkpoints" / "damaged" / "10")) == names
    assert toy_runs.records(directory) == before


def test_half_deleted_checkpoints_do_not_matter(store, monkeypatch, capsys):
    directory = files.path("gs://bucket/killed")

    def killed(folder):
        largest(folder).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            toy_runs.run(directory, "80/60", "checkpoint_every=5", "keep_checkpoints=1")
    toy_runs.run(directory, "80/60", "checkpoint_every=5", "keep_checkpoints=1")
    assert "damaged" not in capsys.readouterr().err
    assert [p.name for p in files.listed(directory / "checkpoints")] == ["20"]


def test_records_are_stored_before_the_checkpoint_that_relies_on_them(store):
    directory = files.path("gs://bucket/records")
    file = files.growing(directory / "metrics.jsonl")
    file.write(b'{"step": 1}\n')
    file.flush()
    assert not (directory / "metrics.jsonl").exists()
    files.sync(file)
    file.write(b'{"step": 2}\n')
    assert (directory / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'
    file.close()
    found = (directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in found] == [1, 2]


@pytest.mark.parametrize("address", ["s3://bucket/run", "ftp://host/run"])
def test_other_addresses(capsys, address):
    assert main([f"--config={toy_runs.CONFIG}:80/60", f"--workdir={address}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{address}: must be gs://BUCKET/NAME, or a path" in line
