"""The commands that are shell scripts: their help, and what they refuse."""

import pathlib
import shutil
import subprocess

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
