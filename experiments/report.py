"""Writes tables, figures and an HTML page of finished runs.

python -m experiments.report DIR… --out=OUT
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.config import command_line
from experiments.errors import UserError
from experiments.records import files, workdir
from experiments.reporting import figures, page, tables
from experiments.reporting.groups import collect, once


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    parser = command_line.Parser(prog="experiments.report", description=__doc__)
    parser.add_argument(
        "dirs",
        type=command_line.path,
        nargs="+",
        metavar="DIR",
        help="folders with runs, at any depth",
    )
    parser.add_argument(
        "--out", type=command_line.path, required=True, help="folder for the table and the figures"
    )
    args = parser.parse_args(argv)
    print(report([files.path(d) for d in args.dirs], Path(args.out)))


def report(dirs: Sequence[Path], out: Path) -> str:
    """Writes tables, figures and the page `report.html`.

    Args:
        dirs: folders with runs, at any depth. There is a table of all runs, and one for each sweep
            that was run in these folders.
        out: the folder to write to; it is created if there is none.

    Returns:
        The table of all runs as Markdown, the runs that were left out of it, and the paths of the
        written files, in lines. Left out are unfinished runs, and those with the config and the
        seed of another.

    Raises:
        UserError: a folder does not exist or holds no finished run, a record cannot be read, or
            `out` is an address or cannot be written.
    """
    workdir.check_no_address("--out", out)
    found, unfinished = collect(dirs)
    groups, others = once(found)
    listed = tables.of_report(dirs, found, groups)
    left_out = [f"left out, not finished: {path}" for path in unfinished]
    left_out += [f"left out, config and seed of another run: {path}" for path in others]
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for table in listed:
            written += [out / f"{table.name}.md", out / f"{table.name}.csv"]
            written[-2].write_text(table.markdown(), encoding="utf-8")
            table.write_csv(written[-1])
        drawn = figures.draw(groups, tables.metric_names(groups), out)
        written += [*drawn, out / "report.html"]
        title = f"Runs of {', '.join(map(str, dirs))}"
        html = page.page(title, [*listed[1:], listed[0]], drawn, left_out)
        written[-1].write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written: {error.strerror}") from error
    printed = listed[0].without("command").markdown()  # The longest of all, for a terminal.
    return "\n".join([printed, *left_out, *(f"wrote {path}" for path in written)])


if __name__ == "__main__":
    sys.exit(main())
