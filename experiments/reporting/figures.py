"""The figures of a report."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.records.workdir import flat
from experiments.reporting import tables
from experiments.reporting.groups import (
    VARIANT,
    Group,
    Summary,
    forward_density,
    told_apart,
    training_flops,
)

# Figures over steps: their file, and the records that they show, with the titles of panels.
OVER_STEPS = {
    "churn": {
        "churn_since_last_refresh": "share of the forward set that is new since the last refresh",
        "churn_since_start": "share of the forward set that is new since the start",
    },
    "reservoir": {"reservoir_ever_active": "share of the first reservoir that was ever active"},
    "sets": {
        "differ_mean": "entries in one of two successive forward sets alone (band: all leaves)",
        "woken_mean": "share of the reservoir that came into the next forward set",
    },
}


def _stopping(run: Summary) -> float | None:
    """The share of the steps after which exploration stops, if the method can stop it."""
    method = run["config"]["method"]
    if "stop_exploring_at" not in method:
        return None
    stop = method["stop_exploring_at"]
    return 1.0 if stop is None else min(1.0, stop / run["config"]["steps"])


def _active(run: Summary) -> Any:
    return run["active_parameters"]


STOP = "method.stop_exploring_at"
# Figures of each test metric: what it is drawn against, by the end of the file's name.
AGAINST: dict[str, tuple[Callable[[Summary], Any], str]] = {
    "density": (forward_density, "forward density of the sparse layers, counted from the masks"),
    "backward_density": (
        lambda run: run["densities_over_run"]["backward"],
        "backward density of the sparse layers, mean over the steps",
    ),
    "training_flops": (
        training_flops,
        "FLOPs of training, as a share of the dense run's",
    ),
    "parameters": (_active, "active parameters"),
    "stopping": (_stopping, "share of the steps after which exploration stops"),
}


def draw(groups: Sequence[Group], metrics: Sequence[str], out: Path) -> list[Path]:
    """Draws each metric against what `AGAINST` has, and records over steps; returns the files.

    A figure of which there are not two different points is left out.
    """
    paths = []
    for metric in metrics:
        tested = told_apart([g for g in groups if g.mean(tables.metric(metric)) is not None])
        for name, (x, label) in AGAINST.items():
            lines = _stopping_lines(tested, metric) if x is _stopping else _lines(tested, metric, x)
            places = {place for line in lines for place, _, _ in line.points}
            drawn = any(line.points for line in lines if not _across(line))
            if (drawn and len(places) > 1) or (name == "density" and places):
                paths.append(out / f"{metric}_against_{name}.png")
                better = max if metric in LARGER_IS_BETTER else min
                made = _against(lines, label, f"test {metric}", name != "stopping", better)
                _save(made, paths[-1])
    for name, panels in OVER_STEPS.items():
        if any(_over_steps(group, key) for group in groups for key in panels):
            paths.append(out / f"{name}.png")
            _save(_steps_figure(groups, panels), paths[-1])
    return paths


LARGER_IS_BETTER = ("accuracy",)
MARKERS = "os^DvPX*<>"
STYLES = ("-", "--", ":", "-.")  # of lines over steps, ten colours each
MOST_LABELS = 12  # of one figure: beyond them, groups of unusual settings have hollow markers


class Line(NamedTuple):
    """Points of one figure that have a colour and, by their forward density, a marker together.

    Attributes:
        label: what the colour stands for: config file if there are several, method and settings.
        density: the forward density that the marker stands for; None where it is not shown.
        points: place, mean and deviation of each group.
        hollow: whether the points have unusual settings, which the label does not name.
    """

    label: str
    density: str | None
    points: list[tuple[float, float, float]]
    hollow: bool = False


def _lines(groups: Sequence[Group], metric: str, x: Callable[[Summary], Any]) -> list[Line]:
    """The points of a figure, groups that differ in the place alone on one line.

    Against anything but the forward density or the active parameters, which follow from it, each
    forward density is a line of its own.
    """
    lines: dict[tuple[str, str | None, bool], Line] = {}
    named = {", ".join([_label(g, groups), *g.unusual.values()]) for g in groups}
    for group in groups:
        hollow = bool(group.unusual) and len(named) > MOST_LABELS
        parts = [_label(group, groups), *([] if hollow else group.unusual.values())]
        by_density = x not in (forward_density, _active) and group.method != "dense"
        density = f"{group.mean(forward_density):.2g}" if by_density else None
        key = (", ".join(parts), density, hollow)
        _add(lines.setdefault(key, Line(key[0], density, [], hollow)), group, metric, x)
    return [line for line in lines.values() if line.points]


def _stopping_lines(groups: Sequence[Group], metric: str) -> list[Line]:
    """One line for each config of which there are runs that stop exploring at different steps."""
    lines: dict[str, Line] = {}
    for group in groups:
        label = ", ".join([group.name, group.method, *_besides(group, VARIANT, STOP)])
        _add(lines.setdefault(label, Line(label, None, [])), group, metric, _stopping)
    return [line for line in lines.values() if len({place for place, _, _ in line.points}) > 1]


def _besides(group: Group, *keys: str) -> list[str]:
    """The unusual settings of a group without some of them."""
    return [text for key, text in group.unusual.items() if key not in keys]


def _add(line: Line, group: Group, metric: str, x: Callable[[Summary], Any]) -> None:
    read = tables.metric(metric)
    mean, place = group.mean(read), group.mean(x)
    # A record may say 0, which an axis of powers does not have.
    if mean is not None and place is not None and (place > 0 or x is _stopping):
        deviation = group.deviation(read)
        line.points.append((place, mean, math.nan if deviation is None else deviation))


def _label(group: Group, groups: Sequence[Group]) -> str:
    """The method of a group, and where there are several config files, which it is of."""
    density = flat(group.runs[0]["config"]).get("model.small_dense.forward_density")
    method = "small dense" if isinstance(density, float) and density < 1 else group.method
    return method if len({other.file for other in groups}) == 1 else f"{group.file}, {method}"


def _against(
    lines: Sequence[Line],
    xlabel: str,
    ylabel: str,
    logarithmic: bool,
    better: Callable[[float, float], float],
) -> Any:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    labels = list(dict.fromkeys(line.label for line in lines))
    densities = sorted({line.density for line in lines if line.density}, key=float, reverse=True)
    colors = dict(zip(labels, _colors(len(labels)), strict=True))
    # The first one is that of lines without a density.
    markers = dict(zip(densities, itertools.cycle(MARKERS[1:]), strict=False))
    handles, shown = [], set()
    drawn_at: list[float] = []
    for line in lines:
        color = colors[line.label]
        if _across(line):
            style, besides = (":", ", other settings") if line.hollow else ("--", "")
            label, height = f"{line.label}{besides}", line.points[0][1]
            handles.append(axes.axhline(height, color=color, ls=style, label=label))
            shown.add(line.label)
            continue
        marker = markers.get(line.density or "", MARKERS[0])
        places, means, deviations = zip(*sorted(line.points), strict=True)
        drawn_at += places
        fill = "none" if line.hollow else color
        axes.errorbar(
            places, means, deviations, color=color, marker=marker, mfc=fill, ls="", capsize=3
        )
        # Of groups at one place, such as those of several backward densities, the best is joined.
        best: dict[float, float] = {}
        for place, mean, _ in sorted(line.points):
            best[place] = better(best.get(place, mean), mean)
        if not line.hollow:
            axes.plot(list(best), list(best.values()), color=color)
    handles += [
        Line2D([], [], color=color, marker=None if densities else "o", label=label)
        for label, color in colors.items()
        if label not in shown
    ]
    handles += [
        Line2D([], [], color="black", marker=marker, ls="", label=f"forward density {density}")
        for density, marker in markers.items()
    ]
    if any(line.hollow for line in lines):
        handles.append(
            Line2D([], [], color="black", marker="o", mfc="none", ls="", label="other settings")
        )
    if logarithmic and drawn_at:
        _logarithmic(axes, drawn_at)
    axes.grid(alpha=0.3)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _legend(figure, axes, handles)
    return figure


def _across(line: Line) -> bool:
    """Whether a line is drawn across the figure, and not at a place: that of the dense network."""
    return f", {line.label}".endswith(", dense") and len(line.points) == 1


def _colors(count: int) -> list[Any]:
    """As many colours that can be told apart."""
    if count <= 12:
        return [*(f"C{i}" for i in range(10)), "midnightblue", "lime"][:count]
    return [plt.get_cmap("turbo")(i / (count - 1)) for i in range(count)]


def _legend(figure: Any, axes: Any, handles: Sequence[Any]) -> None:
    """Adds the legend, to the right of the axes, which keep their size, if it has many entries."""
    figure.tight_layout()
    if len(handles) <= 8:
        axes.legend(handles=handles, fontsize=8)
        return
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "ncols": -(-len(handles) // 24)}
    axes.legend(handles=handles, fontsize=7, **place)


def _logarithmic(axes: Any, places: list[float]) -> None:
    """Makes the axis logarithmic, with places as its ticks: as many as their labels have room."""
    told = lambda place, _: f"{place:,.0f}" if place >= 100 else f"{place:.3g}"  # noqa: E731
    axes.set_xscale("log")
    first, *others = sorted({float(f"{place:.2g}") for place in places})
    # A character takes about 1/70 of the width that the points lie within.
    share = max(len(told(place, 0)) + 1 for place in (first, *others)) / 70
    ticks, near = [first], (max(places) / min(places)) ** share
    for place in others:
        if place > near * ticks[-1]:
            ticks.append(place)
    axes.set_xticks(ticks)
    if not others:  # Means that differ by rounding would be a range.
        axes.set_xlim(first / 2, first * 2)
    axes.xaxis.set_major_formatter(FuncFormatter(told))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _steps_figure(groups: Sequence[Group], panels: dict[str, str]) -> Any:
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels) + 1, 4.5), sharex=True, squeeze=False
    )
    drawn = [group for group in groups if any(_over_steps(group, key) for key in panels)]
    moved = [group for group in drawn if _moves(group, panels)] or drawn
    plain = [group for group in moved if not group.unusual or len(moved) <= MOST_LABELS]
    for each, (key, title) in zip(axes[0], panels.items(), strict=True):
        for i, group in enumerate(plain):
            by_step = _over_steps(group, key)
            if by_step:
                steps, color, style = sorted(by_step), f"C{i % 10}", STYLES[i // 10 % len(STYLES)]
                means = [statistics.fmean(by_step[step]) for step in steps]
                label = f"{group.name} ({', '.join([group.method, *_besides(group, VARIANT)])})"
                each.plot(steps, means, color=color, ls=style, label=label)
                least, most = (
                    _over_steps(group, key.replace("_mean", end)) for end in ("_least", "_most")
                )
                if key.endswith("_mean") and least.keys() == most.keys() == by_step.keys():
                    ends = [min(least[s]) for s in steps], [max(most[s]) for s in steps]
                    each.fill_between(steps, *ends, color=color, alpha=0.15, lw=0)
        each.set_title(title, fontsize=9)
        each.set_xlabel("step")
        each.grid(alpha=0.3)
    handles, _ = axes[0][-1].get_legend_handles_labels()
    if len(plain) < len(moved):
        left_out = f"not shown: {len(moved) - len(plain)} of other settings"
        handles.append(Line2D([], [], ls="", label=left_out))
    _legend(figure, axes[0][-1], handles)
    return figure


def _moves(group: Group, keys: Iterable[str]) -> bool:
    """Whether any value is not 0; fixed sets would be a line on the axis."""
    return any(max(values) > 0 for key in keys for values in _over_steps(group, key).values())


def _over_steps(group: Group, key: str) -> dict[int, list[float]]:
    """The records of all seeds, by step; after the last refresh nothing is exchanged any more."""
    by_step: dict[int, list[float]] = defaultdict(list)
    last = _stop_of(group) if key == "churn_since_last_refresh" else math.inf
    for records in group.records:
        for record in records:
            if record["split"] in ("masks", "sets") and key in record and record["step"] <= last:
                by_step[record["step"]].append(record[key])
    return by_step


def _stop_of(group: Group) -> float:
    stop = group.runs[0]["config"]["method"].get(STOP.rpartition(".")[2])
    return stop if type(stop) is int else math.inf


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
