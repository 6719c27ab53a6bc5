"""Writes the parameters that a trained network runs on, its forward set, to one file.

python -m experiments.export --workdir=DIR --out=FILE.safetensors|FILE.npz
    [--form=dense|compact|bcoo|bsr]

`experiments.records.exported` describes the file; its `load` reads every form back.
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.config import command_line
from experiments.records import exported, files, restore, workdir
from topkast_jax.always_sparse import FORMS


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    args = _parser().parse_args(argv)
    form, size = write(files.path(args.workdir), Path(args.out), args.form)
    print(f"{args.out}: {form}, {size} bytes")


def write(directory: Path, out: Path, form: str) -> tuple[str, int]:
    """Exports the newest state of a run.

    Args:
        directory: the folder of the run.
        out: a new file whose name ends in .safetensors or .npz.
        form: one of `topkast_jax.always_sparse.FORMS`, for the sparse leaves.

    Returns:
        The form, which is "dense" for a dense run, and the size of the file in bytes.

    Raises:
        UserError: there is no run in `directory`, its checkpoints are damaged, or `out` exists, has
            another ending or cannot be written.
    """
    exported.check_path(out)
    found = restore.read(directory)
    form, tree = found.program.representation.export(found.state, form)
    task, model_state = found.program.task, found.state.model_state
    # A state with which evaluation starts belongs to the network; one that it replaces does not.
    belongs = task.eval_state(model_state, task.test_split) is model_state
    config = workdir.as_json(found.config)
    exported.save(out, tree, form, config, model_state if belongs else None)
    return form, out.stat().st_size


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="experiments.export", description=__doc__)
    parser.add_argument("--workdir", type=command_line.path, required=True, help="the run's folder")
    parser.add_argument("--out", type=command_line.path, required=True, help="a new file")
    parser.add_argument("--form", default="compact", choices=FORMS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
