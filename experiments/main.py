"""Trains what a config describes, or goes on with it.

python -m experiments.main --config=configs/NAME.py:VARIANT --workdir=DIR [--config.KEY=VALUE …]
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments import flags
from experiments.config import resolve
from experiments.errors import UserError
from experiments.loop import train
from topkast_jax import SparsityError

ENDS = {
    "finished": "finished: {0}/final.json",
    "stopped": "stopped with a checkpoint in {0}; the same command goes on",
    "finished before": "nothing to do: {0} holds the finished run (final.json)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        args, overrides = flags.parse(_parser(), sys.argv[1:] if argv is None else argv)
        if args.distributed:
            jax.distributed.initialize()
        outcome = train(resolve(args.config, overrides), Path(args.workdir), args.stop_at)
    except (UserError, SparsityError) as error:
        return flags.fail(error)
    print(ENDS[outcome].format(args.workdir))
    return 0


def _parser() -> flags.Parser:
    parser = flags.Parser(prog="experiments.main", description=__doc__)
    parser.add_argument("--config", required=True, help="path/to/NAME.py:VARIANT")
    parser.add_argument("--workdir", required=True, help="the run's own folder")
    parser.add_argument("--stop_at", type=flags.positive, help="stop after so many steps")
    parser.add_argument("--distributed", action="store_true", help="one process of several hosts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
