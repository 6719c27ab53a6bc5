"""A method in a user's own file, named by its import path, in all the commands."""

import json
import pathlib

import numpy as np
import pytest
from toy_runs import CONFIG, assert_same, last_state, sets

from experiments import export, report
from experiments.main import main
from experiments.records import exported

EXAMPLE = pathlib.Path(__file__).parents[3] / "docs/examples/set_method.py"
# Another default than that of any method here, and an argument that no method here has.
OWN = """

def every_second(inner, forward_density=0.25, start=1.0, refresh_every=2, rules=None, seed=0):
    assert start == 0.5
    return set_method(inner, forward_density, refresh_every, rules=rules, seed=seed)
"""
NAME, START = "method.name=own_method:every_second", "method.start=0.5"


def command(directory, *overrides):
    flags = (f"--config.{text}" for text in (NAME, START, *overrides))
    return [f"--config={CONFIG}:80/60", f"--workdir={directory}", *flags]


@pytest.fixture
def own_method(tmp_path, monkeypatch):
    (tmp_path / "own_method.py").write_text(EXAMPLE.read_text() + OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own_method")
def test_trains_resumes_exports_and_reports(tmp_path, capsys):
    runs = tmp_path / "runs"
    assert main(command(runs / "whole")) == 0
    assert main([*command(runs / "parts"), "--stop_at=7"]) == 0
    assert main(command(runs / "parts")) == 0
    method = json.loads((runs / "parts" / "config.json").read_text())["method"]
    assert method == {
        "name": "own_method:every_second", "forward_density": 0.2, "start": 0.5, "refresh_every": 3,
        "rules": None, "seed": None, "distribution": "uniform", "always_sparse": False,
        "scale_to_fan_in": False,
    }  # fmt: skip
    states = [last_state(runs / name, "80/60", NAME, START)[0] for name in ("whole", "parts")]
    assert_same(*states)
    (forward, backward), _ = sets(states[0])
    assert np.array_equal(forward, backward)
    assert forward.sum() == round(0.2 * forward.size)
    out = tmp_path / "own.npz"
    assert export.main([f"--workdir={runs / 'parts'}", f"--out={out}", "--form=dense"]) == 0
    kernel = exported.load(out)[0]["in"]["kernel"]
    assert np.array_equal(kernel, np.where(forward, states[0].params["in"]["kernel"], 0))
    assert report.main([str(runs), f"--out={tmp_path / 'report'}"]) == 0
    assert "own_method:every_second" in capsys.readouterr().out


@pytest.mark.usefixtures("own_method")
def test_is_always_sparse_too(tmp_path):
    assert main(command(tmp_path / "run", "method.always_sparse=True", "steps=6")) == 0


@pytest.mark.parametrize("where", ["module", "factory", "config"])
def test_a_mistake_in_a_users_file_keeps_its_traceback(tmp_path, monkeypatch, where):
    module, config = tmp_path / f"broken_{where}.py", tmp_path / "config.py"
    module.write_text("1 / 0\n" if where == "module" else "def own(inner):\n    1 / 0\n")
    wrong = "1 / 0" if where == "config" else "config = base_config('toy')"
    config.write_text(
        "from experiments.config import base_config\n"
        f"def get_config():\n    {wrong}\n    return config\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError) as found:
        main([
            f"--config={config}", f"--workdir={tmp_path / 'run'}",
            f"--config.method.name={module.stem}:own",
        ])  # fmt: skip
    broken = config if where == "config" else module
    assert str(broken) == str(found.traceback[-1].path)
    assert not (tmp_path / "run").exists()
