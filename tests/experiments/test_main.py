"""The command line: what works, and what ends in one line and status 2."""

import json
import os
import shutil
import subprocess
import sys
import time

import jax
import pytest
from processes import one_device
from toy_runs import CACHE, CONFIG, last_state, records

from experiments.config import resolve
from experiments.errors import UserError
from experiments.main import main
from experiments.records import workdir
from experiments.training.metric_sums import Window
from experiments.training.profiling import Profile


def call(capsys, *args):
    status = main(args)
    out, err = capsys.readouterr()
    return status, out, err


def command(directory, *args, variant="80/60"):
    return (f"--config={CONFIG}:{variant}", f"--workdir={directory}", *args)


def assert_refused(result, *parts):
    status, _, err = result
    assert status == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    for part in parts:
        assert part in err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert main(command(directory)) == 0
    return directory


def snapshot(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_trains(finished):
    assert {p.name for p in finished.iterdir()} == {
        "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "final.json", ".lock"
    }  # fmt: skip
    config = json.loads((finished / "config.json").read_text())
    assert config["name"] == "toy_config:80/60"
    assert config["command"] == [a for a in command(finished) if a.startswith("--config")]
    assert config["method"]["backward_density"] == 0.4
    assert int(last_state(finished)[0].step) == 20
    assert any(p.stat().st_size > 100 for p in (finished / "tensorboard").iterdir())


def test_finished_run_is_left_alone(capsys, finished):
    before = snapshot(finished)
    status, out, _ = call(capsys, *command(finished))
    assert status == 0
    assert "holds the finished run" in out
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("steps=30", "steps is 20 there and 30 here"),
        ("method.forward_density=0.1", "method.forward_density is 0.2 there and 0.1 here"),
        ("optimizer.learning_rate=0.2", "optimizer.learning_rate is 0.1 there and 0.2 here"),
        ("optimizer.name=adam", "optimizer.b1 is 'nothing' there and 0.9 here"),
    ],
)
def test_workdir_of_another_config(capsys, finished, override, told):
    before = snapshot(finished)
    result = call(capsys, *command(finished, f"--config.{override}"))
    assert_refused(result, str(finished), "belongs to another config", told)
    assert snapshot(finished) == before


def test_workdir_that_is_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert_refused(call(capsys, *command(tmp_path / "file")), "is a file")
    assert (tmp_path / "file").read_text() == "precious"


def test_workdir_in_a_bucket_without_its_backend(capsys):
    address = "gs://bucket/run"
    assert_refused(call(capsys, *command(address)), f"{address}: cannot be opened: ", "gcsfs")


def test_unwritable_workdir(capsys, tmp_path):
    """Below a file and in /proc: root, who may run this, can write anywhere else."""
    (tmp_path / "file").write_text("precious")
    assert_refused(call(capsys, *command(tmp_path / "file" / "run")), "cannot be written")
    assert_refused(call(capsys, *command("/proc/run")), "/proc/run: cannot be written")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("metrics.jsonl", "holds metrics.jsonl but no config.json"),
        ("quickstart.py", "holds quickstart.py but no config.json"),
        ("final.json", "final.json: cannot be read as JSON"),
        ("checkpoints", "checkpoints: is a file; must be a folder"),
        ("tensorboard", "tensorboard: is a file; must be a folder"),
    ],
)
def test_workdir_of_something_else(capsys, tmp_path, name, told):
    (tmp_path / name).write_text("precious")
    assert_refused(call(capsys, *command(tmp_path)), told)
    assert (tmp_path / name).read_text() == "precious"
    assert list(tmp_path.iterdir()) == [tmp_path / name]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"architectures": ["BertModel"], "model_type": "bert"}',
        '{"name": "x", "seed": 1}',
        "[]",
    ],
)
def test_the_config_of_another_program_is_not_overwritten(capsys, tmp_path, text):
    """As the folder of a Hugging Face model has one."""
    (tmp_path / "config.json").write_text(text)
    assert_refused(call(capsys, *command(tmp_path)), f"{tmp_path}/config.json: ")
    assert (tmp_path / "config.json").read_text() == text
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("config.json", "config.json: is a folder; must be a file"),
        ("metrics.jsonl", "metrics.jsonl: is a folder; must be a file"),
        ("final.json", "final.json: cannot be read as JSON"),
    ],
)
def test_a_folder_where_a_file_should_be(capsys, tmp_path, name, told):
    (tmp_path / name / "precious").mkdir(parents=True)
    assert_refused(call(capsys, *command(tmp_path)), told)
    assert (tmp_path / name / "precious").is_dir()


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_final_json_that_was_cut_is_no_finished_run(capsys, finished, tmp_path, text):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "final.json").write_text(text)
    assert_refused(call(capsys, *command(tmp_path / "run")), "final.json: ")


def test_an_empty_path_is_refused(capsys, tmp_path, monkeypatch):
    """As an unset shell variable makes it: the current folder is not meant."""
    monkeypatch.chdir(tmp_path)
    for path in ("", " "):
        assert_refused(call(capsys, f"--config={CONFIG}", f"--workdir={path}"), "must be a path")
    assert not list(tmp_path.iterdir())


def test_the_home_folder_of_a_path(capsys, tmp_path, monkeypatch):
    """A shell leaves the ~ of --workdir=~/run as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert call(capsys, *command("~/run", "--stop_at=1"))[0] == 0
    assert (tmp_path / "home" / "run" / "config.json").exists()
    assert_refused(call(capsys, *command("~nobody-here/run")), "there is no such home folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "home"]


def test_a_link_in_the_way_is_not_followed(capsys, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.tmp").symlink_to(tmp_path / "precious")
    status, _, _ = call(capsys, *command(tmp_path / "run", "--stop_at=1"))
    assert status == 0
    assert (tmp_path / "precious").read_text() == "precious"


def test_two_processes_on_one_workdir(capsys, tmp_path):
    """The second is refused while the first lives; one that was killed holds nothing."""
    program = (
        "import pathlib, sys, time; from experiments.records import workdir\n"
        "with workdir.held(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        refused = call(capsys, *command(tmp_path / "run", "--stop_at=1"))
        assert_refused(refused, f"process {other.pid} on ", "trains in it")
        assert not (tmp_path / "run" / "config.json").exists()
        other.kill()
    assert call(capsys, *command(tmp_path / "run", "--stop_at=1"))[0] == 0


def test_unreadable_config_json(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert_refused(call(capsys, *command(tmp_path)), "config.json: cannot be read as JSON")


def test_describes_a_config(capsys):
    status, out, _ = call(capsys, f"--config={CONFIG}:80/60", "--describe")
    assert status == 0
    *_, kernel, sums, last = out.splitlines()
    assert " ".join(kernel.split()) == "out/kernel (32, 4) Unstructured() 0.2 0.4 26 51 128"
    assert sums.split() == ["all", "164", "292", "676"]
    numbers = json.loads(last)
    assert (numbers["parameters"], numbers["active_parameters"]) == (676, 164)
    assert numbers["inference_flops_fraction"] == pytest.approx((102 + 26) / 640)
    assert numbers["training_flops_fraction"] == pytest.approx((2 * 128 + 205 + 51) / 3 / 640)
    assert_refused(call(capsys, f"--config={CONFIG}:80/60"), "arguments are required: --workdir")


@pytest.mark.parametrize(
    "flag", ["--workdir=somewhere", "--stop_at=3", "--profile=1:2", "--distributed"]
)
def test_describe_refuses_what_it_does_not_read(capsys, flag):
    result = call(capsys, f"--config={CONFIG}:80/60", "--describe", flag)
    assert_refused(result, f"{flag.partition('=')[0]}: found with --describe, which trains nothing")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method.name=snip", "method.pattern=fan_in"), "FanIn() fixes how many each group keeps"),
        (("method.name=snfs", "method.always_sparse=True"), "SNFS observes the dense gradient"),
        (("method.name=snip", "method.scale_to_fan_in=True"), "must be False with snip"),
        (("method.name=pruning", "method.always_sparse=True"), "keeps other numbers of units"),
    ],
)
def test_describe_refuses_a_method_that_cannot_train_it(capsys, overrides, message):
    flags = [f"--config.{text}" for text in overrides]
    assert_refused(call(capsys, f"--config={CONFIG}:80/60", "--describe", *flags), message)


def test_a_run_shows_its_leaves_once(capsys, tmp_path):
    for stop in ("1", "2"):
        status, out, _ = call(capsys, *command(tmp_path / "run", f"--stop_at={stop}"))
        assert status == 0
        assert out.count("out/kernel  (32, 4)") == (stop == "1")


BAD_RULES = {
    "(('nothing','sparse'),('.*','dense'))": "matches no parameter",
    "(('in/.*','dense'),)": "no rule covers",
    "(('(','sparse'),)": "no regular expression",
}


@pytest.mark.parametrize("rules", BAD_RULES)
def test_rules_that_do_not_fit(capsys, tmp_path, rules):
    result = call(capsys, *command(tmp_path / "run", f"--config.method.rules={rules}"))
    assert_refused(result, BAD_RULES[rules])
    assert not (tmp_path / "run").exists()


BAD_FLAGS = {
    ("--config.stepz=3",): "no key 'stepz'",
    ("--config.steps=x",): "expected int",
    ("--config.method.forward_density=1.5",): "config.method.forward_density=1.5: must be",
    ("--config.method.backward_density=0.1",): "is below forward_density",
    ("--config.method.pattern=block:3x3",): "Block(3, 3) does not divide",
    ("--config.mesh.fsdp=3",): "config.mesh",
    ("--config.batch_size=3",): "config.batch_size: found 3; must be a multiple of",
    ("--stop_at=0",): "found '0'; must be an integer of at least 1",
    ("--profile=3",): "found '3'; must be START:STOP, the first and the last step",
    ("--profile=0:3",): "found '0:3'; must be START:STOP",
    ("--profile=5:4",): "found '5:4'; must be START:STOP",
    ("--profile=5:21",): "--profile=5:21: must end by step 20, the last",
    ("--profile=5:9", "--stop_at=8"): "--profile=5:9: must end by step 8, the last",
    ("--stop=3",): "unrecognized arguments: --stop=3",
    ("more",): "unrecognized arguments: more",
}


@pytest.mark.parametrize("args", BAD_FLAGS)
def test_bad_flags(capsys, tmp_path, args):
    assert_refused(call(capsys, *command(tmp_path / "run", *args)), BAD_FLAGS[args])
    assert not (tmp_path / "run").exists()


def traced_steps(directory):
    """The steps that the traces of a run hold, and the names of all events of any thread."""
    numbers, names = [], set()
    for path in directory.glob("tensorboard/plugins/profile/*/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for event in (event for line in plane.lines for event in line.events):
                names.add(event.name)
                numbers += [v for k, v in event.stats if (event.name, k) == ("train", "step_num")]
    return sorted(numbers), names


def test_a_profile_is_of_the_steps_that_were_named(capsys, tmp_path, finished):
    assert not [path for path in finished.rglob("*") if "profile" in path.name]
    run = command(tmp_path / "run", "--config.eval_at_end=False")
    assert call(capsys, *run, "--profile=4:6", "--stop_at=10")[0] == 0
    numbers, names = traced_steps(tmp_path / "run")
    assert numbers == [4, 5, 6]
    assert "PjitFunction(_step)" in names
    time.sleep(1)  # JAX names a trace by the second; two commands are further apart.
    status, out, _ = call(capsys, *run, "--profile=9:12")  # A command may be given again.
    assert status == 0
    assert "--profile=9:12: no trace of the steps up to 10\n" in out
    assert traced_steps(tmp_path / "run")[0] == [*numbers, 11, 12]


def test_a_profile_is_written_where_a_run_ends_within_it(tmp_path):
    with Profile(tmp_path, range(1, 9)) as traces, traces.step(1, Window(1)):
        pass
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_missing_flags(capsys, tmp_path):
    assert_refused(call(capsys), "the following arguments are required: --config, --workdir")
    assert_refused(call(capsys, f"--workdir={tmp_path}", "--config=no.py"), "no such file 'no.py'")


def test_bugs_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.main.train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(command(tmp_path))


def test_the_real_command(tmp_path):
    environment = one_device() | {k.upper(): str(v) for k, v in CACHE.items()}

    def call(*args):
        line = [sys.executable, "-m", "experiments.main", *command(tmp_path / "run", *args)]
        return subprocess.run(line, capture_output=True, text=True, env=environment)

    bad = call("--config.stepz=3")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: --config.stepz: no key 'stepz'; did you mean 'steps'? ")
    assert len(bad.stderr.splitlines()) == 1
    stopped = call("--stop_at=10")
    assert stopped.returncode == 0, stopped.stderr
    assert "the same command goes on" in stopped.stdout
    (told,) = stopped.stderr.splitlines()
    assert "no rules given; sparse: in/kernel, out/kernel; dense: in/bias" in told
    assert "step 10/20  train" in stopped.stdout
    assert stopped.stdout.startswith("leaf")  # The table of leaves, once.
    assert records(tmp_path / "run")[-1]["step"] == 10


def test_a_run_on_a_cpu_keeps_the_memory_that_it_frees(tmp_path):
    """Before anything is computed, and in its own process alone."""
    program = """
import runpy, sys
from topkast_jax import host_memory
def keep_freed():
    sys.exit(40)
host_memory.keep_freed = keep_freed
runpy.run_module("experiments.main", run_name=sys.argv.pop(1), alter_sys=True)
"""
    for name, status in (("__main__", 40), ("imported", 0)):
        line = [sys.executable, "-c", program, name]
        found = subprocess.run([*line, *command(tmp_path / "run")], capture_output=True, text=True)
        assert found.returncode == status, found.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_beyond_the_memory_is_one_line(tmp_path):
    """To fetch an array of an initialisation that failed would wait for ever."""
    flags = command(tmp_path / "run", "--config.model.hidden=10000000000000", variant="dense")
    line = [sys.executable, "-m", "experiments.main", *flags]
    found = subprocess.run(line, capture_output=True, text=True, env=one_device(), timeout=100)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: out of memory: ")
    assert len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize("describes", [False, True])
def test_devices_that_are_not_here(tmp_path, describes):
    line = [sys.executable, "-m", "experiments.main", *command(tmp_path / "run")]
    if describes:
        line = [*line[:-1], "--describe"]
    environment = os.environ | {"JAX_PLATFORMS": "abacus"}
    found = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: JAX_PLATFORMS='abacus': no such devices here")
    assert len(found.stderr.splitlines()) == 1


def test_a_run_may_go_on_with_another_backend(tmp_path):
    """Which says where products run, as the mesh does."""
    blocks = ("method.always_sparse=True", "method.pattern=block:4x4")
    workdir.claim(tmp_path, resolve(f"{CONFIG}:80/60", blocks))
    (tmp_path / workdir.METRICS).write_text('{"step": 1, "split": "train"}\n')
    workdir.claim(tmp_path, resolve(f"{CONFIG}:80/60", (*blocks, "method.backend=xla")))
    with pytest.raises(UserError, match="refresh_delay is 0 there and 1 here"):
        workdir.claim(tmp_path, resolve(f"{CONFIG}:80/60", (*blocks, "method.refresh_delay=1")))


def test_a_run_may_go_on_with_other_processes_for_its_data(tmp_path):
    """Which are there in one config and not in an older one, and change no batch."""
    imagenet = "configs/imagenet_resnet50.py:dense"
    workdir.claim(tmp_path, resolve(imagenet, ["data.workers=16"]))
    (tmp_path / workdir.METRICS).write_text('{"step": 1, "split": "train"}\n')
    workdir.claim(tmp_path, resolve(imagenet, ["data.workers=2", "data.read_ahead=5"]))
    with pytest.raises(UserError, match="image_size is 224 there and 160 here"):
        workdir.claim(tmp_path, resolve(imagenet, ["data.image_size=160"]))


def test_a_folder_without_results_may_be_taken_over(tmp_path):
    """A run that failed before its first record left only its config: nothing is lost."""
    first = resolve(f"{CONFIG}:dense", [])
    second = resolve(f"{CONFIG}:80/60", [])
    workdir.claim(tmp_path, first)
    workdir.claim(tmp_path, second)
    assert workdir.read_json(tmp_path / workdir.CONFIG) == workdir.as_json(second)
    (tmp_path / workdir.METRICS).write_text('{"step": 1, "split": "train"}\n')
    with pytest.raises(UserError, match="belongs to another config"):
        workdir.claim(tmp_path, first)


def test_an_option_that_is_newer_than_a_folder_is_off_there(tmp_path):
    config = resolve(f"{CONFIG}:80/60", [])
    older = workdir.as_json(config)
    del older["method"]["exploration_decay"]
    workdir.write_json(tmp_path / workdir.CONFIG, older)
    (tmp_path / workdir.METRICS).write_text('{"step": 1, "split": "train"}\n')
    workdir.claim(tmp_path, config)
    on = resolve(f"{CONFIG}:80/60", ["method.exploration_decay=0.1"])
    with pytest.raises(UserError, match="exploration_decay is 'nothing' there and 0.1 here"):
        workdir.claim(tmp_path, on)
