"""scripts/launch_tpu with a gcloud that runs the commands of hosts in folders of this machine."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from experiments.config import resolve

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "scripts/launch_tpu"

# The states that `describe` says are lines of a file, the last one for ever. The first connection
# that shows a log is lost after as many lines as the file `lose` says.
GCLOUD = """#!/usr/bin/env bash
cd "$FAKE"
printf '%s ' "${@:3}" >>calls; echo >>calls
for flag in "$@"; do
  case $flag in --worker=*) worker=${flag#*=} ;; --command=*) command=${flag#*=} ;; esac
done
case "$3 $4" in
  "queued-resources describe")
    state=$(head -n 1 states)
    [ "$(wc -l <states)" -lt 2 ] || sed -i 1d states
    [ "$state" != MISSING ] || { echo "NOT_FOUND: no such resource" >&2; exit 1; }
    echo "$state" ;;
  "queued-resources delete")  # With the slice go its processes, which would write while rm runs.
    pids=$(cat host?/topkast_jax/launch.pid 2>noise)
    for pid in $pids; do kill -KILL -- "-$pid"; done 2>noise
    rm -rf host0 host1; mkdir host0 host1 ;;
  "queued-resources create") [ ! -e refuse ] || { echo "quota" >&2; exit 1; } ;;
  "tpu-vm ssh")
    if [ "$worker" = all ]; then
      for host in host0 host1; do (cd $host && bash -c "$command") || exit 1; done
    elif [ -e lose ]; then
      lines=$(cat lose); rm lose
      (cd host0 && bash -c "$command") | head -n "$lines"
      exit 255
    else
      cd host0 && bash -c "$command"
    fi ;;
esac
"""
FLAGS = ("--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot")


class Cloud:
    """The folder of the fake gcloud, and what was asked of it."""

    def __init__(self, folder):
        self.folder, self.repository = folder, folder / "repository"
        for host in ("host0", "host1", "bin", "repository/scripts"):
            (folder / host).mkdir(parents=True)
        gcloud = folder / "bin" / "gcloud"
        gcloud.write_text(GCLOUD)
        gcloud.chmod(0o755)
        shutil.copy(ROOT / "scripts/detached", self.repository / "scripts")
        setup = self.repository / "scripts" / "setup"
        setup.write_text('#!/bin/bash\necho "$TOPKAST_EXTRAS" >>installed\n')
        setup.chmod(0o755)
        git = ["git", "-C", self.repository, "-c", "user.name=a", "-c", "user.email=a@b.c"]
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            subprocess.run([*git, *words], check=True)
        self.states("ACTIVE")

    def states(self, *states):
        (self.folder / "states").write_text("".join(f"{state}\n" for state in states))

    def lose_after(self, lines):
        (self.folder / "lose").write_text(str(lines))

    def start(self, verb, *args, command=()):
        """Starts launch_tpu."""
        args = [verb, "slice", "--zone=z", *args, "--poll=0.05"]
        args = [LAUNCH, *args, *(["--", *command] if command else [])]
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "FAKE": str(self.folder)}
        pipe = subprocess.PIPE
        return subprocess.Popen(args, env=environment, stdout=pipe, stderr=pipe, text=True)

    def __call__(self, *args, command=()):
        """Runs launch_tpu; returns its status and what it printed other than gcloud's commands."""
        process = self.start(*args, command=command)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        out = [line for line in out.splitlines() if not line.startswith("gcloud ")]
        return process.returncode, out, err

    def calls(self):
        """What gcloud was asked since the last time, in short."""
        found = (self.folder / "calls").read_text().splitlines()
        (self.folder / "calls").unlink()
        return [" ".join(line.split()[1:2] + re.findall(r"detached \w+", line)) for line in found]

    def setup(self):
        return self("setup", f"--repository={self.repository}")


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def test_a_lost_connection_does_not_end_the_run(cloud):
    assert cloud.setup()[0] == 0
    for host in ("host0", "host1"):
        installed = cloud.folder / host / "topkast_jax" / "installed"
        assert installed.read_text() == "tpu\n"
    cloud.calls()
    cloud.lose_after(2)
    count = (
        'for i in 1 2 3 4; do echo "line  $i"; sleep 0.2; done; echo x >>ran; printf last; exit 3'
    )
    status, out, err = cloud("run", command=("bash", "-c", count))
    assert status == 3
    assert out == ["line  1", "line  2", "line  3", "line  4", "lastdetached: ended with status 3"]
    assert err.count("connection lost") == 1
    start, watch = "ssh detached start", "ssh detached watch"
    assert cloud.calls() == [start, watch, "describe", watch]
    for host in ("host0", "host1"):
        assert (cloud.folder / host / "topkast_jax" / "ran").read_text() == "x\n"


def test_a_run_that_is_there_is_shown_and_not_started_twice(cloud):
    cloud.setup()
    end = cloud.folder / "end"
    slow = ("bash", "-c", f"echo begun; until [ -e {end} ]; do sleep 0.1; done; echo ended")
    first = cloud.start("run", command=slow)
    assert "begun\n" in first.stdout
    first.kill()  # As where the terminal is closed.
    first.communicate()
    second = cloud.start("run", command=("echo", "other"))
    assert "begun\n" in second.stdout
    end.touch()
    out, _ = second.communicate(timeout=60)
    assert (second.returncode, out) == (0, "ended\ndetached: ended with status 0\n")


def test_resume_makes_a_slice_that_was_taken_away_anew(cloud):
    cloud.setup()
    cloud.lose_after(1)
    cloud.states("SUSPENDED")
    slow = ("bash", "-c", "echo begun; sleep 0.5; echo ended")
    status, out, _ = cloud("run", command=slow)
    assert status == 75
    assert out == ["begun", "slice is SUSPENDED: resume goes on from the last checkpoint"]
    cloud.calls()
    cloud.states("SUSPENDED", "WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "ACTIVE")
    flags = (*FLAGS, f"--repository={cloud.repository}", "--prepare=touch prepared")
    status, out, err = cloud("resume", *flags, command=slow)
    assert status == 0, err
    assert out == [
        "slice is WAITING_FOR_RESOURCES",
        "slice is PROVISIONING",
        "begun",
        "ended",
        "detached: ended with status 0",
    ]
    assert (cloud.folder / "host1" / "prepared").exists()
    calls = cloud.calls()
    assert calls[:3] == ["describe", "delete", "create"]
    assert calls[-3:] == ["ssh", "ssh detached start", "ssh detached watch"]
    assert set(calls[3:-3]) == {"describe"}
    assert cloud("resume", *flags, command=("true",))[0] == 0  # The slice is there.
    assert not {"delete", "create"} & set(cloud.calls())


def test_resume_makes_a_slice_whose_request_was_deleted(cloud):
    cloud.states("MISSING", "PROVISIONING", "ACTIVE")
    flags = (*FLAGS, f"--repository={cloud.repository}")
    status, out, err = cloud("resume", *flags, command=("echo", "begun"))
    assert (status, out[:2]) == (0, ["slice is PROVISIONING", "begun"]), err
    assert cloud.calls()[:2] == ["describe", "create"]


def test_what_gcloud_refuses_is_one_line(cloud):
    (cloud.folder / "refuse").touch()
    assert cloud("create", *FLAGS)[::2] == (
        1,
        "quota\nerror: gcloud ended with status 1; what it says is above\n",
    )
    cloud.states("FAILED")
    status, _, err = cloud.setup()
    assert (status, err.count("\n")) == (1, 1)
    assert "slice: is FAILED" in err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("create", "slice", "--zone=z", "--type=t"), "required: --version"),
        (("create", "", "--zone=z"), "must not be empty"),
        (("run", "slice", "--zone=z"), "required: command"),
        (("stop", "slice"), "invalid choice: 'stop'"),
        *(
            (("delete", "slice", "--zone=z", f"--poll={poll}"), "must be a number of seconds above")
            for poll in ("-1", "0", "nan", "inf", "x")
        ),
        (("delete", "slice", "--zone=a", "--zone=b"), "--zone: found 2 times; must be given once"),
        (("run", "slice", "--zone=z", "--", "a", "--b", "--b"), "gcloud not found on the PATH"),
        (("delete", "slice", "--zone=z"), "gcloud not found on the PATH"),
    ],
)
def test_a_mistake_is_one_line(args, told):
    line = [sys.executable, LAUNCH, *args]
    found = subprocess.run(line, capture_output=True, text=True, env={"PATH": "/nowhere"})
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert told in found.stderr


def test_the_job_has_a_pod_for_each_host():
    service, job = yaml.safe_load_all((ROOT / "docs/examples/gke_job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"] * job["spec"]["completions"]
    assert chips == int(rows) * int(columns)
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)
    flags = re.findall(r"--\S+", container["args"][0])
    resolve(flags[1].removeprefix("--config="), [flags[2].removeprefix("--config.")])


def test_the_guide_shows_what_is_run():
    """Each command of TPU_SETUP.md, with --dry-run, prints the gcloud commands that stand below."""
    guide = (ROOT / "TPU_SETUP.md").read_text().replace("\\\n", "")
    verbs = []
    for block in re.findall(r"```console\n(.*?)```", guide, re.DOTALL):
        for command, shown in re.findall(r"\$ (scripts/launch_tpu .*)\n((?:[^$].*\n)*)", block):
            words = shlex.split(command)
            words.insert(2, "--dry-run")
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
            assert [shlex.split(line) for line in shown.splitlines()] == [
                shlex.split(line) for line in done.stdout.splitlines()
            ]
            verbs.append(words[1])
    assert verbs == ["create", "setup", "run", "run", "resume", "delete"]


def test_what_has_ended_is_watched_and_not_started_again(cloud):
    cloud.setup()
    assert cloud("run", command=("bash", "-c", "echo begun; exit 3"))[0] == 3
    cloud.calls()
    status, out, _ = cloud("watch")
    assert (status, out) == (3, ["begun", "detached: ended with status 3"])
    assert cloud.calls() == ["ssh detached watch"]
    cloud("run", command=("echo", "second"))
    log = cloud.folder / "host0" / "topkast_jax" / "launch.log.1"
    assert log.read_text() == "begun\n"  # That of the last command stays beside the new one.


def test_a_request_that_was_deleted_ends_the_watching(cloud):
    cloud.setup()
    cloud.lose_after(1)
    cloud.states("MISSING")
    slow = ("bash", "-c", "echo begun; sleep 0.5; echo ended")
    assert cloud("run", command=slow)[0] == 75


def test_a_state_that_is_not_told_once_is_asked_for_again(cloud):
    gcloud = cloud.folder / "bin" / "gcloud"
    unknown = '[ "$state" != UNKNOWN ] || { echo "try again" >&2; exit 1; }\n    [ "$state" != MISS'
    gcloud.write_text(gcloud.read_text().replace('[ "$state" != MISS', unknown))
    cloud.states("UNKNOWN", "UNKNOWN", "ACTIVE")
    assert cloud.setup()[0] == 0
    cloud.states("UNKNOWN")
    status, _, err = cloud.setup()
    assert (status, err.count("try again")) == (1, 5)


def test_a_line_is_what_a_line_feed_ends(cloud):
    """A progress bar returns to the beginning of its line, which the host counts once."""
    cloud.setup()
    cloud.lose_after(1)
    bar = "printf 'a\\rb\\rc\\n'; echo second; sleep 0.5; echo third"
    _, out, _ = cloud("run", command=("bash", "-c", bar))
    assert [line for line in out if line][-3:-1] == ["second", "third"]
