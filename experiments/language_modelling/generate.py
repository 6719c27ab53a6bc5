"""Goes on with a text, from the last checkpoint of a run.

python -m experiments.language_modelling.generate --workdir=DIR --prompt=TEXT --tokens=N

It runs on the forward set alone, as training and evaluation do, with the memory of evaluation.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import checkpoints, flags, workdir
from experiments.errors import UserError
from experiments.language_modelling import options
from experiments.language_modelling.sampling import Sampling, generate
from experiments.language_modelling.task import LanguageModelling
from experiments.language_modelling.vocabulary import Vocabulary
from experiments.run import build
from topkast_jax import SparsityError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        args = _parser().parse_args(argv)
        sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        text = continuation(Path(args.workdir), args.prompt, args.tokens, sampling, args.seed)
    except (UserError, SparsityError) as error:
        return flags.fail(error)
    print(text)
    return 0


def continuation(directory: Path, prompt: str, tokens: int, sampling: Sampling, seed: int) -> str:
    """The prompt and what the model of a run makes of it.

    Args:
      directory: of the run.
      prompt: one symbol at least.
      tokens: how many to add.
      sampling: how they are drawn.
      seed: of the draws.
    """
    config = saved_config(directory)
    run = build(config, jax.devices()[:1])
    assert isinstance(run.task, LanguageModelling)
    state, meta = checkpoints.load(directory / workdir.CHECKPOINTS, run.form.abstract)
    alpha = run.view(state.params, state.opt_state)
    vocabulary = _vocabulary(config, meta["data"]["text"])
    numbers = encode_prompt(vocabulary, prompt)
    lengths = options.lengths(config, "evaluation")
    found = generate(run.task.model, alpha, lengths, numbers, tokens, sampling, seed)
    return vocabulary.decode([*numbers, *found])


def saved_config(directory: Path) -> ConfigDict:
    """The config of a language run, to be run on one device."""
    if not (directory / workdir.CONFIG).is_file():
        raise UserError(f"--workdir={directory}: holds no {workdir.CONFIG}; must be a run's folder")
    config = ConfigDict(workdir.read_json(directory / workdir.CONFIG))
    if config.get("task") != "language_modelling":
        raise UserError(f"--workdir={directory}: holds a run of task {config.get('task')!r}")
    config.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    return config


def encode_prompt(vocabulary: Vocabulary, prompt: str) -> list[int]:
    """The numbers of a prompt's symbols; of words, the last line is not ended."""
    try:
        numbers = vocabulary.encode(prompt.encode()).tolist()
    except UnicodeEncodeError:
        raise UserError("--prompt: found what is no UTF-8; must be text") from None
    except KeyError as error:
        raise UserError(f"--prompt: {error.args[0]!r} is not in the vocabulary") from None
    if vocabulary.level == "word" and not prompt.endswith("\n"):
        numbers = numbers[:-1]
    if not numbers:
        raise UserError("--prompt: empty; must hold one symbol at least")
    return list(numbers)


def _vocabulary(config: ConfigDict, text: dict[str, Any]) -> Vocabulary:
    """Out of the checkpoint, or, where it is large, out of the prepared data."""
    if text["symbols"] is not None:
        return Vocabulary(config.data.level, tuple(text["symbols"]))
    found = options.open_corpus(config.data).vocabulary
    if found.fingerprint != text["vocabulary"]:
        raise UserError(
            f"config.data.dir={config.data.dir!r}: its vocabulary is {found.fingerprint}, "
            f"the checkpoint's is {text['vocabulary']}"
        )
    return found


def _parser() -> flags.Parser:
    parser = flags.Parser(prog="experiments.language_modelling.generate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="the run's folder")
    parser.add_argument("--prompt", required=True, help="what the text begins with")
    parser.add_argument("--tokens", required=True, type=flags.positive, help="how many to add")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: most probable token")
    parser.add_argument("--top_k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--top_p", type=float, default=1.0, help="share of the probability")
    parser.add_argument("--seed", type=_seed, default=0)
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"found {text!r}; must be an integer, 0 to {2**32 - 1}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
