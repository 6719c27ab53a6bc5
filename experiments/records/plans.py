"""The plan of a sweep in the folder of its runs, from which a report knows which are missing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.records import files
from experiments.records.workdir import SWEEP, holds_results, read_json, write_json

# A row of a plan: its folder, its config file and variant, its overrides, and what the paper says.
_KINDS = {"row": str, "config": str, "overrides": list, "paper": str}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep plans.

    Attributes:
        config: the sweep file and its variant.
        seeds: how many seeds each row has.
        rows: by `row`, `config`, `overrides` (without the seed) and `paper`, in the file's order.
    """

    config: str
    seeds: int
    rows: Sequence[dict[str, Any]]


def path_in(directory: Path, spec: str) -> Path:
    """The file of a sweep's plan; each variant of a sweep file has one of its own."""
    file, _, variant = spec.partition(":")
    parts = [Path(file).stem, re.sub(r"[^\w.+-]+", "-", variant)]
    return directory / f"{'+'.join(filter(None, parts))}{SWEEP}"


def read(path: Path) -> Plan:
    """Reads a plan.

    Raises:
        UserError: the file holds something else.
    """
    found = read_json(path)
    rows: Any = found.get("rows")
    fits = isinstance(found.get("config"), str) and type(found.get("seeds")) is int
    fits = fits and isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not (
        fits and all(isinstance(row.get(key), kind) for row in rows for key, kind in _KINDS.items())
    ):
        raise UserError(f"{path}: is no plan of a sweep; must be written by experiments.sweep")
    return Plan(found["config"], found["seeds"], rows)


def record(directory: Path, plan: Plan, changed: Collection[str]) -> None:
    """Writes a plan to the folder of its runs.

    What an earlier command recorded stays as it is where this one runs nothing: other rows, more
    seeds, and rows that the sweep file no longer has if there are results of them.

    Args:
        directory: the folder.
        plan: the plan of this command.
        changed: the names of the rows that this command runs.

    Raises:
        UserError: the folder cannot be written, or holds a plan that cannot be read.
    """
    path = path_in(directory, plan.config)
    if path.exists():
        before = read(path)
        plan = _merged(before, plan, changed, directory)
        if plan == before:
            return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(plan), shared=True)  # by the tasks of a job array
    except OSError as error:
        raise UserError(f"--workdir={directory}: cannot be written: {error.strerror}") from error


def _merged(old: Plan, new: Plan, changed: Collection[str], directory: Path) -> Plan:
    before = {row["row"]: row for row in old.rows}
    rows = [row if row["row"] in changed else before.get(row["row"], row) for row in new.rows]
    planned = {row["row"] for row in rows}
    rows += [
        row for name, row in before.items() if name not in planned and results(directory / name)
    ]
    return Plan(new.config, max(old.seeds, new.seeds), rows)


def results(row: Path) -> list[Path]:
    """The folders of a row's runs that hold results."""
    seeds = [path for path in files.listed(row) if re.fullmatch(r"seed-\d{1,10}", path.name)]
    return [path for path in sorted(seeds) if holds_results(path)]
