"""Groups of finished runs that differ only in the seed, and in what changes no result."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import UserError, warn
from experiments.records import files
from experiments.records.metrics import is_value, read_records
from experiments.records.workdir import CONFIG, FINAL, METRICS, flat, holds_run, is_free, read_json

Summary = dict[str, Any]
VARIANT = "variant"  # the key of a variant's flags among the settings


_TEXT = lambda v: isinstance(v, str), "a text"
_AMOUNT = lambda v: is_value(v) and 0 <= v < math.inf, "a number of at least 0 and at most 1e100"
_PLAIN = lambda v: v is None or isinstance(v, str | bool | int | float)  # noqa: E731
_CONTEXT = (
    lambda v: isinstance(v, dict) and all(map(_PLAIN, v.values())),
    "an object without others in it",
)
_METRICS = (
    lambda v: isinstance(v, dict) and all(map(is_value, v.values())),
    "an object of numbers, at most 1e100 or not finite",
)
# What a report reads of every `final.json`, and what it must be.
NEEDED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": _TEXT,
    "seed": (lambda v: type(v) is int, "an integer"),
    "config.method.name": _TEXT,
    "test": _METRICS,
    "test_context": _CONTEXT,
    "densities.forward": _AMOUNT,
    "densities_over_run.backward": _AMOUNT,
    "parameters": _AMOUNT,
    "active_parameters": _AMOUNT,
    "flops.training_fraction": _AMOUNT,
    "flops.inference_fraction": _AMOUNT,
    "flops.dense_forward_per_step": _AMOUNT,
    "seconds": _AMOUNT,
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one name that differ only in the seed and in `workdir.FREE`.

    Attributes:
        name: the name of their config.
        method: the name of their sparsity method.
        runs: their summaries (`final.json`), with "training_flops": the FLOPs of all steps, as a
            share of those of the dense run of the same config file, and "train": what was recorded
            of the training, means over the last quarter of the recorded steps.
        records: their records (`metrics.jsonl`), in the same order.
        folders: their folders, in the same order.
        settings: the settings that differ from other groups of the same name and method; empty if
            there is no such group.
        unusual: those of the settings, by key, that differ from what most tested groups of the same
            config file and method have (of several, what most of the file have), and under
            `VARIANT` the flags of its variant, if most tested groups of the file have others.
    """

    name: str
    method: str
    runs: list[Summary]
    records: list[list[dict[str, Any]]]
    folders: list[Path]
    settings: str = ""
    unusual: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name of the config file, without the variant."""
        return self.name.partition(":")[0]

    @property
    def flags(self) -> str:
        """What the variant has after the method, such as "2x"."""
        return self.name.partition(":")[2].partition(",")[2]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The settings that decide on the results, by key, but for the seed and what follows."""
        settings = _settings(self.runs[0])
        return {k: v for k, v in settings.items() if not k.startswith("derived.")}

    def only(self, folders: Collection[Path]) -> Group:
        """The same group with its runs in these folders alone."""
        kept = [i for i, folder in enumerate(self.folders) if folder in folders]
        return dataclasses.replace(
            self,
            runs=[self.runs[i] for i in kept],
            records=[self.records[i] for i in kept],
            folders=[self.folders[i] for i in kept],
        )

    def values(self, read: Callable[[Summary], Any]) -> list[float]:
        """The number of each run that has it."""
        found = [read(run) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def deviation(self, read: Callable[[Summary], Any]) -> float | None:
        """The standard deviation over the seeds, or None if fewer than two have the number."""
        return deviation(self.values(read))

    def mean(self, read: Callable[[Summary], Any]) -> float | None:
        """The mean over the seeds, or None if no run has the number."""
        return mean(self.values(read))


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing, and NaN if a value is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.fmean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation; None of fewer than two values, and NaN if one is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else None


def once(groups: Sequence[Group]) -> tuple[list[Group], list[Path]]:
    """Groups with one run for each seed, and the folders of the others.

    A copied folder, or the same row in two sweeps, would otherwise count as another seed. It is the
    run that comes first, of those that recorded how their sets moved if there are any.
    """
    firsts: set[Path] = set()
    for group in groups:
        by_seed: dict[int, Path] = {}
        kept = list(zip(group.runs, group.folders, map(_has_sets, group.records), strict=True))
        for run, folder, _ in sorted(kept, key=lambda found: not found[2]):
            by_seed.setdefault(run["seed"], folder)
        firsts |= {*by_seed.values()}
    others = sorted({path for group in groups for path in group.folders} - firsts)
    return [group.only(firsts) for group in groups], others


def _has_sets(records: Sequence[dict[str, Any]]) -> bool:
    return any(record["split"] == "sets" for record in records)


def collect(dirs: Sequence[Path]) -> tuple[list[Group], list[Path]]:
    """The groups of finished runs, ordered by name, and the folders of unfinished runs."""
    for directory in dirs:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such folder; expected one with runs")
    configs = sorted({path.parent for d in dirs for path in files.named(d, CONFIG)})
    finals = sorted({path for d in dirs for path in files.named(d, FINAL)})
    if not finals:
        raise UserError(f"{', '.join(map(str, dirs))}: no finished run ({FINAL}) in there")
    groups: dict[str, Group] = {}
    for path in finals:
        run = _read_final(path)
        key = json.dumps({"name": run["name"], **_settings(run)}, sort_keys=True)
        group = groups.setdefault(
            key, Group(run["name"], run["config"]["method"]["name"], [], [], [])
        )
        records = path.with_name(METRICS)
        if not records.exists():
            warn(f"{records}: is missing; the figures over steps do without this run")
        group.records.append(read_records(records))
        _warn_if_cut(records, run, group.records[-1])
        group.runs.append({**run, "train": _late(group.records[-1])})
        group.folders.append(path.parent)
    unfinished = [path for path in configs if not (path / FINAL).exists() and holds_run(path)]
    told = told_apart(list(groups.values()))
    return sorted(told, key=lambda g: (g.file, *_order(g))), unfinished


def _warn_if_cut(path: Path, run: Summary, records: Sequence[dict[str, Any]]) -> None:
    """Warns of records that end more than `log_every` steps before the run did."""
    steps, every = run.get("steps"), run["config"].get("log_every")
    last = max((record["step"] for record in records), default=0)
    if type(steps) is int and type(every) is int and 0 < last < steps - every:
        warn(f"{path}: ends at step {last} of {steps}, and so do the figures over steps")


def _late(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a run recorded of its training, means over its last quarter."""
    found = [record for record in records if record["split"] == "train"]
    last = max((record["step"] for record in found), default=0)
    late = [record for record in found if record["step"] > 0.75 * last]
    shared = set.intersection(*(set(record) for record in late)) if late else set()
    return {
        key: statistics.fmean(record[key] for record in late)
        for key in sorted(shared - {"step", "learning_rate"})
        if all(type(record[key]) is float for record in late)
    }


def told_apart(groups: Sequence[Group]) -> list[Group]:
    """The same groups, with `settings`, `unusual` and training FLOPs as against each other."""
    alike: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for group in groups:
        alike[group.name, group.method].append(group.config)
    of_file = {group.file: [g for g in groups if g.file == group.file] for group in groups}
    full = {file: _full_length(found) for file, found in of_file.items()}
    told = []
    for group in groups:
        keys = _own(group.config, alike[group.name, group.method])
        own = {key: _setting(key, group.config[key]) for key in keys}
        unusual = _unusual(group, of_file[group.file], own)
        length = _dense_flops(group) / full[group.file]
        runs = [
            {**run, "training_flops": length * run["flops"]["training_fraction"]}
            for run in group.runs
        ]
        settings = ", ".join(own.values())
        told.append(dataclasses.replace(group, runs=runs, settings=settings, unusual=unusual))
    return told


def _unusual(group: Group, of_file: Sequence[Group], own: dict[str, str]) -> dict[str, str]:
    """Which of its own settings, and whether its flags, are not the usual ones."""
    everything = [g.config for g in _tested(of_file)]
    alike = [g.config for g in _tested([g for g in of_file if g.method == group.method])]
    usual = {
        key: _usual([c.get(key) for c in alike], [c.get(key) for c in everything]) for key in own
    }
    unusual = {key: told for key, told in own.items() if group.config[key] != usual[key]}
    if group.flags != _usual([g.flags for g in _tested(of_file)]):
        unusual[VARIANT] = group.flags
    return unusual


def _tested(groups: Sequence[Group]) -> Sequence[Group]:
    """Those with a test; all of them, if none has one."""
    return [group for group in groups if any(run["test"] for run in group.runs)] or groups


def _full_length(groups: Sequence[Group]) -> float:
    """FLOPs of what the most dense runs of one config file do; the fewest of all, without any."""
    tested = _tested(groups)
    dense = [_dense_flops(group) for group in tested if group.method == "dense"]
    most = max(map(dense.count, dense), default=0)
    return min((n for n in dense if dense.count(n) == most), default=min(map(_dense_flops, tested)))


def _dense_flops(group: Group) -> float:
    """FLOPs of all forward passes of a run of a group, if it trained the dense network."""
    run = group.runs[0]
    steps = run["config"].get("steps")
    a_step: float = run["flops"]["dense_forward_per_step"] or 1.0
    small = flat(run["config"]).get("model.small_dense.forward_density", 1.0)
    if isinstance(small, float) and small < 1:  # The fraction is of the network of full width.
        a_step /= run["flops"]["inference_fraction"]
    # Ten digits: a quotient is not exact.
    return float(f"{a_step * (steps if type(steps) is int and steps > 0 else 1):.10g}")


def _usual(values: Sequence[Any], among: Sequence[Any] = ()) -> Any:
    """The value that is there most often, and of several those that `among` has most often.

    NaN, which is equal to none, if there are several still.
    """
    most = max(map(values.count, values))
    rivals = [value for value in values if values.count(value) == most]
    most = max(map(among.count, rivals))
    rivals = [value for value in rivals if among.count(value) == most]
    return math.nan if _differ(rivals) else rivals[0]


def _settings(run: Summary) -> dict[str, Any]:
    """The settings that decide on a run's results, by key, but for the seed."""
    return {k: v for k, v in flat(run["config"]).items() if k != "seed" and not is_free(k)}


def _own(config: dict[str, Any], alike: Sequence[dict[str, Any]]) -> list[str]:
    """The keys of a config on which some configs do not agree."""
    keys = [k for k in sorted(config) if _differ([c[k] for c in alike if k in c])]
    # Keys that only some configs have mostly follow from those; the others are added here.
    same = [c for c in alike if all(c.get(k) == config[k] for k in keys)]
    keys += [k for k in sorted(config) if k not in keys and _differ([c.get(k) for c in same])]
    return keys


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _setting(key: str, value: Any) -> str:
    if key == "method.always_sparse":
        return "always sparse" if value else "masks"
    return str(value) if key == "method.pattern" else f"{key.rpartition('.')[2]} {value}"


def _order(group: Group) -> tuple[Any, ...]:
    density = -(group.mean(forward_density) or 0)
    return group.method != "dense", group.method, density, group.name, group.settings


def _read_final(path: Path) -> Summary:
    run = read_json(path)
    for key, (fits, kind) in NEEDED.items():
        found: Any = run
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is None:
            raise UserError(f"{path}: has no {key!r}; must be written by experiments.main")
        if not fits(found):
            raise UserError(f"{path}: {key} is {str(found)[:100]!r}; must be {kind}")
    return run


def training_flops(run: Summary) -> Any:
    """The FLOPs of all steps of a run, as a share of the dense run's of the same config file."""
    return run["training_flops"]


def forward_density(run: Summary) -> Any:
    """The forward density of a run's sparse leaves, counted from the masks."""
    return run["densities"]["forward"]
