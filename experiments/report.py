"""Tables and figures over finished runs.

python -m experiments.report DIR… --out=OUT
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.config import command_line
from experiments.errors import UserError
from experiments.reporting import figures, tables
from experiments.reporting.groups import collect


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    parser = command_line.Parser(prog="experiments.report", description=__doc__)
    parser.add_argument("dirs", nargs="+", metavar="DIR", help="folders with runs, at any depth")
    parser.add_argument(
        "--out", type=command_line.path, required=True, help="folder for the table and the figures"
    )
    args = parser.parse_args(argv)
    print(report([Path(d) for d in args.dirs], Path(args.out)))


def report(dirs: Sequence[Path], out: Path) -> str:
    """Writes `table.md`, `table.csv` and the figures; returns the table and their paths."""
    groups, unfinished = collect(dirs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        table = tables.markdown(groups)
        (out / "table.md").write_text(table)
        tables.write_csv(groups, out / "table.csv")
        drawn = figures.draw(groups, tables.metric_names(groups), out)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written: {error.strerror}") from error
    left_out = [f"left out, not finished: {path}" for path in unfinished]
    written = [f"wrote {path}" for path in (out / "table.md", out / "table.csv", *drawn)]
    return "\n".join([table, *left_out, *written])


if __name__ == "__main__":
    sys.exit(main())
