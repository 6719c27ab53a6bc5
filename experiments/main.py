"""Trains what a config describes, or continues its run.

python -m experiments.main --config=configs/NAME.py:VARIANT --workdir=DIR [--config.KEY=VALUE …]
python -m experiments.main --config=configs/NAME.py:VARIANT --describe [--config.KEY=VALUE …]

The second form trains nothing. It prints which leaves are sparse, at which densities, and ends with
a line of JSON: the parameters, and the FLOPs as shares of those of the dense network.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from experiments.config import command_line, resolve
from experiments.loop import train
from experiments.records import summary
from experiments.task import make_task
from experiments.training import optimizers
from experiments.training.state import abstract_params

ENDS = {
    "finished": "finished: {0}/final.json",
    "stopped": "stopped with a checkpoint in {0}; the same command goes on",
    "finished before": "nothing to do: {0} holds the finished run (final.json)",
}


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    args, overrides = command_line.parse(_parser("--describe" in argv), argv)
    if args.describe:
        describe(resolve(args.config, overrides))
        return
    if args.distributed:
        jax.distributed.initialize()
    outcome = train(resolve(args.config, overrides), Path(args.workdir), args.stop_at, args.profile)
    print(ENDS[outcome].format(args.workdir))


def describe(config: ConfigDict) -> None:
    """Prints what a run of this config would be, from shapes alone, if its method can train it."""
    task = make_task(config)
    optimizers.check(config, abstract_params(task))
    print(summary.leaf_table(config, task))
    print(json.dumps(summary.description(config, task)))


def _parser(describes: bool) -> command_line.Parser:
    parser = command_line.Parser(prog="experiments.main", description=__doc__)
    parser.add_argument("--config", required=True, help="path/to/NAME.py:VARIANT")
    parser.add_argument(
        "--workdir", type=command_line.path, required=not describes, help="the run's own folder"
    )
    parser.add_argument(
        "--describe", action="store_true", help="print which leaves are sparse, and train nothing"
    )
    parser.add_argument("--stop_at", type=command_line.positive, help="stop after so many steps")
    parser.add_argument(
        "--profile", type=command_line.steps, help="START:STOP: trace these steps for TensorBoard"
    )
    parser.add_argument("--distributed", action="store_true", help="one process of several hosts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
