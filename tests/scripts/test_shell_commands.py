"""The commands that are shell scripts: their help, and what they refuse."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

from topkast_jax.always_sparse.products import native_library

ROOT = pathlib.Path(__file__).parents[2]


def call(*line):
    found = subprocess.run(line, capture_output=True, text=True)
    return found.returncode, found.stdout, found.stderr


def test_a_command_that_is_missing_is_not_started(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "detached", tmp_path / "scripts")
    told = "scripts/detached: start: found no command; must be start COMMAND…\n"
    assert call(tmp_path / "scripts" / "detached", "start") == (2, "", told)
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


def test_the_help_of_prepare_tfds_is_no_data_set():
    for flag in ("--help", "-h"):
        status, out, err = call(ROOT / "scripts" / "prepare_tfds", flag)
        assert (status, err) == (0, "")
        assert out.startswith("Downloads and prepares a data set")
        assert out.count("\n") == 5
    status, _, err = call(ROOT / "scripts" / "prepare_tfds", "cifar")
    assert (status, err.count("\n")) == (2, 1)


@pytest.fixture
def detached(tmp_path):
    """`scripts/detached` in a folder of its own; what it runs ends with the test."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "detached", tmp_path / "scripts")
    yield lambda *line: call(tmp_path / "scripts" / "detached", *line)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int((tmp_path / "launch.pid").read_text()), signal.SIGKILL)


def test_a_command_that_is_stopped_ends_in_its_own_way(detached, tmp_path):
    command = "trap 'sleep 0.3; echo saved; exit 75' TERM; echo begun; while :; do sleep 0.1; done"
    assert detached("start", "bash", "-c", command) == (0, "", "")
    while "begun" not in (tmp_path / "launch.log").read_text():
        time.sleep(0.05)
    os.kill(int((tmp_path / "launch.pid").read_text()), signal.SIGTERM)
    assert detached("start", "echo", "second")[1].endswith("the last command still runs\n")
    status, out, _ = detached("watch")
    assert (status, out) == (0, "begun\nsaved\ndetached: ended with status 75\n")
    assert detached("start", "sleep", "100") == (0, "", "")


def test_the_number_of_a_process_that_is_another_now_holds_nothing_up(detached, tmp_path):
    detached("start", "echo", "first")
    assert "first\n" in detached("watch")[1]
    (tmp_path / "launch.pid").write_text(f"{os.getppid()}\n")
    assert detached("watch")[1] == "first\ndetached: ended with status 0\n"
    assert detached("start", "sleep", "100") == (0, "", "")


@pytest.fixture
def project(tmp_path):
    """`scripts/setup` with a stand-in for Python that notes when an environment is made."""
    sources = [
        path.relative_to(ROOT)
        for path in (*native_library.SOURCES, pathlib.Path(native_library.__file__))
    ]
    for name in ("scripts/setup", "requirements.lock", *sources):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "a folder" / "python"
    python.parent.mkdir()
    python.write_text(
        "#!/bin/bash\n"
        'case "$*" in\n'
        '  -m\\ venv*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";'
        ' echo made >>"$NOTES"; sleep 0.5 ;;\n'
        '  -m\\ pip*) [ ! -e "$NOTES.fail" ] || exit 1 ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "NOTES": str(tmp_path / "notes")}
    environment = {k: v for k, v in environment.items() if not k.startswith("TOPKAST_")}

    def start(**more):
        line = [tmp_path / "scripts" / "setup"]
        return subprocess.Popen(line, env=environment | more, stderr=subprocess.PIPE)

    return start


def test_two_setups_take_turns_and_the_interpreter_may_have_a_space_in_its_path(project, tmp_path):
    both = [project() for _ in range(2)]
    told = [process.communicate(timeout=60)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert (tmp_path / "notes").read_text() == "made\n"
    assert sum("waiting for another scripts/setup" in text for text in told) == 1


def test_an_environment_stays_until_the_new_one_is_made(project, tmp_path):
    assert project().wait(60) == 0
    (tmp_path / ".venv" / "own").touch()
    with (tmp_path / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    (tmp_path / "notes.fail").touch()
    assert project().wait(60) == 1
    assert (tmp_path / ".venv" / "own").exists()
    (tmp_path / "notes.fail").unlink()
    assert project().wait(60) == 0
    assert not (tmp_path / ".venv" / "own").exists()
    assert not (tmp_path / ".venv.old").exists()
    assert (tmp_path / "notes").read_text() == "made\n" * 3


def test_the_environment_of_another_folder_is_made_anew(project, tmp_path):
    assert project().wait(60) == 0
    packages = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    for folder, times in ((tmp_path, 1), ("/elsewhere", 2)):
        (packages / "topkast-experiments.pth").write_text(f"{folder}\n")
        assert project().wait(60) == 0
        assert (tmp_path / "notes").read_text() == "made\n" * times


def test_setup_touches_no_folder_of_others_and_knows_its_extras(project, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    for more, told in (
        ({"TOPKAST_VENV": "mine"}, "scripts/setup: mine is no environment that"),
        ({"TOPKAST_EXTRAS": "cuda,gpu"}, "found 'gpu'; allowed: cuda, tpu, aot, tensorflow"),
        ({"PYTHON": "/no/such"}, "no CPython >= 3.11"),
    ):
        process = project(**more)
        err = process.communicate(timeout=60)[1].decode()
        assert (process.returncode, err.count("\n")) == (2, 1), err
        assert told in err
    assert (tmp_path / "mine" / "file").exists()
    assert not (tmp_path / "notes").exists()


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["--workdir=out"], ["--workdir={}/out"]),
        (["--workdir", "out"], ["--workdir", "{}/out"]),
        (["--workdir=/out"], ["--workdir=/out"]),
        (["--workdir=~/out"], ["--workdir=~/out"]),  # The command expands it.
        ([], ["--workdir=quickstart"]),
        (["--slurm=x"], ["--workdir=quickstart", "--slurm=x"]),
    ],
)
def test_a_relative_workdir_is_one_of_where_the_quickstart_is_called(given, taken, tmp_path):
    project, elsewhere = tmp_path / "a project", tmp_path / "elsewhere"
    for folder in (project / "scripts", project / ".venv" / "bin", elsewhere):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "quickstart", project / "scripts")
    for name in ("scripts/setup", ".venv/bin/python"):
        (project / name).write_text('#!/bin/bash\necho "$@"\n')
        (project / name).chmod(0o755)
    line = [project / "scripts" / "quickstart", *given, "--seeds=2"]
    found = subprocess.run(line, cwd=elsewhere, capture_output=True, text=True, check=True)
    words = found.stdout.split()[3:]
    jobs = [word for word in words if word.startswith("--jobs=")]
    assert len(jobs) == (given != ["--slurm=x"])
    expected = [word.format(elsewhere) for word in taken]
    assert [word for word in words if word not in jobs] == [*expected, "--seeds=2"]
