"""The table of a report, as Markdown and as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.reporting.groups import Group, Summary, forward_density


def metric(name: str) -> Callable[[Summary], Any]:
    """Reads a test metric."""
    return lambda run: run["test"].get(name)


# The headings, with how each number is read and printed. The backward density and the FLOPs of
# training are means over the steps of the run; the other columns are of the final network.
COLUMNS: dict[str, tuple[Callable[[Summary], Any], str]] = {
    "forward density": (forward_density, ".4g"),
    "backward density": (lambda r: r["densities_over_run"]["backward"], ".4g"),
    "parameters": (lambda r: r["parameters"], ",.0f"),
    "active": (lambda r: r["active_parameters"], ",.0f"),
    "training FLOPs": (lambda r: r["flops"]["training_fraction"], ".3f"),
    "inference FLOPs": (lambda r: r["flops"]["inference_fraction"], ".3f"),
    "seconds": (lambda r: r["seconds"], ".0f"),
}


def metric_names(groups: Sequence[Group]) -> list[str]:
    """Every test metric there is."""
    return sorted({name for group in groups for run in group.runs for name in run["test"]})


def _columns(groups: Sequence[Group]) -> dict[str, tuple[Callable[[Summary], Any], str]]:
    metrics = {f"test {name}": (metric(name), ".4f") for name in metric_names(groups)}
    return metrics | COLUMNS


def _cell(group: Group, read: Callable[[Summary], Any], style: str) -> str:
    mean, deviation = group.mean(read), group.deviation(read)
    if mean is None:
        return ""
    return format(mean, style) + (f" ± {format(deviation, style)}" if deviation else "")


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


def markdown(groups: Sequence[Group]) -> str:
    """One row for each group: means and standard deviations over its seeds."""
    columns = _columns(groups)
    rows = [[*_first_heads(groups), *columns, "evaluated on"]]
    rows.append(["---"] * len(rows[0]))
    for group in groups:
        cells = [_cell(group, read, style) for read, style in columns.values()]
        rows.append([*map(str, _first(group, groups)), *cells, _context(group)])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def write_csv(groups: Sequence[Group], path: Path) -> None:
    """Writes the same table, with means and standard deviations in columns of their own."""
    columns = _columns(groups)
    heads = [head for column in columns for head in (column, f"{column} spread")]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_first_heads(groups), *heads, "evaluated on"])
        for group in groups:
            row = _first(group, groups)
            for read, _ in columns.values():
                row += [group.mean(read), group.deviation(read)]
            writer.writerow([*row, _context(group)])
