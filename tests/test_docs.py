"""The code in the documents runs as it stands there."""

import importlib
import json
import pathlib
import re
import shlex

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = ["README.md", "docs/adding_a_method.md", "docs/always_sparse.md"]


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_run(name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    scope = {}
    for block in blocks:
        exec(compile(block, name, "exec"), scope)


def test_a_model_and_a_data_set_of_ones_own(tmp_path, monkeypatch, capsys):
    """The files of docs/adding_a_task.md are written to a folder, and its commands run there."""
    text = (ROOT / "docs/adding_a_task.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        (tmp_path / re.match(r"# (\w+\.py)\n", block)[1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (commands,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for command in commands.splitlines():
        python, m, module, *arguments = shlex.split(command)
        assert (python, m) == ("python", "-m")
        assert importlib.import_module(module).main(arguments) == 0, capsys.readouterr().err
    for run in ("masked", "sparse"):
        final = json.loads((tmp_path / "runs" / run / "final.json").read_text())
        assert final["test"]["accuracy"] > 0.9
        assert final["densities"]["forward"] == pytest.approx(0.2, abs=0.01)
    assert {"stripes.npz", "report"} <= {path.name for path in tmp_path.iterdir()}


def test_docstring_examples():
    import doctest

    top_kast = importlib.import_module("topkast_jax.top_kast")

    assert doctest.testmod(top_kast).attempted > 3
    assert doctest.testmod(top_kast).failed == 0


def test_every_public_name_is_listed():
    """docs/api.md names what the packages export, and nothing that they do not have."""
    parts = (ROOT / "docs/api.md").read_text().split("\n## ")[1:]
    packages = ["topkast_jax", "topkast_jax.statistics", "topkast_jax.always_sparse"]
    for part, package in zip(parts, map(importlib.import_module, packages), strict=True):
        cells = re.findall(r"^\| (`.*?) \|", part, re.MULTILINE)
        named = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
        public = set(getattr(package, "__all__", ())) - {"__version__"}
        assert public <= named
        assert all(hasattr(package, name) for name in named)


def test_links_between_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
