"""Texts, by the names that `config.data.name` takes."""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from experiments.language_modelling.data import corpus
from experiments.language_modelling.data.corpus import Text
from experiments.language_modelling.data.prepared import PREPARED, open_prepared
from experiments.registry import Registry, function_of


def text_file(data: ConfigDict) -> Text:
    """A file of raw text."""
    return Text(open=lambda: corpus.text_file(data.file, data.level, data.min_count))


def python_docs(data: ConfigDict) -> Text:
    """The documentation that comes with Python."""
    return Text(open=lambda: corpus.python_docs(data.level, data.min_count))


def prepared_text(data: ConfigDict) -> Text:
    """A text that tensorflow_datasets prepared."""
    return Text(open=lambda: open_prepared(data.name, data.dir), known=PREPARED[data.name])


# A function reads the section `data` of a config.
TEXTS: Registry[Callable[[ConfigDict], Text]] = Registry(
    "config.data.name",
    {"text_file": text_file, "python_docs": python_docs, **dict.fromkeys(PREPARED, prepared_text)},
    function_of("data"),
)
