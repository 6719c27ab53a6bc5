"""Continues a text with the model of a run, from its last checkpoint.

python -m experiments.language_modelling.generate --workdir=DIR --prompt=TEXT --tokens=N

The model runs on the forward set only, like in training and evaluation, with the memory of
evaluation. With `--params=FILE`, it runs on a file from `experiments.export` of the form `dense` or
`compact`.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments.config import command_line
from experiments.errors import UserError
from experiments.language_modelling.config import lengths
from experiments.language_modelling.data import TEXTS
from experiments.language_modelling.data.vocabulary import Vocabulary
from experiments.language_modelling.sampling import Sampling, generate
from experiments.language_modelling.task import LanguageModelling
from experiments.records import exported, files, restore, workdir
from topkast_jax import FanIn
from topkast_jax.always_sparse import by_output, is_compact
from topkast_jax.trees import flatten_with_names

# Keys that may differ between a model and the one that its parameters come from.
FREE = ("dropout", "dropatt", "dtype", "remat", "train", "evaluation")


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    args = _parser().parse_args(argv)
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    params = None if args.params is None else Path(args.params)
    text = continuation(
        files.path(args.workdir), args.prompt, args.tokens, sampling, args.seed, params
    )
    print(text)


def continuation(
    directory: Path,
    prompt: str,
    tokens: int,
    sampling: Sampling,
    seed: int,
    params: Path | None = None,
) -> str:
    """The prompt, continued by the model of a run.

    Args:
      directory: the folder of the run.
      prompt: the beginning of the text, at least one symbol.
      tokens: the number of tokens to add.
      sampling: how tokens are drawn.
      seed: the seed of the draws.
      params: a file from `experiments.export` that replaces the newest parameters of the run.
    """
    found = restore.read(directory, "language_modelling")
    program, state = found.program, found.state
    assert isinstance(program.task, LanguageModelling)
    if params is None:
        alpha = program.view(state.params, state.opt_state)
    else:
        alpha = read_params(params, found.config, program.task.model.abstract_params)
    vocabulary = _vocabulary(found.config, found.hosts[0]["data"]["text"])
    numbers = encode_prompt(vocabulary, prompt)
    reach = lengths(found.config, "evaluation")
    model = program.task.model
    alpha = for_few_tokens(alpha, getattr(model, "linear", None))
    drawn = generate(model, alpha, reach, numbers, tokens, sampling, seed)
    return vocabulary.decode([*numbers, *drawn])


def for_few_tokens(params: Any, linear: str | None) -> Any:
    """Kernels of constant fan-in, ordered by output for few tokens, where `linear` matches."""

    def of_leaf(name: str, leaf: Any) -> Any:
        ordered = is_compact(leaf) and isinstance(leaf.pattern, FanIn)
        return by_output(leaf) if ordered and linear and re.fullmatch(linear, name) else leaf

    names, leaves, treedef = flatten_with_names(params, is_leaf=is_compact)
    return treedef.unflatten(map(of_leaf, names, leaves))


def read_params(path: Path, config: ConfigDict, like: Any) -> Any:
    """Reads the parameters in an exported file.

    Args:
      path: the path of the file.
      config: the config of the run whose model will run on the parameters.
      like: the parameters of that model, perhaps abstract.

    Raises:
      UserError: the file cannot be read, has another form, or belongs to another model.
    """
    try:
        # An entry of a leaf takes at most a value and an index of 8 bytes each.
        entries = sum(math.prod(shape) for shape in _shapes(like).values())
        tree, metadata = exported.load(path, at_most=16 * entries + 2**20)
        theirs = _what_fits(metadata["config"])
    except UserError as error:
        raise UserError(f"--params={error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--params={path}: its config is of no run: {error!r}") from error
    if metadata["form"] not in ("dense", "compact"):
        raise UserError(
            f"--params={path}: holds form {metadata['form']!r}; must be 'dense' or 'compact'"
        )
    for found, needed in (
        (theirs, _what_fits(workdir.as_json(config))),
        (_shapes(tree), _shapes(like)),
    ):
        different = [k for k in needed | found if found.get(k) != needed.get(k)]
        if different:
            key = different[0]
            raise UserError(
                f"--params={path}: of another model: {key} is {found.get(key)!r} there and "
                f"{needed.get(key)!r} in the run"
            )
    for name, leaf in zip(*flatten_with_names(tree)[:2], strict=True):
        if leaf.dtype.kind not in "fiu" or not np.isfinite(leaf).all():
            raise UserError(f"--params={path}: {name} holds what is no finite number")
    return jax.tree.map(jnp.asarray, tree)


def _what_fits(config: Any) -> dict[str, Any]:
    """The values that must agree if one config's model runs on the other's parameters."""
    config = dict(config)
    if config["task"] != "language_modelling":
        return {"task": config["task"]}
    model, data = dict(config["model"]), dict(config["data"])
    fits = {key: value for key, value in model.items() if key not in FREE}
    fits |= {key: data[key] for key in ("vocabulary", "vocabulary_size")}
    return {"task": config["task"]} | fits


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """The dense shapes of parameters by name."""
    names, leaves, _ = flatten_with_names(params, is_leaf=is_compact)
    return {
        name: (*leaf.index.shape[:-1], *leaf.shape) if is_compact(leaf) else leaf.shape
        for name, leaf in zip(names, leaves, strict=True)
    }


def encode_prompt(vocabulary: Vocabulary, prompt: str) -> list[int]:
    """The numbers of the symbols of a prompt. A prompt of words does not end its last line."""
    try:
        text = prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt: found what is no UTF-8; must be text") from None
    if unknown := vocabulary.unknown(text):
        listed = [f"{ord(s):#04x}" if vocabulary.level == "byte" else repr(s) for s in unknown]
        raise UserError(f"--prompt: not in the vocabulary of the run: {', '.join(listed)}")
    numbers = vocabulary.encode(text).tolist()
    if vocabulary.level == "word" and not prompt.endswith("\n"):
        numbers = numbers[:-1]
    if not numbers:
        raise UserError("--prompt: empty; must hold one symbol at least")
    return list(numbers)


def _vocabulary(config: ConfigDict, text: dict[str, Any]) -> Vocabulary:
    """The vocabulary in the checkpoint, or that of the prepared data if it is large."""
    if text["symbols"] is not None:
        where = f"config.data.level={config.data.level!r}"
        found = Vocabulary(config.data.level, tuple(text["symbols"]))
    else:
        where = f"config.data.dir={config.data.dir!r}"
        found = TEXTS.get(config.data.name)(config.data).open().vocabulary
    if found.fingerprint != text["vocabulary"]:
        raise UserError(
            f"{where}: its vocabulary is {found.fingerprint}, the checkpoint's is "
            f"{text['vocabulary']}"
        )
    return found


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="experiments.language_modelling.generate", description=__doc__
    )
    parser.add_argument("--workdir", type=command_line.path, required=True, help="the run's folder")
    parser.add_argument("--prompt", required=True, help="what the text begins with")
    parser.add_argument(
        "--tokens", required=True, type=command_line.positive, help="how many to add"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0: most probable token")
    parser.add_argument("--top_k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=1.0, help="share of the probability")
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--params", type=command_line.path, help="a file from experiments.export")
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"found {text!r}; must be an integer, 0 to {2**32 - 1}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
