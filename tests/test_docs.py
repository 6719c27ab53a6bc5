"""The code in the documents runs as it stands there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = ["README.md", "docs/adding_a_method.md", "docs/always_sparse.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_run(name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    scope = {}
    for block in blocks:
        exec(compile(block, name, "exec"), scope)


def test_docstring_examples():
    import doctest
    import importlib

    top_kast = importlib.import_module("topkast_jax.top_kast")

    assert doctest.testmod(top_kast).attempted > 3
    assert doctest.testmod(top_kast).failed == 0


def test_links_between_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
