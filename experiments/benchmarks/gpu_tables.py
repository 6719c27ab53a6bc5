"""The record of scripts/bench_gpu as tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmarks.stack import PARTS

Row = Mapping[str, Any]


def tables(record: Mapping[str, Any], date: str) -> str:
    """All rows of a record, with what they were measured on and by.

    Args:
        record: what scripts/bench_gpu prints.
        date: the day of the measurement.
    """
    size = "x".join(str(record["stack_sizes"][key]) for key in ("features", "hidden"))
    tokens, dtype = (record["stack_sizes"][key] for key in ("tokens", "dtype"))
    return "\n".join(
        [
            f"# Block products on {record['device']}",
            "",
            f"{date}, JAX {record['jax']}, driver {record['driver'] or 'unknown'}, settings of "
            f"{record['tuned']}; `{record['command']}`.",
            *_SMOKE[record["smoke"]],
            "",
            "## Kernels against XLA",
            "",
            *_table(
                ("kernel", "block", "dtype", "tokens", "y", "dx", "dW", "tolerance", "result"),
                [_check(row) for row in record["checks"]],
            ),
            "",
            f"## A stack {size} and back, {tokens} tokens, {dtype}",
            "",
            "Milliseconds by the clock named, and their ratio to dense; in brackets the share of",
            "the multiplications that is left. GB are what the compiler plans for a step.",
            "",
            *_table(
                ("", *("dW" if part == "dw" else part for part in PARTS), "GB", "clock"),
                [_times(row, PARTS) for row in record["stack"]],
            ),
            "",
            f"## A training step of {record['model_name']}",
            "",
            "The same; in brackets the share of the sparse kernels alone, and all else is dense.",
            "",
            *_table(
                ("", "step", "GB", "backend", "clock"),
                [_model(row) for row in record["model"]],
            ),
            "",
            *_listed("No time was left for", record["left_out"]),
            *_listed("Errors", [f"{f['row']}: {f['error']}" for f in record["failed"]]),
        ]
    )


_SMOKE: Mapping[bool, Sequence[str]] = {
    True: ("", "A smoke run: tiny sizes, interpreted kernels. Its times are those of no device."),
    False: (),
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _listed(title: str, items: Sequence[str]) -> list[str]:
    return [f"{title}:", "", *(f"* {item}" for item in items), ""] if items else []


def _check(row: Row) -> list[str]:
    errors = [f"{row[name]:.1e}" for name in ("y", "dx", "dw", "tolerance")]
    size = "x".join(map(str, row["shape"]))
    result = "ok" if row["ok"] else "**differs**"
    return [size, str(row["block"]), row["dtype"], str(row["tokens"]), *errors, result]


def _times(row: Row, parts: Sequence[str]) -> list[str]:
    cells = [_time(row, part) for part in parts]
    return [_name(row), *cells, _gigabytes(row), row["clock"]]


def _model(row: Row) -> list[str]:
    return [_name(row), _time(row, "step"), _gigabytes(row), row["backend"], row["clock"]]


def _name(row: Row) -> str:
    return "dense" if row["block"] is None else f"blocks of {row['block']}, {row['density']}"


def _time(row: Row, part: str) -> str:
    text = f"{1e3 * row[part]:.3g}"
    if row["block"] is None:
        return text
    ratio = f", {row['ratio'][part]:.3f}" if part in row["ratio"] else ""  # Dense may be left out.
    return f"{text}{ratio} ({row['limit'][part]:.3f})"


def _gigabytes(row: Row) -> str:
    return f"{row['memory']['program_bytes'] / 1e9:.3g}"
