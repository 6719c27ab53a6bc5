"""Variants of a language-modelling config."""

from __future__ import annotations

from ml_collections import ConfigDict

from experiments.config import apply_variant as apply_common
from experiments.errors import UserError

SMALL_DENSE = "small-dense-"


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
            config.model.small_dense.forward_density = _density(word)
    return "smoke" in flags


def _density(word: str) -> float:
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
