"""The tables of a report: what they hold, as Markdown and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.records import files, plans
from experiments.records.workdir import SWEEP
from experiments.reporting.groups import (
    Group,
    Summary,
    deviation,
    forward_density,
    mean,
    training_flops,
)

Read = Callable[[Summary], Any]
# The headings of how a row was made.
_MADE = ("steps", "device", "date", "evaluated on", "command")


class Number(NamedTuple):
    """The mean over seeds, its standard deviation, and how both are printed."""

    mean: float | None
    deviation: float | None
    style: str

    def __str__(self) -> str:
        if self.mean is None:
            return ""
        spread = f" ± {self.deviation:{self.style}}" if self.deviation else ""
        return f"{self.mean:{self.style}}{spread}"


Cell = str | int | Number


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        name: the beginning of the names of its files.
        title: its title.
        heads: the headings.
        rows: the cells; in a column with numbers, a missing one is a Number too.
    """

    name: str
    title: str
    heads: list[str]
    rows: list[list[Cell]]

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [self.heads, ["---"] * len(self.heads)]
        told = lambda cell: str(cell).replace("|", "\\|").replace("\n", " ")  # noqa: E731
        lines += [[told(cell) for cell in row] for row in self.rows]
        return "".join("| " + " | ".join(line) + " |\n" for line in lines)

    def without(self, head: str) -> Table:
        """The same table without a column."""
        i = self.heads.index(head)
        rows = [row[:i] + row[i + 1 :] for row in self.rows]
        return dataclasses.replace(self, heads=self.heads[:i] + self.heads[i + 1 :], rows=rows)

    def write_csv(self, path: Path) -> None:
        """Writes the table, with means and standard deviations in columns of their own."""
        spread = [isinstance(cell, Number) for cell in self.rows[0]]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            pairs = zip(self.heads, spread, strict=True)
            writer.writerow([h for head, two in pairs for h in [head, f"{head} spread"][: 1 + two]])
            for row in self.rows:
                cells = [list(c[:2]) if isinstance(c, Number) else [c] for c in row]
                writer.writerow([value for cell in cells for value in cell])


def metric(name: str) -> Read:
    """Reads a test metric."""
    return lambda run: run["test"].get(name)


def _trained(name: str) -> Read:
    return lambda run: run["train"].get(name)


# The headings, with how each number is read and printed. The backward density is a mean over the
# steps of the run, and the FLOPs of training are those of all its steps, as a share of the dense
# run's; the other columns are of the final network.
COLUMNS: dict[str, tuple[Read, str]] = {
    "forward density": (forward_density, ".4g"),
    "backward density": (lambda r: r["densities_over_run"]["backward"], ".4g"),
    "parameters": (lambda r: r["parameters"], ",.0f"),
    "active": (lambda r: r["active_parameters"], ",.0f"),
    "training FLOPs": (training_flops, ".3f"),
    "inference FLOPs": (lambda r: r["flops"]["inference_fraction"], ".3f"),
    "seconds": (lambda r: r["seconds"], ".0f"),
}


def metric_names(groups: Sequence[Group]) -> list[str]:
    """Every test metric there is."""
    return sorted({name for group in groups for run in group.runs for name in run["test"]})


def of_report(dirs: Sequence[Path], found: Sequence[Group], groups: Sequence[Group]) -> list[Table]:
    """All tables of a report, that of all runs first.

    Args:
        dirs: the folders of the report.
        found: the groups of finished runs in them.
        groups: the same with one run for each seed.
    """
    planned = {
        (path.parent / row["row"]).resolve(): _planned_command(row)
        for path in _plans(dirs)
        for row in plans.read(path).rows
    }
    return [all_runs(groups, planned), *sweeps(dirs, found), *sets(groups, planned)]


def all_runs(groups: Sequence[Group], planned: Mapping[Path, str]) -> Table:
    """One row for each group, with means and standard deviations over its seeds.

    Args:
        groups: the groups of finished runs.
        planned: the commands of the rows that sweeps planned, by their folders.
    """
    told = ["settings"] if any(group.settings for group in groups) else []
    heads = ["config", "method", "seeds", *told, *_columns(groups), *_MADE]
    table = Table("table", "All runs", heads, [])
    for group in groups:
        first: list[Cell] = [group.name, group.method, len(group.runs), group.settings]
        numbers, last = _numbers(group, groups), [*_made(group), _command_of(group, planned)]
        table.rows.append([*first[: 3 + len(told)], *numbers, *last])
    return table


# What the record of two successive sets holds: see `experiments.records.set_files`.
MOVED = [f"{what}_{of}" for what in ("differ", "woken") for of in ("mean", "least", "most")]
EVER_ACTIVE = "reservoir_ever_active"


def sets(groups: Sequence[Group], planned: Mapping[Path, str]) -> list[Table]:
    """How the sets moved between the steps at which they were written (the paper's figure 3).

    Means over the seeds of a run's mean, least and most over its leaves, and of the share of the
    first reservoir that was active up to then. No table if no run wrote its sets.

    Args:
        groups: the groups of finished runs.
        planned: as in `all_runs`.
    """
    heads = ["config", "settings", "seeds", "from step", "to step"]
    heads += [*(key.replace("_", ", ") for key in MOVED), "reservoir ever active", "command"]
    table = Table("sets", "The sets between two steps", heads, [])
    for group in groups:
        moved = list(map(_moved, group.records))
        wrote = group.only([f for f, found in zip(group.folders, moved, strict=True) if found])
        command = _command_of(wrote, planned)
        pairs: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for each in moved:
            for pair, record in each.items():
                pairs.setdefault(pair, []).append(record)
        for pair, found in sorted(pairs.items(), key=lambda item: item[0][::-1]):
            numbers = [_over([each.get(key) for each in found]) for key in (*MOVED, EVER_ACTIVE)]
            first: list[Cell] = [group.name, group.settings, len(found), *pair]
            table.rows.append([*first, *numbers, command])
    return [table] if table.rows else []


def _moved(records: Sequence[dict[str, Any]]) -> dict[tuple[int, int], dict[str, Any]]:
    """What a run recorded of its sets at pairs of steps, and its reservoir up to the second."""
    found = {}
    for record in records:
        if record["split"] == "sets" and "since" in record:
            step = record["step"]
            ever = [r for r in records if r["step"] <= step and EVER_ACTIVE in r]
            last = {EVER_ACTIVE: max(ever, key=lambda r: r["step"])[EVER_ACTIVE]} if ever else {}
            found[record["since"], step] = record | last
    return found


def _over(found: Sequence[float | None]) -> Number:
    values = [value for value in found if value is not None]
    return Number(mean(values), deviation(values), ".4f")


def sweeps(dirs: Sequence[Path], groups: Sequence[Group]) -> list[Table]:
    """A table for each sweep that was made in the folders, with the rows that are missing.

    Args:
        dirs: the folders of the report.
        groups: the groups of finished runs in them.
    """
    found: list[Table] = []
    for path in _plans(dirs):
        name = own = path.name.removesuffix(SWEEP)
        number, taken = 1, {"table", "sets", *(table.name for table in found)}
        while name in taken:  # Each table has its file.
            number += 1
            name = f"{own}-{number}"
        found.append(_sweep(name, path, groups))
    return found


def _sweep(name: str, path: Path, groups: Sequence[Group]) -> Table:
    plan = plans.read(path)
    by_row = {folder.parent: group for group in groups for folder in group.folders}
    heads = ["run", "seeds", *_columns(groups), "reported by the paper", *_MADE]
    here = Path.cwd()
    told = path.parent.relative_to(here) if path.parent.is_relative_to(here) else path.parent
    table = Table(name, f"{plan.config} in {told}", heads, [])
    for planned in plan.rows:
        folder = (path.parent / planned["row"]).resolve()
        group = by_row.get(folder)
        if group:  # It may have runs of the same config in other folders, too.
            group = group.only({run for run in group.folders if run.parent == folder})
        done = len(group.runs) if group else 0
        seeds = str(done) if done >= plan.seeds else f"{done}, missing {plan.seeds - done}"
        last = _made(group) if group else [""] * (len(_MADE) - 1)
        numbers, command = _numbers(group, groups), _planned_command(planned)
        table.rows.append([planned["row"], seeds, *numbers, planned["paper"], *last, command])
    return table


def _plans(dirs: Sequence[Path]) -> list[Path]:
    return sorted({path for d in dirs for path in files.named(d, f"*{SWEEP}")})


def _command_of(group: Group, planned: Mapping[Path, str]) -> str:
    """How a group was made: as a run recorded it, or else as a sweep planned it.

    Empty for runs that no sweep made, and that are older than the record.
    """
    own = [run["config"].get("command") for run in group.runs]
    known = [_command(made) for made in own if made and isinstance(made, list)]
    known += [planned[folder.parent] for folder in group.folders if folder.parent in planned]
    return next(iter(known), "")


def _planned_command(planned: Mapping[str, Any]) -> str:
    overrides = (f"--config.{text}" for text in planned["overrides"])
    return _command([f"--config={planned['config']}", *overrides])


def _command(arguments: Sequence[str]) -> str:
    told = " ".join(map(shlex.quote, map(str, arguments)))
    return f"python -m experiments.main {told} --workdir=DIR"


def _columns(groups: Sequence[Group]) -> dict[str, tuple[Read, str]]:
    metrics = {f"test {name}": (metric(name), ".4f") for name in metric_names(groups)}
    if any(not run["test"] for group in groups for run in group.runs):
        names = sorted({name for group in groups for run in group.runs for name in run["train"]})
        metrics |= {f"train {name}, last quarter": (_trained(name), ".4f") for name in names}
    return metrics | COLUMNS


def _numbers(group: Group | None, groups: Sequence[Group]) -> list[Number]:
    return [
        Number(group.mean(read), group.deviation(read), style) if group else Number(None, None, "")
        for read, style in _columns(groups).values()
    ]


def _made(group: Group) -> list[str]:
    """The steps, devices, dates and test data of the runs, usually one of each."""
    steps = {str(run.get("steps", "")) for run in group.runs}
    devices = {_device(run) for run in group.runs}
    dates = {str(run.get("date", "not recorded")) for run in group.runs}
    return [*(", ".join(sorted(each)) for each in (steps, devices, dates)), _context(group)]


def _device(run: Summary) -> str:
    """The kind of the device and, of a CPU, its model where the run recorded it."""
    kind, processor = str(run.get("device", "")), run.get("processor", "")
    return f"{kind} ({processor})" if kind == "cpu" and processor else kind


def _context(group: Group) -> str:
    found = {json.dumps(run["test_context"], sort_keys=True) for run in group.runs}
    return "; ".join(
        ", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in sorted(found)
    )
