"""Reads a sweep file: which runs it plans."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from experiments.config.loading import load, named
from experiments.errors import UserError, warn


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
        row: the folder of the row's runs in that of the sweep.
        seed: the seed of this run.
        config: the config file and its variant.
        overrides: texts `KEY=VALUE`, the seed included.
        paper: what the paper reports for the row; empty if it reports nothing.
    """

    row: str
    seed: int
    config: str
    overrides: tuple[str, ...]
    paper: str = ""

    @property
    def name(self) -> str:
        """The folder of the run in that of the sweep."""
        return f"{self.row}/seed-{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """The arguments of `experiments.main` that describe the run."""
        return [f"--config={self.config}", *(f"--config.{o}" for o in self.overrides)]


def plan(spec: str, seeds: int, overrides: Sequence[str] = ()) -> list[Planned]:
    """The runs of a sweep file, first all with seed 0, then all with seed 1, and so on.

    Args:
        spec: `path/to/NAME.py:VARIANT`; its `get_sweep` yields (name, config, overrides), and what
            the paper reports as a fourth item, if there is something.
        seeds: how many seeds there are.
        overrides: texts `KEY=VALUE` for all runs; they win over those of the file.

    Raises:
        UserError: it yields something else, or two rows of one name.
    """
    found = load(spec, "get_sweep")
    if not isinstance(found, Iterable):
        raise UserError(
            f"--config={spec}: get_sweep() returned {found!r}; must yield (name, config, overrides)"
        )
    with named(spec):  # A generator finds out only now that it has no such variant.
        entries = [_entry(spec, entry) for entry in found]
    names = [name for name, _, _, _ in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not entries:
        found = f"two runs named {twice[0]!r}" if twice else "no runs"
        raise UserError(f"--config={spec}: {found}")
    for text in overrides:
        rows = [name for name, config, own, _ in entries if _contradicts(text, config, own)]
        if rows:
            warn(
                f"--config.{text}: replaces the value of the row(s) {', '.join(rows)}, whose names "
                "and numbers of the paper stay those of the file"
            )
    return [
        Planned(name, seed, config, (*_merged(own, overrides), f"seed={seed}"), paper)
        for seed in range(seeds)
        for name, config, own, paper in entries
    ]


def reported(*sweeps: Iterable[Sequence[Any]]) -> Callable[[str, Mapping[str, Any]], str]:
    """What the paper reports for a row, as other sweeps say it of the same row.

    Args:
        sweeps: what `get_sweep` of each yields.

    Returns:
        A function of a config with its variant and of overrides. Its answer joins the numbers of
        all sweeps that have the row, and is empty if none has.
    """
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for entries in sweeps:
        for _, config, overrides, *paper in entries:
            told = found.setdefault((config, tuple(_texts(dict(overrides)))), [])
            told += [text for text in paper if text and text not in told]

    def of(config: str, overrides: Mapping[str, Any]) -> str:
        return "; ".join(found.get((config, tuple(_texts(dict(overrides)))), []))

    return of


_OF_A_VARIANT = ("method.name", "method.forward_density", "method.backward_density")


def _contradicts(text: str, config: str, own: Sequence[str]) -> bool:
    """Whether an override replaces what a row's own overrides or its variant say of the method."""
    key, _, value = text.partition("=")
    for other in own:
        if other.partition("=")[0] == key:
            return other != text
    if key not in _OF_A_VARIANT or ":" not in config:
        return False
    method, name = load(config).method, key.removeprefix("method.")
    return name in method and str(method[name]) != value


def _entry(spec: str, entry: Any) -> tuple[str, str, tuple[str, ...], str]:
    try:
        name, config, overrides, *rest = entry
        config, own = str(config), tuple(_texts(dict(overrides)))
        (paper,) = rest or ("",)
    except (TypeError, ValueError):
        raise UserError(
            f"--config={spec}: found {entry!r}; get_sweep() must yield (name, config, overrides) "
            "or (name, config, overrides, what the paper reports)"
        ) from None
    name = row_name(config, own) if name is None else str(name)
    # Anything else could name a folder outside the sweep's, or one folder in two ways.
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise UserError(
            f"--config={spec}: found a run named {name!r}; a name must be letters, digits and "
            "'_-+.', without a point in front"
        )
    return name, config, own, str(paper)


def row_name(config: str, overrides: Sequence[str]) -> str:
    """The name of a row that has none: its variant, and the last part of each override."""
    variant = config.partition(":")[2] or "default"
    split = [text.partition("=") for text in overrides]
    parts = [variant, *(f"{key.rpartition('.')[2]}-{value}" for key, _, value in split)]
    return "+".join(re.sub(r"[^\w.+-]+", "-", part.replace(",", "+")) for part in parts)


def _texts(overrides: dict[str, Any]) -> Iterator[str]:
    for key, value in overrides.items():
        if key == "seed":
            raise UserError("sweep: an override sets 'seed'; use --seeds=N")
        yield f"{key}={value if isinstance(value, str) else repr(value)}"


def _merged(own: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Overrides of a row and of the command line, which come later and win."""
    return list({text.partition("=")[0]: text for text in (*own, *overrides)}.values())
