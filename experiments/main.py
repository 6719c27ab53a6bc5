"""Trains what a config describes, or continues its run.

python -m experiments.main --config=configs/NAME.py:VARIANT --workdir=DIR [--config.KEY=VALUE …]
python -m experiments.main --config=configs/NAME.py:VARIANT --describe [--config.KEY=VALUE …]

The second form trains nothing. It prints which leaves are sparse, at which densities, and ends with
a line of JSON: the parameters, and the FLOPs as shares of those of the dense network.

The exit status is 0 for a run that finished or stopped as asked; 1 for an exception with a
traceback; 2 for a mistake in the command, the config or the data; 75 if SIGTERM, SIGINT, SIGHUP or
a notice of preemption ended the run; 76 if another process of the run was lost or is missing; 141
if the program that reads the output has ended. After 75 and 76, the same command continues the run.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from experiments import signals

    signals.end_at_once()  # What is imported below takes seconds.

import contextlib
import json

from ml_collections import ConfigDict

from experiments import hosts
from experiments.config import command_line, resolve
from experiments.errors import UserError
from experiments.loop import train
from experiments.records import files, summary
from experiments.signals import RESUMABLE
from experiments.task import make_task
from experiments.training import optimizers
from experiments.training.partition import all_devices
from experiments.training.state import abstract_params
from topkast_jax import host_memory

ENDS = {
    "finished": "finished: {0}/final.json",
    "stopped": "stopped with a checkpoint in {0}; the same command goes on",
    "interrupted": "stopped by a signal; the same command goes on from the last step in {0}",
    "finished before": "nothing to do: {0} holds the finished run (final.json)",
}


@command_line.command
def main(argv: list[str]) -> int:
    """Runs the command line."""
    args, overrides = command_line.parse(_parser("--describe" in argv), argv)
    hosts.check_flags(args)
    if args.describe:
        for name in ("workdir", "stop_at", "profile", "distributed"):
            if getattr(args, name):
                raise UserError(f"--{name}: found with --describe, which trains nothing")
        describe(resolve(args.config, overrides))
        return 0
    directory = files.path(args.workdir)
    if args.distributed and not hosts.watched():
        return hosts.watch(argv, args)
    with hosts.member(args) if args.distributed else contextlib.nullcontext():
        config = resolve(args.config, overrides)
        if __name__ == "__main__" and all_devices()[0].platform == "cpu":
            host_memory.keep_freed()  # A setting of the process: not that of another program.
        outcome = train(config, directory, args.stop_at, args.profile)
    print(ENDS[outcome].format(args.workdir))
    return RESUMABLE if outcome == "interrupted" else 0


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
    hosts.add_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
