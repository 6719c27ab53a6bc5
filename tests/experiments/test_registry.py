"""Names in a table, and import paths."""

import pytest

from experiments.errors import UserError
from experiments.registry import Registry, function_of
from experiments.task import task_module


@pytest.fixture
def registry():
    return Registry("config.model.name", {"one": 1}, function_of("model"))


def test_a_name_of_the_table_or_an_import_path(registry):
    registry.register("two", 2)
    assert registry.names() == ["one", "two"]
    assert (registry.get("one"), registry.get("two")) == (1, 2)
    assert registry.get("os.path:join").__name__ == "join"
    with pytest.raises(UserError, match="config.model.name: 'one' is registered already"):
        registry.register("one", 3)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("three", "found 'three'; must be one of one, or an import path package.module:name"),
        ("os.nothing:x", "there is no module 'os.nothing'"),
        ("no_such_package.module:x", "there is no module 'no_such_package'"),
        ("os:nothing", "os has no 'nothing'"),
        ("os:getcwd", "found 'os:getcwd', a builtin_function_or_method; must be a function of (mo"),
        ("os:sep", "found 'os:sep', a str; must be a function of (model)"),
    ],
)
def test_a_mistake_in_a_name_is_one_line(registry, name, told):
    with pytest.raises(UserError) as error:
        registry.get(name)
    assert str(error.value).startswith("config.model.name: found ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["1 / 0", "import no_such_package", "raise ValueError"])
def test_a_mistake_inside_the_module_keeps_its_traceback(registry, tmp_path, monkeypatch, text):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"broken_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises((ZeroDivisionError, ModuleNotFoundError, ValueError)):
        registry.get(f"{name}:model")


def test_a_task_of_an_import_path():
    path = "experiments.image_classification.task"
    assert task_module(path) is task_module("image_classification")
    for name, told in (("toys", "there is no module 'toys'"), ("json", "json has no 'make_task'")):
        with pytest.raises(UserError, match=f"config.task: .*{told}; allowed: image_classif"):
            task_module(name)
