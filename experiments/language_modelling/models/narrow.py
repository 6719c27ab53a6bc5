"""Narrow dense models with the size of a sparse one, and sparsity rules for stacked layers."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

import topkast_jax as tk
from experiments.config.checks import check_values, number
from experiments.errors import UserError
from experiments.language_modelling.models.settings import TransformerXLConfig
from experiments.language_modelling.models.transformer_xl import LanguageModel
from experiments.training.methods import read_rules
from topkast_jax import rules as tk_rules
from topkast_jax.trees import flatten_with_names

Rules = Sequence[tuple[str, Any]]
_SIZES = tuple(field.name for field in dataclasses.fields(TransformerXLConfig))


def transformer_config(model: ConfigDict, vocabulary_size: int) -> TransformerXLConfig:
    """The settings of a config's model, narrowed if it is to be a small dense one."""
    sizes = {k: v for k, v in model.items() if k in _SIZES}
    for key in ("cutoffs", "tie_projs"):
        sizes[key] = tuple(sizes[key])
    try:
        full = TransformerXLConfig(n_token=vocabulary_size, **sizes)
    except UserError as error:
        raise UserError(f"config.model: {error}") from None
    small = model.small_dense
    check_values(
        model, {"small_dense.forward_density": number(0, 1, above=True)}, prefix="config.model"
    )
    if small.forward_density == 1.0:
        return full
    return narrowed(full, active_parameters(full, small.rules, small.forward_density))


def parameters(config: TransformerXLConfig) -> int:
    """The number of parameters."""
    _, leaves = _abstract(config)
    return sum(math.prod(leaf.shape) for leaf in leaves)


def active_parameters(config: TransformerXLConfig, rules: Rules, density: float) -> int:
    """The number of parameters in the forward set, if the rules say what is sparse."""
    names, leaves = _abstract(config)
    specs = read_rules(
        for_stacked_layers(
            rules, names, LanguageModel(dataclasses.replace(config, scan=True)).stacked
        )
    )
    tree = dict(zip(names, leaves, strict=True))
    found = tk_rules.resolve(tree, specs, density, 1.0, tk.Unstructured())
    return sum(
        math.prod(tree[name].shape) if leaf is None else leaf.entries_in(int(leaf.counts.forward))
        for name, leaf in found.items()
    )


def _abstract(config: TransformerXLConfig) -> tuple[list[str], list[Any]]:
    """The names and shapes of the parameters, with stacked layers, which are made faster."""
    model = LanguageModel(dataclasses.replace(config, scan=True))
    return flatten_with_names(model.abstract_params)[:2]


@functools.lru_cache
def narrowed(config: TransformerXLConfig, budget: int) -> TransformerXLConfig:
    """The widest model of the same depth and proportions within a budget of parameters.

    All widths shrink in proportion. The rest of the budget goes to the feed-forward blocks.

    Raises:
      UserError: no width is narrow enough.
    """
    low, high = 0, config.d_model // 2
    while high - low > 1:
        half = (low + high) // 2
        fits = parameters(_scaled(config, 2 * half)) <= budget
        low, high = (half, high) if fits else (low, half)
    if low == 0:
        raise UserError(f"config.model.small_dense: no model is as small as {budget} parameters")
    narrow = _scaled(config, 2 * low)
    per_unit = config.n_layer * (2 * narrow.d_model + 1)
    more = (budget - parameters(narrow)) // per_unit
    return dataclasses.replace(narrow, d_inner=narrow.d_inner + more)


def _scaled(config: TransformerXLConfig, d_model: int) -> TransformerXLConfig:
    def width(full: int) -> int:
        return max(1, round(full * d_model / config.d_model))

    return dataclasses.replace(
        config,
        d_model=d_model,
        d_head=width(config.d_head),
        d_inner=width(config.d_inner),
        d_embed=max(width(config.embed_width), config.div_val ** (config.n_cluster - 1)),
    )


def for_stacked_layers(
    rules: Rules, names: Sequence[str], stacked: str
) -> tuple[tuple[str, Any], ...]:
    """The same rules for parameters whose layers are stacked on a leading axis.

    A rule becomes two rules if it covers both stacked layers and other leaves.

    Args:
      rules: the rules of the config.
      names: the names of all parameters.
      stacked: the beginning of the names of those whose layers are stacked.
    """
    result = []
    for regex, spec in rules:
        try:
            matches = [name for name in names if re.fullmatch(regex, name)]
        except re.error as error:
            raise UserError(f"rule {regex!r} is no regular expression: {error}") from None
        inside = [name for name in matches if name.startswith(stacked)]
        if spec != "dense" and inside:
            options = {} if spec == "sparse" else dict(spec)
            alone = regex if len(inside) == len(matches) else f"(?={stacked})(?:{regex})"
            result.append((alone, {"stacked": 0} | options))
        if spec == "dense" or len(inside) < len(matches) or not matches:
            result.append((regex, spec))
    return tuple(result)
