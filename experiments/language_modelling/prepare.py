"""Prepares a text of the paper for training.

python -m experiments.language_modelling.prepare NAME [--data_dir=DIR] [--manual_dir=DIR]
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from experiments import flags
from experiments.errors import UserError
from experiments.language_modelling.prepared import PREPARED, prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    parser = flags.Parser(prog="prepare_text", description=__doc__)
    parser.add_argument("name", choices=sorted(PREPARED))
    parser.add_argument("--data_dir", default="", help="where to; default: ~/tensorflow_datasets")
    parser.add_argument("--manual_dir", default="", help="holds the file, if it is here already")
    try:
        args = parser.parse_args(argv)
        where = prepare(args.name, args.data_dir, args.manual_dir)
    except UserError as error:
        return flags.fail(error)
    print(f"prepared {args.name} in {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
