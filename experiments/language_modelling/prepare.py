"""Prepares a text for training.

python -m experiments.language_modelling.prepare NAME [--data_dir=DIR] [--manual_dir=DIR]
"""

from __future__ import annotations

import sys

from experiments.config import command_line
from experiments.language_modelling.data.prepared import PREPARED, prepare


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    parser = command_line.Parser(prog="prepare_text", description=__doc__)
    parser.add_argument("name", choices=sorted(PREPARED))
    parser.add_argument(
        "--data_dir",
        type=command_line.at_home,
        default="",
        help="output folder; default: ~/tensorflow_datasets",
    )
    parser.add_argument(
        "--manual_dir",
        type=command_line.at_home,
        default="",
        help="folder with the file, if it is already here",
    )
    args = parser.parse_args(argv)
    where = prepare(args.name, args.data_dir, args.manual_dir)
    print(f"prepared {args.name} in {where}")


if __name__ == "__main__":
    sys.exit(main())
