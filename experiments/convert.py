"""Turns a run under masks into an always-sparse run that continues from there, or back.

python -m experiments.convert --workdir=DIR --out=NEW_DIR --to=always_sparse|masked

The new folder is written completely or not at all. It holds the newest checkpoint, the records and
the config in the other representation. The command of the first run continues the new one. Towards
always sparse, add `--config.method.always_sparse=True` and leave out `--config.method.inner_state`,
which only masked runs read. Towards masks, add `--config.method.inner_state=reset` and leave out
the keys that only always-sparse runs read (`always_sparse`, `refresh_delay`, `backend`). A masked
run may keep moments outside the backward set; they are dropped on the way to always sparse.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.config import command_line
from experiments.errors import UserError
from experiments.records import files, restore, workdir
from experiments.records.checkpoints import Checkpoints, Kept, meta_of
from experiments.training.methods import representation
from experiments.training.partition import all_devices
from experiments.training.program import build
from experiments.training.state import TrainState


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    args = _parser().parse_args(argv)
    step = convert(files.path(args.workdir), Path(args.out), args.to)
    print(f"step {step} of {args.workdir} is in {args.out}, {args.to}")


def convert(directory: Path, out: Path, to: str) -> int:
    """Writes the newest state of a run to a new folder in the other representation.

    Args:
        directory: the folder of the run.
        out: a new or an empty folder.
        to: "masked" or "always_sparse".

    Returns:
        The step of that state.

    Raises:
        UserError: there is no run in `directory`, its checkpoints are damaged, it already has the
            representation, `out` is not new or cannot be written, or the state of the optimizer has
            no such representation.
        SparsityError: the method or its optimizer has no such representation.
    """
    config = restore.read_config(directory)
    twin_config = restore.with_representation(config, to)
    if representation(config.method) == to:
        raise UserError(f"--to={to}: the run in {directory} is that already")
    workdir.check_no_address("--out", out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out}: exists; must be a new or an empty folder")
    found = restore.read(directory)
    meta = meta_of(found.hosts, 0, 1)
    twin = build(restore.on_one_device(twin_config), all_devices()[:1]).representation
    state = twin.from_masked(found.program.representation.to_masked(found.state))
    _check_shapes(twin.abstract(int(state.step)), state)
    with workdir.whole(out) as unfinished:
        unfinished.mkdir(parents=True)
        _write(unfinished, twin_config, state, meta)
        if (directory / workdir.METRICS).exists():
            records = (directory / workdir.METRICS).read_bytes()
            (unfinished / workdir.METRICS).write_bytes(records)
        if (directory / workdir.SETS).exists():
            (unfinished / workdir.SETS).mkdir()
            for path in (directory / workdir.SETS).iterdir():
                (unfinished / workdir.SETS / path.name).write_bytes(path.read_bytes())
    return int(state.step)


def _write(directory: Path, config: ConfigDict, state: TrainState, meta: dict[str, Any]) -> None:
    workdir.write_json(directory / workdir.CONFIG, workdir.as_json(config))
    store = Checkpoints(directory / workdir.CHECKPOINTS, Kept(last=1))
    try:
        store.save(int(state.step), state, meta)
    finally:
        store.close()


def _check_shapes(abstract: TrainState, state: TrainState) -> None:
    for (path, expected), found in zip(
        jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(state), strict=True
    ):
        if expected.shape != found.shape:
            raise UserError(
                f"config.optimizer.name: its state at {jax.tree_util.keystr(path)} has shape "
                f"{found.shape} and would need {expected.shape}: it has no other representation"
            )


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="experiments.convert", description=__doc__)
    parser.add_argument("--workdir", type=command_line.path, required=True, help="the run's folder")
    parser.add_argument("--out", type=command_line.path, required=True, help="a new folder")
    parser.add_argument("--to", required=True, choices=("masked", "always_sparse"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
