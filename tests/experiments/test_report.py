"""Tables and figures over runs."""

import base64
import csv
import dataclasses
import json
from collections import Counter
from html.parser import HTMLParser

import pytest
from PIL import Image

from experiments.records.plans import Plan
from experiments.report import main
from experiments.reporting import figures
from experiments.reporting.groups import collect


def final(name, method, seed, accuracy, density=1.0, **config):
    return {
        "name": name,
        "seed": seed,
        "test": {"accuracy": accuracy},
        "test_context": {"examples": 77},
        "parameters": 1000,
        "active_parameters": int(1000 * density),
        "densities": {"forward": density, "backward": density},
        "densities_over_run": {"forward": density, "backward": min(1.0, 2 * density)},
        "flops": {
            "dense_forward_per_step": 1e9 * config.get("batch_size", 1),
            "inference_fraction": density,
            "training_fraction": density * 4 / 3,
        },
        "seconds": 10.0 + seed,
        "config": {"seed": seed, "method": {"name": method, "density": density}, **config},
    }


def put(directory, value, churn=None):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(value["config"]))
    (directory / "final.json").write_text(json.dumps(value))
    records = [{"step": 5, "split": "train", "loss": 1.0}]
    records += [
        {"step": s, "split": "masks", "churn_since_start": c, "churn_since_last_refresh": c / 2}
        for s, c in (churn or {}).items()
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def runs(tmp_path):
    root = tmp_path / "runs"
    for seed, accuracy in enumerate((0.7, 0.8, 0.9)):
        run = final("c:90/80", "top_kast", seed, accuracy, 0.1)
        put(root / "deep" / "er" / f"kast-{seed}", run, {5: 0.1, 10: 0.2})
    put(root / "random", final("c:static-90", "static_random", 0, 0.5, 0.1))
    put(root / "dense", final("c:dense", "dense", 0, 0.95))
    put(root / "other", final("c:90/80", "top_kast", 0, 0.6, 0.1, steps=7))
    (root / "running").mkdir()
    keys = ("name", "task", "seed", "steps", "model", "data", "method")
    (root / "running" / "config.json").write_text(json.dumps(dict.fromkeys(keys)))
    for name, text in (("a-tokenizer", '{"vocab": 3}'), ("no-json", "x")):
        (root / name).mkdir()
        (root / name / "config.json").write_text(text)
    return root


@pytest.fixture
def undrawn(monkeypatch):
    """Of the report, the tables alone."""
    monkeypatch.setattr("experiments.report.figures.draw", lambda *args: [])


def test_an_address_is_no_folder(tmp_path, capsys):
    assert main([str(tmp_path), "--out=gs://bucket/out"]) == 2
    assert "--out=gs:/bucket/out: is an address" in capsys.readouterr().err


def test_table_and_figures(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(runs), f"--out={out}"]) == 0
    text = capsys.readouterr().out
    heads, *lines = text[: text.index("\n\n")].splitlines()
    assert (out / "table.md").read_text() == "".join(
        f"{line}{more}\n"
        for line, more in zip([heads, *lines], [" command |", " --- |", *["  |"] * 4], strict=True)
    )
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    table = {(row[0], row[2]): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert len(table) == 4
    seeds = table["c:90/80", "3"]
    assert seeds["test accuracy"] == "0.8000 ± 0.1000"
    assert seeds["forward density"] == "0.1"
    assert seeds["backward density"] == "0.2"
    assert (seeds["parameters"], seeds["active"]) == ("1,000", "100")
    assert (seeds["inference FLOPs"], seeds["training FLOPs"]) == ("0.100", "0.133")
    assert seeds["seconds"] == "11 ± 1"
    assert seeds["evaluated on"] == "examples 77"
    assert table["c:90/80", "1"]["test accuracy"] == "0.6000"
    assert (seeds["settings"], table["c:90/80", "1"]["settings"]) == ("", "steps 7")
    assert [line for line in text.splitlines() if "not finished" in line] == [
        f"left out, not finished: {runs}/running"
    ]
    for name in ("table.md", "table.csv", "accuracy_against_density.png", "churn.png"):
        assert f"wrote {out}/{name}" in text
    for name in ("accuracy_against_density.png", "churn.png"):
        with Image.open(out / name) as image:
            assert image.size[0] > 500
    with open(out / "table.csv") as file:
        numbers = {(r["config"], r["seeds"]): r for r in csv.DictReader(file)}
    assert float(numbers["c:90/80", "3"]["test accuracy"]) == pytest.approx(0.8)
    assert float(numbers["c:90/80", "3"]["test accuracy spread"]) == pytest.approx(0.1)


def a_sweep(root):
    """Two seeds of one row of a sweep, and another row that was not run."""
    for seed, accuracy in enumerate((0.6, 0.7)):
        run = final("c:90/80", "top_kast", seed, accuracy, 0.1, steps=100)
        run |= {"steps": 100, "device": "cpu", "processor": f"made up {seed}, AVX2"}
        if seed:  # Older records have no date.
            run["date"] = "2026-11-30"
        put(root / "90-80" / f"seed-{seed}", run)
    own = ["method.pattern=1:8", "data.dir=a b"]
    rows = [
        {"row": "90-80", "config": "c.py:90/80", "overrides": [], "paper": "73.03 % (table 6)"},
        {"row": "absent", "config": "c.py:<x>", "overrides": own, "paper": ""},
    ]
    plan = {"config": "configs/sweeps/table_6.py:small", "seeds": 3, "rows": rows}
    (root / "table_6.sweep.json").write_text(json.dumps(plan))


def test_the_rows_of_a_sweep_stand_beside_what_the_paper_reports(tmp_path, capsys):
    a_sweep(tmp_path / "s")
    assert main([str(tmp_path), f"--out={tmp_path}/out"]) == 0
    with open(tmp_path / "out" / "table_6.csv") as file:
        done, absent = csv.DictReader(file)
    assert (done["run"], absent["run"]) == ("90-80", "absent")
    assert float(done["test accuracy"]) == pytest.approx(0.65)
    assert float(done["test accuracy spread"]) == pytest.approx(0.5**0.5 / 10)
    assert done["reported by the paper"] == "73.03 % (table 6)"
    assert done["steps"] == "100"
    assert done["device"] == "cpu (made up 0, AVX2), cpu (made up 1, AVX2)"
    assert (done["date"], absent["date"]) == ("2026-11-30, not recorded", "")
    assert (done["evaluated on"], absent["evaluated on"]) == ("examples 77", "")
    assert done["seeds"] == "2, missing 1"
    assert absent["seeds"] == "0, missing 3"
    assert absent["test accuracy"] == absent["training FLOPs spread"] == ""
    assert absent["command"] == (
        "python -m experiments.main '--config=c.py:<x>' --config.method.pattern=1:8 "
        "'--config.data.dir=a b' --workdir=DIR"
    )
    assert (
        "| 90-80 | 2, missing 1 | 0.6500 ± 0.0707 |"
        in (tmp_path / "out" / "table_6.md").read_text()
    )


def test_each_row_has_the_command_that_made_it(tmp_path, capsys):
    a_sweep(tmp_path / "s")
    own = final("c:x y", "set", 0, 0.5, 0.1)
    own["config"]["command"] = ["--config=d/c.py:x y", "--config.steps=3"]
    put(tmp_path / "own", own)
    own["config"].pop("command")  # An older seed of the same row.
    put(tmp_path / "old", own | {"seed": 1})
    put(tmp_path / "unknown", final("c:dense", "dense", 0, 0.5))
    assert main([str(tmp_path), f"--out={tmp_path}/out"]) == 0
    with open(tmp_path / "out" / "table.csv") as file:
        commands = {row["config"]: row["command"] for row in csv.DictReader(file)}
    assert commands == {
        "c:90/80": "python -m experiments.main --config=c.py:90/80 --workdir=DIR",  # as planned
        "c:x y": "python -m experiments.main '--config=d/c.py:x y' --config.steps=3 --workdir=DIR",
        "c:dense": "",
    }


@pytest.mark.usefixtures("undrawn")
def test_runs_without_a_test_have_what_they_trained_to(tmp_path, capsys):
    for name, test in (("a", {}), ("b", {"accuracy": 0.5})):
        folder = tmp_path / "runs" / name
        put(folder, final(f"c:{name}", "set", 0, 0.5, steps=8, log_every=2) | {"test": test})
        records = [{"step": n, "split": "train", "loss": 10.0 - n} for n in (2, 4, 6, 7, 8)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert main([str(tmp_path / "runs"), f"--out={tmp_path / 'out'}"]) == 0
    with open(tmp_path / "out" / "table.csv") as file:
        found = {row["config"]: row["train loss, last quarter"] for row in csv.DictReader(file)}
    assert found == {"c:a": "2.5", "c:b": "2.5"}  # Of steps 7 and 8.
    (tmp_path / "runs" / "a" / "final.json").unlink()
    main([str(tmp_path / "runs"), f"--out={tmp_path / 'out'}"])
    assert "last quarter" not in (tmp_path / "out" / "table.csv").read_text()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("last", "told"), [(70, True), (90, False)])
def test_records_that_end_too_early_are_told(tmp_path, capsys, last, told):
    put(tmp_path / "a", final("c:a", "set", 0, 0.5, steps=100, log_every=10) | {"steps": 100})
    (tmp_path / "a" / "metrics.jsonl").write_text(f'{{"step": {last}, "split": "masks"}}\n')
    assert main([str(tmp_path), f"--out={tmp_path / 'out'}"]) == 0
    assert (f"metrics.jsonl: ends at step {last} of 100" in capsys.readouterr().err) == told


class Page(HTMLParser):
    """Counts elements, and collects everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.texts = Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.fetched += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_holds_all_tables_and_figures_and_needs_no_other_file(tmp_path, monkeypatch):
    a_sweep(tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    assert main([str(tmp_path), f"--out={tmp_path}/out"]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    figures = list((tmp_path / "out").glob("*.png"))
    assert page.tags["img"] == len(figures) > 0
    assert page.tags["table"] == 2
    assert all(url.startswith("data:image/png;base64,") for url in page.fetched)
    assert {base64.b64decode(url.partition(",")[2]) for url in page.fetched} == {
        path.read_bytes() for path in figures
    }
    assert "73.03 % (table 6)" in page.texts
    assert "configs/sweeps/table_6.py:small in s" in page.texts
    assert any("--config=c.py:<x>" in text for text in page.texts)  # not read as a tag


def test_what_a_metric_is_drawn_against(tmp_path):
    for i, stop in enumerate((0, 50, None)):
        run = final("c:90/0", "top_kast", 0, 0.5 + i / 10, 0.1, steps=100)
        run["config"]["method"]["stop_exploring_at"] = stop
        run["densities_over_run"]["backward"] = 0.2 + i / 10
        put(tmp_path / "runs" / str(i), run)
    assert main([str(tmp_path / "runs"), f"--out={tmp_path}/out"]) == 0
    found = {path.stem for path in (tmp_path / "out").glob("*.png")}
    # All have the same FLOPs and parameters, and no records of their sets.
    assert found == {
        "accuracy_against_density", "accuracy_against_backward_density",
        "accuracy_against_stopping",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["{}", "[]", '{"config": "c", "seeds": 1, "rows": [{}]}', "{"])
def test_a_plan_that_is_none_is_one_line(runs, tmp_path, capsys, text):
    (runs / "x.sweep.json").write_text(text)
    assert main([str(runs), f"--out={tmp_path}/out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {runs}/x.sweep.json: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_same_run_named_twice_counts_once(runs, tmp_path, capsys):
    assert main([str(runs), str(runs / "deep"), f"--out={tmp_path}/out"]) == 0
    assert "| c:90/80 | top_kast | 3 |" in capsys.readouterr().out


ALIKE = {  # settings → accuracy
    "masks, unstructured": 0.1,
    "always sparse, unstructured, refresh_delay 0": 0.2,
    "always sparse, block:16x16, refresh_delay 0": 0.3,
    "always sparse, unstructured, refresh_delay 3": 0.4,
}


@pytest.mark.usefixtures("undrawn")
def test_rows_of_one_name_say_how_they_differ(tmp_path, capsys):
    """Keys that only one form has, and what is derived, are not told."""
    for settings, accuracy in ALIKE.items():
        form, pattern, *delay = settings.split(", ")
        run = final("c:90/80", "top_kast", 0, accuracy, 0.1, derived={"x": accuracy}, lr=0.1)
        method = run["config"]["method"]
        method |= {"always_sparse": form == "always sparse", "pattern": pattern}
        method |= {"refresh_delay": int(delay[0][-1])} if delay else {"inner_state": "keep"}
        put(tmp_path / "runs" / str(accuracy), run)
    put(tmp_path / "runs" / "dense", final("c:dense", "dense", 0, 0.95))
    assert main([str(tmp_path / "runs"), f"--out={tmp_path}/out"]) == 0
    with open(tmp_path / "out" / "table.csv") as file:
        found = {row["settings"]: float(row["test accuracy"]) for row in csv.DictReader(file)}
    assert found == ALIKE | {"": 0.95}
    table = capsys.readouterr().out
    assert "| c:90/80 | top_kast | 1 | masks, unstructured | 0.1000 |" in table
    assert "| c:dense | dense | 1 |  | 0.9500 |" in table


def spoil(runs, text):
    (runs / "dense" / "final.json").write_text(text)


@pytest.mark.parametrize(
    "key", ["active_parameters", "densities.forward", "flops.training_fraction", "config.method"]
)
def test_final_that_lacks_something_the_report_reads(runs, tmp_path, capsys, key):
    value = final("c:dense", "dense", 0, 0.95)
    *parents, last = key.split(".")
    inner = value[parents[0]] if parents else value
    del inner[last]
    spoil(runs, json.dumps(value))
    assert main([str(runs), f"--out={tmp_path}/out"]) == 2
    err = capsys.readouterr().err
    assert f"{runs}/dense/final.json: has no '{key}" in err
    assert len(err.splitlines()) == 1


WRONG = {
    "name": (3, [], {}),
    "config.method.name": (3, True),
    "test": (
        "x",
        [1],
        {"accuracy": "x"},
        {"accuracy": None},
        {"accuracy": [1]},
        {"accuracy": 1e308},
    ),
    "test_context": ("x", [1], {"x": [1]}),
    "parameters": ("x", [1], {}, True, -1, float("nan"), float("inf")),
    "densities_over_run.backward": ("x", {}, -0.5),
    "flops.inference_fraction": ("x", [0.5]),
    "seconds": ("10",),
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_final_that_holds_another_type(runs, tmp_path, capsys, key, value):
    run = final("c:dense", "dense", 0, 0.95)
    *parents, last = key.split(".")
    inner = run
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    spoil(runs, json.dumps(run))
    assert main([str(runs), f"--out={tmp_path}/out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {runs}/dense/final.json: {key} is ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "value",
    [
        "x",
        None,
        pytest.param([1], marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_record_that_holds_another_type_is_named_and_passed_over(runs, tmp_path, capsys, value):
    path = runs / "deep" / "er" / "kast-0" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    damaged = json.loads(lines[1]) | {"churn_since_start": value}
    path.write_text("\n".join([lines[0], json.dumps(damaged), *lines[2:], ""]))
    assert main([str(runs), f"--out={tmp_path}/out"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}, line 2: not used, because it is no record")


DEEP = "[" * 100_000


@pytest.mark.parametrize("line", [DEEP, '{"step": 1, "split": "test", "accuracy": 1e308}'])
@pytest.mark.usefixtures("undrawn")
def test_a_line_that_nobody_can_use_is_passed_over(runs, tmp_path, capsys, line):
    path = runs / "deep" / "er" / "kast-0" / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    assert main([str(runs), f"--out={tmp_path}/out"]) == 0
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"warning: {path}, line 1: not used, because it is no record")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"name": "x"}', DEEP, f'{{"seed": 1{"0" * 400}}}', r'{"name": "\ud800"}']
)
def test_unreadable_final(runs, tmp_path, capsys, text):
    spoil(runs, text)
    assert main([str(runs), f"--out={tmp_path}/out"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert f"{runs}/dense/final.json" in err
    assert not (tmp_path / "out").exists()


def test_bad_input(runs, tmp_path, capsys):
    for args, message in (
        ([str(tmp_path / "nowhere"), "--out=x"], "no such folder"),
        ([str(runs / "running"), "--out=x"], "no finished run"),
        ([str(runs)], "required: --out"),
        ([str(runs), f"--out={runs}/dense/final.json"], "cannot be written"),
    ):
        assert main(args) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1


def test_a_method_has_one_colour_and_a_density_one_marker():
    lines = [
        figures.Line("rigl", "0.1", [(0.1, 0.6, 0.0)]),
        figures.Line("rigl", "0.05", [(0.05, 0.5, 0.0), (0.07, 0.55, 0.0)]),
        figures.Line("set", "0.1", [(0.2, 0.7, 0.0)]),
        figures.Line("dense", None, [(1.0, 0.8, 0.0)]),
    ]
    axes = figures._against(lines, "FLOPs", "accuracy", True, max).axes[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(legend[:3]) == ["dense", "rigl", "set"]
    assert legend[3:] == ["forward density 0.1", "forward density 0.05"]
    first, second, third = (bars.lines[0] for bars in axes.containers)
    assert first.get_color() == second.get_color() != third.get_color()
    assert first.get_marker() == third.get_marker() != second.get_marker()


def test_a_logarithmic_axis_has_ticks_at_points_as_far_as_their_labels_have_room():
    points = [(place, 0.5, 0.0) for place in (66_970, 102_714, 103_006, 174_942, 175_106)]
    lines = [
        figures.Line("c, dense", None, [(751_822, 0.9, 0.0)]),  # A line across has no place.
        figures.Line("c, set", "0.1", points),
    ]
    axes = figures._against(lines, "parameters", "bpc", True, min).axes[0]
    assert list(axes.get_xticks()) == [67_000, 100_000, 170_000]
    assert [axes.xaxis.get_major_formatter()(tick, 0) for tick in axes.get_xticks()] == [
        "67,000", "100,000", "170,000"
    ]  # fmt: skip
    figures._against(lines[:1], "parameters", "bpc", True, min)


def test_a_record_of_nothing_has_no_place_on_an_axis_of_powers(tmp_path):
    put(tmp_path / "nothing", final("c:90/90", "top_kast", 0, 0.1, 0.0))
    put(tmp_path / "some", final("c:90/80", "top_kast", 0, 0.5, 0.1))
    groups, _ = collect([tmp_path])
    for name in ("density", "parameters", "training_flops"):
        (line,) = figures._lines(groups, "accuracy", figures.AGAINST[name][0])
        assert len(line.points) == 1


def planned(folder, name, seeds, rows):
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        f"configs/sweeps/{name}.py",
        seeds,
        [{"row": row, "config": "c", "overrides": [], "paper": ""} for row in rows],
    )
    (folder / f"{name}.sweep.json").write_text(json.dumps(dataclasses.asdict(plan)))


def rows_of(path):
    with open(path, newline="") as file:
        return {row["run"]: (row["seeds"], row["test accuracy"]) for row in csv.DictReader(file)}


@pytest.mark.usefixtures("undrawn")
def test_seeds_of_a_row_that_differ_in_what_changes_no_result_are_one_row(tmp_path, capsys):
    """Keys that a version added, or that a user changed between the seeds, as `data.threads`."""
    for seed, free in enumerate(({}, {"write_sets_every": 0}, {"data": {"threads": 4}})):
        run = final("c:dense", "dense", seed, 0.5 + seed / 10, **free)
        put(tmp_path / "runs" / "dense" / f"seed-{seed}", run)
    planned(tmp_path / "runs", "study", 3, ["dense"])
    assert main([str(tmp_path / "runs"), f"--out={tmp_path / 'out'}"]) == 0
    assert rows_of(tmp_path / "out" / "study.csv") == {"dense": ("3", "0.6")}
    (only,) = csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines())
    assert (only["seeds"], only["test accuracy"]) == ("3", "0.6")
    assert "settings" not in only


@pytest.mark.usefixtures("undrawn")
def test_a_run_counts_once_and_a_sweep_has_those_of_its_folder(tmp_path, capsys):
    """Copies are no seeds; more seeds than planned are not missing."""
    for sweep, accuracy in (("a", 0.2), ("b", 0.4)):
        for seed in (0, 1):
            run = final("c:dense", "dense", seed, accuracy + seed / 10)
            put(tmp_path / sweep / "dense" / f"seed-{seed}", run)
    put(tmp_path / "a" / "dense.bak" / "seed-0", final("c:dense", "dense", 0, 0.2))
    planned(tmp_path / "a", "study", 1, ["dense"])
    planned(tmp_path / "b", "study", 3, ["dense"])
    planned(tmp_path / "a", "table", 1, ["dense", "gone"])
    folders = [str(tmp_path / name) for name in "ab"]
    assert main([*folders, f"--out={tmp_path / 'out'}"]) == 0
    told = capsys.readouterr().out
    twice = [tmp_path / "a/dense.bak/seed-0", *(tmp_path / f"b/dense/seed-{i}" for i in (0, 1))]
    assert [line for line in told.splitlines() if line.startswith("left out")] == [
        f"left out, config and seed of another run: {path}" for path in twice
    ]
    (only,) = csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines())
    assert (only["seeds"], only["test accuracy"]) == ("2", "0.25")
    found = {path.name: rows_of(path) for path in (tmp_path / "out").glob("*-2.csv")}
    assert found == {
        "study-2.csv": {"dense": ("2, missing 1", "0.45")},
        "table-2.csv": {"dense": ("2", "0.25"), "gone": ("0, missing 1", "")},
    }
    assert rows_of(tmp_path / "out" / "study.csv") == {"dense": ("2", "0.25")}


@pytest.mark.usefixtures("undrawn")
def test_how_the_sets_moved_between_two_steps_is_a_table(tmp_path, capsys):
    """Figure 3: over the leaves mean, least and most, over the seeds their means."""
    moved = {"differ_mean": 0.2, "differ_least": 0.1, "differ_most": 0.3, "woken_mean": 0.04}
    for seed in range(3):
        folder = tmp_path / "runs" / "80-50" / f"seed-{seed}"
        made = ["--config=c.py:80/50", "--config.write_sets_every=10"]
        put(folder, final("c:80/50", "top_kast", seed, 0.5, write_sets_every=10, command=made))
        records = [
            {"step": 3, "split": "masks", "reservoir_ever_active": 0.01},
            {"step": 10, "split": "sets", "since": (8, 8, 0)[seed],
             **{k: v * (1 + seed) for k, v in moved.items()}},
            {"step": 10, "split": "masks", "reservoir_ever_active": 0.05},
            {"step": 4, "split": "sets", "since": 0, "differ_mean": 0.5},
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    plain = final("c:80/50", "top_kast", 3, 0.5, write_sets_every=0, command=made[:1])
    put(tmp_path / "runs" / "0-without-sets", plain)
    assert main([str(tmp_path / "runs"), f"--out={tmp_path / 'out'}"]) == 0
    with open(tmp_path / "out" / "sets.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["command"] for row in rows} == {
        " ".join(["python -m experiments.main", *made, "--workdir=DIR"])
    }
    assert [(r["from step"], r["to step"], r["seeds"]) for r in rows] == [
        ("0", "4", "3"), ("0", "10", "1"), ("8", "10", "2"),
    ]  # fmt: skip
    first, _, last = rows
    assert float(first["differ, mean"]) == 0.5
    assert float(first["reservoir ever active"]) == 0.01
    assert [float(last[f"differ, {of}"]) for of in ("mean", "least", "most")] == pytest.approx(
        [0.3, 0.15, 0.45]
    )
    assert float(last["differ, mean spread"]) == pytest.approx(0.2 / 2**0.5)
    assert float(last["woken, mean"]) == pytest.approx(0.06)
    assert (last["woken, most"], float(last["reservoir ever active"])) == ("", 0.05)


@pytest.mark.usefixtures("undrawn")
def test_runs_behind_a_link_are_found_once(runs, tmp_path, capsys):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "there").symlink_to(runs, target_is_directory=True)
    (runs / "deep" / "back").symlink_to(runs, target_is_directory=True)
    assert main([str(tmp_path / "links"), f"--out={tmp_path / 'out'}"]) == 0
    rows = csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines())
    assert sorted(row["seeds"] for row in rows) == ["1", "1", "1", "3"]


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_its_records_is_told(runs, tmp_path, capsys):
    (runs / "dense" / "metrics.jsonl").unlink()
    assert main([str(runs), f"--out={tmp_path / 'out'}"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {runs}/dense/metrics.jsonl: is missing")


@pytest.mark.parametrize("kinds", [3, 20])
def test_settings_that_most_runs_share_are_not_in_a_label(tmp_path, kinds):
    """What differs from them is: as text while that can be read, and then as hollow markers."""
    everys = [50, *range(1, kinds)]
    for i, every in enumerate(everys):
        run = final("c:90/80", "top_kast", 0, 0.5, 0.1)
        run["config"]["method"]["refresh_every"] = every
        put(tmp_path / f"every-{i}", run)
    for variant, backward in (("90/50", 0.5), ("90/90", 0.1)):
        run = final(f"c:{variant}", "top_kast", 0, 0.6, 0.1)
        run["config"]["method"]["refresh_every"] = 50
        run["densities_over_run"]["backward"] = backward
        put(tmp_path / variant.replace("/", "-"), run)
    narrow = final("c:small-dense-90", "dense", 0, 0.4)
    narrow["config"]["model"] = {"small_dense": {"forward_density": 0.1}}
    put(tmp_path / "narrow", narrow)
    put(tmp_path / "dense", final("c:dense", "dense", 0, 0.8))
    groups, _ = collect([tmp_path])
    read = figures.AGAINST["backward_density"][0]
    lines = {(x.label, x.hollow): len(x.points) for x in figures._lines(groups, "accuracy", read)}
    own = {("top_kast", False): 3, ("small dense", False): 1, ("dense", False): 1}
    if kinds == 3:
        assert lines == own | {(f"top_kast, refresh_every {i}", False): 1 for i in (1, 2)}
    else:
        assert lines == own | {("top_kast", True): kinds - 1}


def test_where_exploration_stops_is_one_line_for_each_config(tmp_path):
    for i, (variant, stop) in enumerate([("90/0", None), ("90/0", 0), ("90/0", 50), ("90/50", 0)]):
        run = final(f"c:{variant}", "top_kast", 0, 0.5, 0.1, steps=100)
        run["config"]["method"]["stop_exploring_at"] = stop
        put(tmp_path / str(i), run)
    (line,) = figures._stopping_lines(collect([tmp_path])[0], "accuracy")
    assert line.label == "c:90/0, top_kast"
    assert sorted(place for place, _, _ in line.points) == [0, 0.5, 1]


@pytest.mark.usefixtures("undrawn")
def test_training_flops_are_of_all_steps(tmp_path, capsys):
    """Twice the steps are twice the FLOPs; a batch of half the size half of them (figure 2a)."""
    for variant, method, steps, batch in (
        ("dense", "dense", 100, 8), ("90/80", "top_kast", 100, 8), ("90/80,2x", "top_kast", 200, 8),
        ("90/50", "top_kast", 100, 4), ("95/90", "top_kast", 7, 8),
    ):  # fmt: skip
        run = final(f"c:{variant}", method, 0, 0.5, 0.3, steps=steps, batch_size=batch)
        put(tmp_path / "runs" / variant.replace("/", "-"), run)
    narrow = final("c:90/80,narrow", "top_kast", 0, 0.5, 0.3, steps=100, batch_size=8)
    narrow["flops"]["dense_forward_per_step"] /= 4
    put(tmp_path / "runs" / "narrow", narrow)
    small = {"small_dense": {"forward_density": 0.3}}
    small = final("c:small-dense-70", "dense", 0, 0.5, 0.3, steps=100, batch_size=8, model=small)
    small["flops"] = {
        "dense_forward_per_step": 0.25 * 8e9, "inference_fraction": 0.25, "training_fraction": 0.25
    }  # fmt: skip
    put(tmp_path / "runs" / "small", small)
    without_test = final("c:dense", "dense", 1, 0.5, steps=5, batch_size=8) | {"test": {}}
    put(tmp_path / "runs" / "rates", without_test)
    assert main([str(tmp_path / "runs"), f"--out={tmp_path / 'out'}"]) == 0
    with open(tmp_path / "out" / "table.csv") as file:
        found = {row["config"]: float(row["training FLOPs"]) for row in csv.DictReader(file)}
    assert found["c:90/80"] == pytest.approx(0.4)
    assert found["c:90/80,2x"] == pytest.approx(0.8)
    assert found["c:90/50"] == pytest.approx(0.2)
    assert found["c:95/90"] == pytest.approx(0.4 * 0.07)
    assert found["c:90/80,narrow"] == pytest.approx(0.1)  # of the wider dense network
    assert found["c:small-dense-70"] == pytest.approx(0.25)


@pytest.mark.usefixtures("undrawn")
def test_of_copies_the_run_that_recorded_its_sets_counts(tmp_path, capsys):
    for name, more in (
        ("80-50", []),
        ("80-50+write_sets_every-4", [{"since": 0, "differ_mean": 0.5}]),
    ):
        folder = tmp_path / "runs" / name / "seed-0"
        put(folder, final("c:80/50", "top_kast", 0, 0.5, write_sets_every=4 * len(more)))
        with open(folder / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps({"step": 4, "split": "sets", **r}) + "\n" for r in more)
    assert main([str(tmp_path / "runs"), f"--out={tmp_path / 'out'}"]) == 0
    assert f"another run: {tmp_path}/runs/80-50/seed-0" in capsys.readouterr().out
    assert "| 0.5000 |" in (tmp_path / "out" / "sets.md").read_text()


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.usefixtures("undrawn")
def test_a_metric_that_is_not_finite(tmp_path, capsys, odd):
    for seed, value in enumerate((0.5, odd)):
        put(tmp_path / "runs" / str(seed), final("c:90/80", "top_kast", seed, value, 0.1))
    assert main([str(tmp_path / "runs"), f"--out={tmp_path / 'out'}"]) == 0
    assert "| nan ± nan |" in capsys.readouterr().out


@pytest.mark.parametrize(("better", "joined"), [(max, [3.0, 5.0]), (min, [1.0, 5.0])])
def test_the_best_of_several_points_at_a_place_is_joined(better, joined):
    line = figures.Line("set", None, [(0.1, 3.0, 0.0), (0.1, 1.0, 0.0), (0.2, 5.0, 0.0)])
    drawn = figures._against([line], "x", "y", True, better).axes[0].get_lines()
    assert joined in [list(each.get_ydata()) for each in drawn]


def test_of_equally_many_settings_the_usual_one_is_that_of_other_methods(tmp_path):
    """Runs without a test, of which there are more, do not count beside tested ones."""
    untested = [("set", 2, {}, i) for i in range(3)]
    rows = [(method, rate, {"accuracy": 0.5}, 9) for method, rate in (("set", 1), ("set", 2))]
    for i, (method, rate, test, steps) in enumerate([*rows, ("rigl", 1, rows[0][2], 9), *untested]):
        run = final(f"c:{method}", method, i, 0.5, rate=rate, steps=steps) | {"test": test}
        put(tmp_path / str(i), run)
    groups, _ = collect([tmp_path])
    usual = {
        (g.method, g.runs[0]["config"]["rate"]): "rate" not in g.unusual
        for g in groups
        if g.runs[0]["test"]
    }
    assert len(groups) == 6
    assert usual == {("set", 1): True, ("set", 2): False, ("rigl", 1): True}


def test_what_is_usual_is_so_among_the_runs_of_the_figure(tmp_path):
    """Runs without a test, such as those that chose a learning rate, are in none."""
    for i, (steps, test) in enumerate([(20, {}), (20, {}), (20, {}), (80, {"accuracy": 0.5})]):
        run = final("c:set-90", "set", i, 0.5, 0.1, steps=steps, rate=i) | {"test": test}
        put(tmp_path / str(i), run)
    for i, variant in enumerate(("90/80", "90/80,all-sparse", "90/50")):
        put(tmp_path / f"kast-{i}", final(f"c:{variant}", "top_kast", 0, 0.5, 0.1, steps=80))
    groups, _ = collect([tmp_path])
    tested = figures.told_apart([group for group in groups if group.runs[0]["test"]])
    lines = figures._lines(tested, "accuracy", figures.AGAINST["backward_density"][0])
    assert sorted((line.label, len(line.points)) for line in lines) == [
        ("set", 1), ("top_kast", 2), ("top_kast, all-sparse", 1),
    ]  # fmt: skip
