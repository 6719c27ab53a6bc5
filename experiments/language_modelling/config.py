"""The sections `model` and `data` of the config: defaults, rules, and what they name."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from experiments.config import apply_variant as apply_common
from experiments.errors import UserError
from experiments.language_modelling.data import corpus as corpora
from experiments.language_modelling.data.corpus import Corpus
from experiments.language_modelling.data.prepared import PREPARED, open_prepared
from experiments.language_modelling.data.vocabulary import LEVELS
from experiments.language_modelling.models.narrow import (
    active_parameters,
    for_stacked_layers,
    narrowed,
)
from experiments.language_modelling.models.settings import Lengths, TransformerXLConfig
from experiments.language_modelling.models.transformer_xl import LanguageModel
from topkast_jax.trees import flatten_with_names

OWN = ("text_file", "python_docs")
DATASETS = (*OWN, *PREPARED)
SMALL_DENSE = "small-dense-"
_SIZES = tuple(field.name for field in dataclasses.fields(TransformerXLConfig))


def default_config() -> ConfigDict:
    """A small byte-level model of Python's own documentation."""
    lengths = {"target": 64, "memory": 64, "clamp": -1, "same_length": False}
    return ConfigDict(
        {
            # Sizes and options as in `settings.TransformerXLConfig`.
            "model": {
                "n_layer": 2,
                "n_head": 2,
                "d_model": 64,
                "d_head": 32,
                "d_inner": 128,
                "d_embed": None,  # None: d_model
                "cutoffs": (),
                "div_val": 1,
                "tie_weight": True,
                "tie_projs": (),
                "untie_r": False,
                "pre_lnorm": False,
                "dropout": 0.0,
                "dropatt": 0.0,
                "dtype": "float32",  # of activations; parameters stay float32
                "remat": False,
                "scan": False,
                # Narrower, so as to have the parameters that a sparse model of the sizes above
                # runs on: what these rules (as in `method`) make sparse, at this density.
                "small_dense": {"forward_density": 1.0, "rules": ()},
                # How far it looks; see `settings.Lengths`.
                "train": dict(lengths),
                "evaluation": dict(lengths),
            },
            "data": {
                "name": "python_docs",
                "file": "",  # text_file: raw text, plain, .xz or .zip
                "dir": "",  # enwik8, wikitext103: where they were prepared
                "level": "byte",  # or character, or word
                "min_count": 1,  # of a symbol in the training part; rarer ones are <unk>
                "eval_batch_size": 16,  # lanes; the result does not depend on it
                "eval_split": "validation",  # besides the test part; "test" for that alone
                # Found in the data; a value given here must be what is found.
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
    data = config.data
    for key, value, allowed in (
        ("data.name", data.name, DATASETS),
        ("data.level", data.level, LEVELS),
        ("data.eval_split", data.eval_split, corpora.SPLITS[1:]),
    ):
        if value not in allowed:
            raise UserError(f"config.{key}={value!r}: allowed are {', '.join(allowed)}")
    for key in ("min_count", "eval_batch_size"):
        if data[key] < 1:
            raise UserError(f"config.data.{key}={data[key]}: must be at least 1")
    if not 0 < config.model.small_dense.forward_density <= 1:
        found = config.model.small_dense.forward_density
        raise UserError(f"config.model.small_dense.forward_density={found}: must be in (0, 1]")
    lengths(config, "train")
    lengths(config, "evaluation")
    _find_vocabulary(data)
    if data.name in OWN:
        check_lengths(config, open_own(data))
    full = transformer_config(config)
    if full.scan and "rules" in config.method:
        config.method.rules = _stacked(config.method.rules, full)


def lengths(config: ConfigDict, which: str) -> Lengths:
    """How far the model looks in "train" or "evaluation"."""
    try:
        return Lengths(**config.model[which])
    except UserError as error:
        text = str(error).replace("lengths.", f"config.model.{which}.")
        raise UserError(text) from None


def transformer_config(config: ConfigDict) -> TransformerXLConfig:
    """The model, narrowed if it is to be a small dense one."""
    sizes = {k: v for k, v in config.model.items() if k in _SIZES}
    for key in ("cutoffs", "tie_projs"):
        sizes[key] = tuple(sizes[key])
    try:
        full = TransformerXLConfig(n_token=config.data.vocabulary_size, **sizes)
    except UserError as error:
        raise UserError(f"config.model: {error}") from None
    small = config.model.small_dense
    if small.forward_density == 1.0:
        return full
    return narrowed(full, active_parameters(full, small.rules, small.forward_density))


def open_own(data: ConfigDict) -> Corpus:
    """The text of a config that needs no preparation."""
    if data.name == "python_docs":
        return corpora.python_docs(data.level, data.min_count)
    return corpora.text_file(data.file, data.level, data.min_count)


def open_corpus(data: ConfigDict) -> Corpus:
    """The text of a config."""
    return open_own(data) if data.name in OWN else open_prepared(data.name, data.dir)


def check_lengths(config: ConfigDict, corpus: Corpus) -> None:
    """Checks that segments and lanes fit the text.

    Raises:
      UserError: it is too short.
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


def _find_vocabulary(data: ConfigDict) -> None:
    if data.name in PREPARED:
        level, size = PREPARED[data.name]
        found: dict[str, Any] = {"level": level, "vocabulary_size": size}
    else:
        vocabulary = open_own(data).vocabulary
        if len(vocabulary) < 2:
            raise UserError(
                f"config.data.min_count={data.min_count}: leaves {len(vocabulary)} symbol of "
                f"{data.name}; must leave 2 at least"
            )
        found = {"vocabulary_size": len(vocabulary), "vocabulary": vocabulary.fingerprint}
    for key, value in found.items():
        if data[key] not in (value, 0, ""):
            raise UserError(f"config.data.{key}={data[key]!r}: {data.name} has {value!r}")
        data[key] = value


def _stacked(rules: Any, model: TransformerXLConfig) -> Any:
    if rules is None:
        raise UserError(
            "config.method.rules=None: with config.model.scan=True it must name what is sparse, "
            "for stacked vectors look like matrices"
        )
    names, _, _ = flatten_with_names(LanguageModel(model).abstract_params)
    return for_stacked_layers(rules, names)


def apply_variant(config: ConfigDict, variant: str) -> bool:
    """Sets the method from a variant.

    Args:
      config: changed in place.
      variant: as for `experiments.config.apply_variant`, and `small-dense-F`: dense, of the same
        depth, narrower, with the parameters that a model of F % sparsity by `method.rules` runs on.

    Returns:
      Whether it is a smoke test.
    """
    words = [word.strip() for word in variant.split(",")]
    common = [word for word in words if not word.startswith(SMALL_DENSE)]
    flags = apply_common(config, ",".join(common), flags=("smoke", f"{SMALL_DENSE}F"))
    for word in words:
        if word.startswith(SMALL_DENSE):
            config.method.name = "dense"
            config.model.small_dense.rules = config.method.rules
            config.model.small_dense.forward_density = _small_dense_density(word)
    return "smoke" in flags


def _small_dense_density(word: str) -> float:
    try:
        density = round(1 - float(word.removeprefix(SMALL_DENSE)) / 100, 9)
    except ValueError:
        density = 0.0
    if not 0 < density <= 1:
        raise UserError(f"variant {word!r}: F must be a sparsity in %, 0 to below 100")
    return density


def shrink_to_smoke(config: ConfigDict) -> None:
    """A few steps of a tiny model on Python's own documentation; options stay as they are."""
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
