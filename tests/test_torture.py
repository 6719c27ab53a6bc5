"""scripts/torture.py: its short form holds, and a promise that is broken is seen."""

import json

import pytest

from scripts import torture, wrong_inputs


def last_line(out):
    return json.loads(out.splitlines()[-1])


def test_wrong_commands_are_refused(capsys, tmp_path):
    results = tmp_path / "results.jsonl"
    flags = ["--quick", "--parts=wrong", f"--results={results}", f"--scratch={tmp_path}/scratch"]
    assert torture.main(flags) == 0
    out = capsys.readouterr().out
    assert last_line(out)["wrong"] == {"held": 40, "of": 40}
    assert len(results.read_text().splitlines()) == out.count(": ok\n") == 40
    assert torture.main(flags) == 0
    assert ": ok" not in capsys.readouterr().out  # They are done.


def test_there_are_hundreds(tmp_path):
    made = list(wrong_inputs.make(tmp_path, torture.call, files=False))
    assert len(made) == len({case.name for case in made}) > 2000
    assert {case.module for case in made} == set(wrong_inputs.MODULES.values())


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return 0", "status 0"),
        ("print('error: a\\nerror: b', file=sys.stderr); return 2", "not one line"),
        ("raise OSError", "Traceback"),
        ("time.sleep(5)", "hangs"),
    ],
)
def test_a_command_that_is_not_refused_is_seen(body, told):
    found = {}
    exec(f"import sys, time\ndef command(argv):\n    {body}", found)
    assert told in torture._refusal_problem(torture.call(found["command"], [], limit=1))


@pytest.mark.slow
def test_short_form(capsys, tmp_path):
    assert torture.main(["--quick", f"--scratch={tmp_path}"]) == 0
    found = last_line(capsys.readouterr().out)
    assert found["kills"] == {"held": 1, "of": 1}
    assert found["damage"] == {"held": 6, "of": 6}
    assert found["interruptions"] == {"SIGKILL": 1, "SIGTERM": 1}
