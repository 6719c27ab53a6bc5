"""The config of a run: defaults, files, overrides, validation and the command line."""

from experiments.config.defaults import apply_variant, base_config, check_variant
from experiments.config.loading import load, override, resolve
from experiments.config.planned import reported

__all__ = [
    "apply_variant",
    "base_config",
    "check_variant",
    "load",
    "override",
    "reported",
    "resolve",
]
