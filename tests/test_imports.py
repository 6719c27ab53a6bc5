"""No module imports upward, and no two modules import each other, however far around."""

import ast
import fnmatch
import graphlib
import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("topkast_jax", "experiments", "configs")


def modules() -> dict[str, pathlib.Path]:
    """Every module of the packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: pathlib.Path, known: dict[str, pathlib.Path]) -> set[str]:
    """The modules that a module imports, at any place in it.

    Importing `a.b.c` runs `a` and `a.b` first, so these count as imported too, unless the module
    lies inside of them: a package's `__init__` may import what is in the package.
    """
    wanted = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                wanted.add(inner if inner in known else node.module)
    parts = [module.split(".") for module in wanted]
    prefixes = {".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}
    return {p for p in prefixes & known.keys() if p != name and not name.startswith(f"{p}.")}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def test_there_is_no_import_circle():
    try:
        graphlib.TopologicalSorter(graph()).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"import circle: {' <- '.join(error.args[1])}") from None


def test_the_library_imports_nothing_of_the_experiments():
    for name, imported in graph().items():
        if name.startswith("topkast_jax"):
            upward = {m for m in imported if m.partition(".")[0] in ("experiments", "configs")}
            assert not upward, f"{name} imports {upward}"


# The rooms of the experiments, and those that each may import from. Commands may import anything
# and are imported by no room.
COMMANDS = {
    *(f"experiments.{name}" for name in ("main", "sweep", "report", "export", "convert")),
    *(f"experiments.language_modelling.{n}" for n in ("generate", "prepare", "check_parity")),
}
PRODUCTS = {"layers", "convolutions"}
TASK = {"errors", "registry", "grain_batches", "task", "training", "config"} | PRODUCTS
ROOMS = {
    "errors": set(),
    "signals": set(),
    "processor": set(),
    "registry": {"errors"},
    "convolutions": {"processor"},
    "layers": {"convolutions"},
    "grain_batches": {"errors"},
    "task": {"errors", "registry"},
    "training": {"errors", "registry", "task", "signals"},
    "config": {"errors", "task", "training"},
    "image_classification": TASK,
    "language_modelling": TASK,
    "chips": {"errors"},
    "tpu": {"errors", "chips", "training"},
    "benchmarks": {"errors", "config", "training", "tpu"},
    "records": {"errors", "chips", "processor", "task", "training", "config"},
    "reporting": {"errors", "records"},
    "hosts": {"errors", "signals", "config", "records"},
    "loop": {"errors", "task", "training", "records"},
}


def test_no_room_imports_upward():
    for name, imported in graph().items():
        if name.startswith("experiments.") and name not in COMMANDS:
            own = name.split(".")[1]
            rooms = {m.split(".")[1] for m in imported if m.startswith("experiments.")}
            assert rooms - {own} <= ROOMS[own], f"{name} imports {rooms - {own} - ROOMS[own]}"
            assert not imported & COMMANDS, f"{name} imports {imported & COMMANDS}"


def test_an_installation_holds_the_library_alone():
    """The packages that setuptools takes: those that match an expression of pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    find = settings["packages"]["find"]
    assert not find["namespaces"]
    folders = [path.parent.relative_to(ROOT) for path in ROOT.glob("*/**/__init__.py")]
    packages = {".".join(folder.parts) for folder in folders if folder.parts[0][0] != "."}
    taken = {p for p in packages if any(fnmatch.fnmatchcase(p, e) for e in find["include"])}
    assert {"experiments", "configs", "topkast_jax.methods"} <= packages
    assert taken == {p for p in packages if p.split(".")[0] == "topkast_jax"}
    files = {path for glob in settings["package-data"]["topkast_jax"]
             for path in (ROOT / "topkast_jax").glob(glob)}  # fmt: skip
    products = ROOT / "topkast_jax" / "always_sparse" / "products"
    native = {path for path in products.glob("native_*") if path.suffix != ".py"}
    assert {path.suffix for path in native} == {".h", ".cc"}
    assert {ROOT / "topkast_jax" / "py.typed", products / "tuned.json", *native} <= files
