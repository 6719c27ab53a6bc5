"""Narrow dense models with the size of a sparse one, and sparsity rules for stacked layers."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.config.checks import check_values, number
from experiments.errors import UserError
from experiments.language_modelling.models.settings import TransformerXLConfig
from experiments.language_modelling.models.transformer_xl import LanguageModel
from experiments.training import small_dense
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
    return small_dense.parameters(_stacked_model(config).abstract_params)


def active_parameters(config: TransformerXLConfig, rules: Rules, density: float) -> int:
    """The number of parameters in the forward set, if the rules say what is sparse."""
    model = _stacked_model(config)
    names, _, _ = flatten_with_names(model.abstract_params)
    rules = for_stacked_layers(rules, names, model.stacked)
    return small_dense.active_parameters(model.abstract_params, rules, density)


def _stacked_model(config: TransformerXLConfig) -> LanguageModel:
    """The model with stacked layers: its parameters are as many, and their shapes made faster."""
    return LanguageModel(dataclasses.replace(config, scan=True))


@functools.lru_cache
def narrowed(config: TransformerXLConfig, budget: int) -> TransformerXLConfig:
    """The widest model of the same depth and proportions within a budget of parameters.

    All widths shrink in proportion. The rest of the budget goes to the feed-forward blocks.

    Raises:
      UserError: no width is narrow enough.
    """
    half = small_dense.widest(
        lambda half: parameters(_scaled(config, 2 * half)), config.d_model // 2, budget
    )
    narrow = _scaled(config, 2 * half)
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
