"""The sections `model` and `data` of the config: their defaults and rules."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from experiments.config.checks import check_unread, check_values, integer, one_of, optional
from experiments.errors import UserError, warn
from experiments.language_modelling.data import TEXTS
from experiments.language_modelling.data.corpus import SPLITS, Corpus
from experiments.language_modelling.data.vocabulary import LEVELS
from experiments.language_modelling.models import MODELS, Model
from experiments.language_modelling.models.narrow import for_stacked_layers
from experiments.language_modelling.models.settings import Lengths
from topkast_jax.trees import flatten_with_names

_CHECKS = {
    "data.level": one_of(*LEVELS),
    "data.eval_split": one_of(*SPLITS[1:]),
    "data.min_count": integer(1),
    "data.eval_batch_size": integer(1),
    **{f"model.{key}": integer(1) for key in ("n_layer", "n_head", "d_model", "d_head", "d_inner")},
    "model.d_embed": optional(integer(1)),
}
# The keys of the section `data` that name files, by the texts that read them.
_FILES = {"python_docs": (), "text_file": ("file",), "enwik8": ("dir",), "wikitext103": ("dir",)}


def default_config() -> ConfigDict:
    """A small byte-level model of Python's own documentation."""
    lengths = {"target": 64, "memory": 64, "clamp": -1, "same_length": False}
    return ConfigDict(
        {
            "model": {
                "name": "transformer_xl",  # See `models`.
                # Sizes and options as in `models.settings.TransformerXLConfig`.
                "n_layer": 2,
                "n_head": 2,
                "d_model": 64,
                "d_head": 32,
                "d_inner": 128,
                "d_embed": None,  # None stands for d_model.
                "cutoffs": (),
                "div_val": 1,
                "tie_weight": True,
                "tie_projs": (),
                "untie_r": False,
                "pre_lnorm": False,
                "dropout": 0.0,
                "dropatt": 0.0,
                "dtype": "float32",  # That of activations; parameters stay float32.
                "remat": False,
                "scan": False,
                # Makes the model narrower, with as many parameters as a sparse model of the sizes
                # above runs on, if these rules (as in `method`) and this density make it sparse.
                "small_dense": {"forward_density": 1.0, "rules": ()},
                # How far the model looks back; see `models.settings.Lengths`.
                "train": dict(lengths),
                "evaluation": dict(lengths),
            },
            "data": {
                "name": "python_docs",  # See `data`.
                "file": "",  # The raw text of text_file: a plain, .xz, .gz or .zip file.
                "dir": "",  # The folder where enwik8 and wikitext103 were prepared.
                "level": "byte",  # Or character, or word.
                "min_count": 1,  # Symbols that are rarer in the training part are <unk>.
                "eval_batch_size": 16,  # The number of lanes; the result does not depend on it.
                "eval_split": "validation",  # Or "test", for evaluation on the test part only.
                # These are found in the data. A value given here must agree with the data.
                "vocabulary_size": 0,
                "vocabulary": "",
            },
        }
    )


def validate(config: ConfigDict) -> None:
    """Checks the two sections, and fills in what the data decides.

    Raises:
      UserError: names the key, what was found and what is allowed.
    """
    check_values(config, _CHECKS)
    check_unread(config.data, _FILES, ("file", "dir"))
    lengths(config, "train")
    lengths(config, "evaluation")
    text = TEXTS.get(config.data.name)(config.data)
    if text.known is None:
        corpus = text.open()
        _fill_in(config.data, _vocabulary_of(config.data, corpus))
        check_lengths(config, corpus)
    else:
        if config.data.min_count != 1:
            raise UserError(
                f"config.data.min_count: found {config.data.min_count}; must be 1, because "
                f"{config.data.name} was prepared with all of its symbols"
            )
        level, size = text.known
        _fill_in(config.data, {"level": level, "vocabulary_size": size})
    _fit_clusters(config.model, config.data.vocabulary_size)
    model = make_model(config)
    if model.stacked and config.method.name != "dense":
        config.method.rules = _stacked(config.method.get("rules"), model)


def make_model(config: ConfigDict) -> Model:
    """The model of a config."""
    return MODELS.get(config.model.name)(config.model, config.data.vocabulary_size)


def lengths(config: ConfigDict, which: str) -> Lengths:
    """How far the model looks back in "train" or "evaluation"."""
    try:
        return Lengths(**config.model[which])
    except UserError as error:
        text = str(error).replace("lengths.", f"config.model.{which}.")
        raise UserError(text) from None


def check_lengths(config: ConfigDict, corpus: Corpus) -> None:
    """Checks that the text is long enough for the segments and lanes.

    Raises:
      UserError: the text is too short.
    """
    sizes = {split: len(tokens) for split, tokens in corpus.splits.items()}
    target, lanes = config.model.train.target, config.batch_size
    for key, longest, splits in (
        ("train", target, ("train",)),
        ("evaluation", config.model.evaluation.target, ("validation", "test")),
    ):
        for split in splits:
            if longest >= sizes[split]:
                raise UserError(
                    f"config.model.{key}.target={longest}: beyond the data; the {split} part of "
                    f"{corpus.name} has {sizes[split]} tokens, so at most {sizes[split] - 1}"
                )
    if sizes["train"] < lanes * (target + 1):
        raise UserError(
            f"config.batch_size={lanes}: too few tokens; {lanes} lanes of {target} + 1 tokens "
            f"need {lanes * (target + 1)}, {corpus.name} has {sizes['train']} to train on"
        )


def _vocabulary_of(data: ConfigDict, corpus: Corpus) -> dict[str, Any]:
    vocabulary = corpus.vocabulary
    if (left := vocabulary.of_text) < 2:
        symbols = f"{left} symbol{'' if left == 1 else 's'}"
        if data.min_count == 1:
            raise UserError(
                f"config.data.name: found {data.name!r}; {corpus.name} has {symbols} to train on; "
                "must have 2 at least"
            )
        raise UserError(
            f"config.data.min_count: found {data.min_count}, which leaves {symbols} of "
            f"{corpus.name}; must leave 2 at least"
        )
    return {"vocabulary_size": len(vocabulary), "vocabulary": vocabulary.fingerprint}


def _fill_in(data: ConfigDict, found: dict[str, Any]) -> None:
    for key, value in found.items():
        if data[key] not in (value, 0, ""):
            raise UserError(f"config.data.{key}: found {data[key]!r}; {data.name} has {value!r}")
        data[key] = value


def _fit_clusters(model: ConfigDict, vocabulary_size: int) -> None:
    """Leaves out the last clusters that would begin beyond the vocabulary, and so be empty."""
    if model.name != "transformer_xl":  # The section of an own model has keys of its own.
        return
    cutoffs = list(model.cutoffs)
    while cutoffs and type(cutoffs[-1]) is int and cutoffs[-1] >= vocabulary_size:
        cutoffs.pop()
    if len(cutoffs) < len(model.cutoffs):
        begin = f"the clusters begin at {cutoffs}" if cutoffs else "there is one cluster"
        warn(
            f"config.model.cutoffs={list(model.cutoffs)}: the vocabulary has {vocabulary_size:,} "
            f"tokens, so {begin}"
        )
        model.cutoffs = tuple(cutoffs)
        model.tie_projs = tuple(model.tie_projs)[: len(cutoffs) + 1]


def _stacked(rules: Any, model: Model) -> Any:
    if rules is None:
        raise UserError(
            "config.method.rules: found None; with config.model.scan=True it must name what is "
            "sparse, for stacked vectors look like matrices"
        )
    names, _, _ = flatten_with_names(model.abstract_params)
    return for_stacked_layers(rules, names, model.stacked)


def shrink_to_smoke(config: ConfigDict) -> None:
    """Shrinks a config to a few steps of a tiny model on Python's documentation."""
    config.steps = 3
    config.batch_size = 8
    config.log_every = 1
    config.eval_every = 0
    config.checkpoint_every = 0
    config.optimizer.schedule.warmup_steps = min(1, config.optimizer.schedule.warmup_steps)
    config.method.refresh_every = 2
    for key, size in (
        ("n_layer", 2), ("n_head", 2), ("d_model", 64), ("d_head", 16), ("d_inner", 64)
    ):  # fmt: skip
        config.model[key] = size
    for which in ("train", "evaluation"):
        config.model[which].target = 32
        config.model[which].memory = 32
    if config.model.cutoffs:
        config.model.cutoffs = (100, 300, 1_000)
    config.data.name = "python_docs"
    config.data.eval_batch_size = 16
