"""Tables and figures over finished runs.

python -m experiments.report DIR… --out=OUT
"""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import figures, flags
from experiments.errors import UserError
from experiments.metrics import read_records
from experiments.workdir import CONFIG, FINAL, METRICS, flat, read_json

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone.

    Attributes:
        name: of their config.
        method: the sparsity method's name.
        runs: their `final.json`s.
        records: their `metrics.jsonl`s, in the same order.
        settings: what tells them from other groups of the same name and method; empty without.
    """

    name: str
    method: str
    runs: list[Run]
    records: list[list[dict[str, Any]]]
    settings: str = ""

    def values(self, read: Callable[[Run], Any]) -> list[float]:
        """One number a run, of those that have it."""
        found = [read(run) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def mean(self, read: Callable[[Run], Any]) -> float | None:
        """Over the seeds, or None."""
        values = self.values(read)
        return statistics.fmean(values) if values else None


def metric(name: str) -> Callable[[Run], Any]:
    """Reads a test metric."""
    return lambda run: run["test"].get(name)


# Heading → how to read it, and how to print it.
COLUMNS: dict[str, tuple[Callable[[Run], Any], str]] = {
    "forward density": (lambda r: r["densities"]["forward"], ".4g"),
    "backward density": (lambda r: r["densities"]["backward"], ".4g"),
    "parameters": (lambda r: r["parameters"], ",.0f"),
    "active": (lambda r: r["active_parameters"], ",.0f"),
    "training FLOPs": (lambda r: r["flops"]["training_fraction"], ".3f"),
    "inference FLOPs": (lambda r: r["flops"]["inference_fraction"], ".3f"),
    "seconds": (lambda r: r["seconds"], ".0f"),
}


@flags.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    parser = flags.Parser(prog="experiments.report", description=__doc__)
    parser.add_argument("dirs", nargs="+", metavar="DIR", help="folders with runs, at any depth")
    parser.add_argument("--out", required=True, help="where table and figures go")
    args = parser.parse_args(argv)
    print(report([Path(d) for d in args.dirs], Path(args.out)))


def report(dirs: Sequence[Path], out: Path) -> str:
    """Writes `table.md`, `table.csv` and the figures; returns the table and where they are."""
    groups, unfinished = collect(dirs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        table = _markdown(groups)
        (out / "table.md").write_text(table)
        _write_csv(groups, out / "table.csv")
        drawn = figures.draw(groups, metric_names(groups), out)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written: {error.strerror}") from error
    left_out = [f"left out, not finished: {path}" for path in unfinished]
    written = [f"wrote {path}" for path in (out / "table.md", out / "table.csv", *drawn)]
    return "\n".join([table, *left_out, *written])


def collect(dirs: Sequence[Path]) -> tuple[list[Group], list[Path]]:
    """Groups of finished runs, in the order of their names, and the runs that are not finished."""
    for directory in dirs:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such folder; expected one with runs")
    configs = sorted({path.parent for d in dirs for path in d.rglob(CONFIG)})
    finals = sorted({path.resolve() for d in dirs for path in d.rglob(FINAL)})
    if not finals:
        raise UserError(f"{', '.join(map(str, dirs))}: no finished run ({FINAL}) in there")
    groups: dict[str, Group] = {}
    for path in finals:
        run = _read_final(path)
        config = {k: v for k, v in run["config"].items() if k != "seed"}
        key = json.dumps(config, sort_keys=True)
        group = groups.setdefault(key, Group(run["name"], config["method"]["name"], [], []))
        group.runs.append(run)
        group.records.append(read_records(path.with_name(METRICS)))
    unfinished = [path for path in configs if not (path / FINAL).exists()]
    told = _told_apart(list(groups.values()))
    return sorted(told, key=lambda g: (g.name.partition(":")[0], *_order(g))), unfinished


def _told_apart(groups: Sequence[Group]) -> list[Group]:
    """The groups, those of one name and method with the settings in which they differ."""
    alike: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for group in groups:
        alike[group.name, group.method].append(_config(group))
    return [
        dataclasses.replace(group, settings=_own(_config(group), alike[group.name, group.method]))
        for group in groups
    ]


def _config(group: Group) -> dict[str, Any]:
    values = flat(group.runs[0]["config"])
    return {k: v for k, v in values.items() if k != "seed" and not k.startswith("derived.")}


def _own(config: dict[str, Any], alike: Sequence[dict[str, Any]]) -> str:
    """A config's own values, among some configs: of what all that have it do not agree on."""
    keys = [k for k in sorted(config) if _differ([c[k] for c in alike if k in c])]
    # What only some have mostly follows from those; where it does not, it is told too.
    same = [c for c in alike if all(c.get(k) == config[k] for k in keys)]
    keys += [k for k in sorted(config) if k not in keys and _differ([c.get(k) for c in same])]
    return ", ".join(_setting(key, config[key]) for key in keys)


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _setting(key: str, value: Any) -> str:
    if key == "method.always_sparse":
        return "always sparse" if value else "masks"
    return str(value) if key == "method.pattern" else f"{key.rpartition('.')[2]} {value}"


def metric_names(groups: Sequence[Group]) -> list[str]:
    """Every test metric there is."""
    return sorted({name for group in groups for run in group.runs for name in run["test"]})


def _order(group: Group) -> tuple[Any, ...]:
    forward, _ = COLUMNS["forward density"]
    density = -(group.mean(forward) or 0)
    return group.method != "dense", group.method, density, group.name, group.settings


def _read_final(path: Path) -> Run:
    run = read_json(path)
    needed = ("name", "config", "test", "densities", "parameters", "flops", "seconds")
    missing = [key for key in needed if key not in run]
    if missing:
        raise UserError(f"{path}: has no {missing[0]!r}; must be written by experiments.main")
    return run


def _columns(groups: Sequence[Group]) -> dict[str, tuple[Callable[[Run], Any], str]]:
    metrics = {f"test {name}": (metric(name), ".4f") for name in metric_names(groups)}
    return metrics | COLUMNS


def _cell(values: list[float], form: str) -> str:
    if not values:
        return ""
    text = format(statistics.fmean(values), form)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{text} ± {format(spread, form)}" if spread else text


def _context(group: Group) -> str:
    found = {json.dumps(run.get("test_context", {}), sort_keys=True) for run in group.runs}
    return "; ".join(
        ", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in sorted(found)
    )


def _first_heads(groups: Sequence[Group]) -> list[str]:
    told = any(group.settings for group in groups)
    return ["config", "method", "seeds", *(["settings"] if told else [])]


def _first(group: Group, groups: Sequence[Group]) -> list[Any]:
    """The cells under `_first_heads`."""
    cells = [group.name, group.method, len(group.runs), group.settings]
    return cells[: len(_first_heads(groups))]


def _markdown(groups: Sequence[Group]) -> str:
    columns = _columns(groups)
    rows = [[*_first_heads(groups), *columns, "evaluated on"]]
    rows.append(["---"] * len(rows[0]))
    for group in groups:
        cells = [_cell(group.values(read), form) for read, form in columns.values()]
        rows.append([*map(str, _first(group, groups)), *cells, _context(group)])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _write_csv(groups: Sequence[Group], path: Path) -> None:
    columns = _columns(groups)
    heads = [head for column in columns for head in (column, f"{column} spread")]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_first_heads(groups), *heads, "evaluated on"])
        for group in groups:
            row = _first(group, groups)
            for read, _ in columns.values():
                values = group.values(read)
                row += [group.mean(read), statistics.stdev(values) if len(values) > 1 else None]
            writer.writerow([*row, _context(group)])


if __name__ == "__main__":
    sys.exit(main())
