"""The figures of a report."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.reporting import tables
from experiments.reporting.groups import Group, forward_density

CHURN = {
    "churn_since_last_refresh": "since the last refresh",
    "churn_since_start": "since the start",
}


def draw(groups: Sequence[Group], metrics: Sequence[str], out: Path) -> list[Path]:
    """Draws each metric against density, and mask churn over steps; returns the files."""
    paths = []
    for metric in metrics:
        paths.append(out / f"{metric}_against_density.png")
        _save(_against_density(groups, metric), paths[-1])
    if any(_churn(group, key) for group in groups for key in CHURN):
        paths.append(out / "churn.png")
        _save(_churn_figure(groups), paths[-1])
    return paths


def _against_density(groups: Sequence[Group], metric: str) -> Any:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    lines: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    several = len({_stem(group) for group in groups}) > 1
    for group in groups:
        read = tables.metric(metric)
        mean, density = group.mean(read), group.mean(forward_density)
        if mean is not None and density is not None:
            parts = (_stem(group) if several else "", group.settings, group.method)
            label = ", ".join(filter(None, parts))
            lines[label].append((density, mean, group.deviation(read) or 0.0))
    for i, (label, points) in enumerate(lines.items()):
        densities, means, deviations = zip(*sorted(points), strict=True)
        if label.endswith("dense"):
            axes.axhline(means[0], color=f"C{i}", linestyle="--", label=label)
        else:
            axes.errorbar(
                densities, means, deviations, color=f"C{i}", marker="o", capsize=3, label=label
            )
    _density_axis(axes, [d for points in lines.values() for d, _, _ in points])
    axes.set_xlabel("forward density of the sparse layers, counted from the masks")
    axes.set_ylabel(f"test {metric}")
    axes.legend()
    return figure


def _density_axis(axes: Any, densities: list[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted({float(f"{d:.2g}") for d in densities}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda d, _: f"{d:.2g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _churn_figure(groups: Sequence[Group]) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharex=True)
    for axes, (key, title) in zip(panels, CHURN.items(), strict=True):
        for i, group in enumerate(groups):
            by_step = _churn(group, key)
            if by_step:
                steps = sorted(by_step)
                means = [statistics.fmean(by_step[step]) for step in steps]
                about = ", ".join(filter(None, (group.method, group.settings)))
                axes.plot(steps, means, color=f"C{i}", label=f"{group.name} ({about})")
        axes.set_title(f"share of the forward set that is new {title}", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mask churn")
    panels[-1].legend(fontsize=8)
    return figure


def _churn(group: Group, key: str) -> dict[int, list[float]]:
    by_step: dict[int, list[float]] = defaultdict(list)
    for records in group.records:
        for record in records:
            if record["split"] == "masks" and key in record:
                by_step[record["step"]].append(record[key])
    return by_step


def _stem(group: Group) -> str:
    return group.name.partition(":")[0]


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
