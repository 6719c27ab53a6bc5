"""Prepares texts with tensorflow_datasets, and reads them without TensorFlow."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import UserError
from experiments.language_modelling.data.corpus import SPLITS, Corpus
from experiments.language_modelling.data.vocabulary import Vocabulary

# The level and the size of each vocabulary, which are known without the text.
PREPARED = {"enwik8": ("byte", 205), "wikitext103": ("word", 267_735)}
KEPT_RECORDS = 1024  # Each lane reads from a record of its own.


class RecordTokens:
    """The tokens of a split. Only the records that are needed are read."""

    def __init__(self, name: str, records: Any):
        self._name, self._records = name, records
        self._record = functools.lru_cache(KEPT_RECORDS)(self._read_record)
        self._chunk = len(self._record(0))
        last = self._record(len(records) - 1)
        self._length = (len(records) - 1) * self._chunk + len(last)

    def __len__(self) -> int:
        """The number of tokens."""
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from start to stop - 1."""
        first, end = start // self._chunk, -(-stop // self._chunk)
        parts = [self._record(i) for i in range(first, end)]
        found = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        return found[start - first * self._chunk :][: stop - start].astype(np.int32)

    def _read_record(self, index: int) -> np.ndarray:
        try:
            record = self._records[index]
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip()
            raise UserError(f"cannot read record {index} of {self._name}: {reason}") from None
        tokens: np.ndarray = record["tokens"][: record["length"]]
        return tokens


def open_prepared(name: str, data_dir: str) -> Corpus:
    """Opens a prepared text.

    Raises:
      UserError: the text is not prepared, or is another one.
    """
    builder = _builder(name, data_dir)
    try:
        sources = {split: builder.as_data_source(split) for split in SPLITS}
    except (AssertionError, KeyError, NotImplementedError, OSError, ValueError) as error:
        where = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"config.data.name: no {name} prepared in {data_dir or 'the default data_dir'}; "
            f"prepare it with: scripts/prepare_text {name}{where}"
        ) from error
    metadata = builder.info.metadata
    vocabulary = Vocabulary(metadata["level"], tuple(metadata["symbols"]))
    if (vocabulary.level, len(vocabulary)) != PREPARED[name]:
        raise UserError(
            f"{builder.data_dir}: holds {len(vocabulary)} symbols at level {vocabulary.level}; "
            f"{name} has {PREPARED[name][1]} at level {PREPARED[name][0]}"
        )
    splits = {split: RecordTokens(f"{name}/{split}", sources[split]) for split in SPLITS}
    return Corpus(name, vocabulary, splits)


def prepare(name: str, data_dir: str, manual_dir: str) -> Path:
    """Prepares a text; returns its folder.

    Args:
      name: one of `PREPARED`.
      data_dir: the output folder; "" for the default of tensorflow_datasets.
      manual_dir: the folder with the user's file; "" to download the file.

    Raises:
      UserError: the file is not the right one, or cannot be downloaded.
    """
    import tensorflow_datasets as tfds

    if manual_dir and not Path(manual_dir).is_dir():
        raise UserError(f"--manual_dir={manual_dir}: no such folder")
    if manual_dir and not any(Path(manual_dir).iterdir()):
        raise UserError(f"--manual_dir={manual_dir}: is empty; must hold the file, or leave it out")
    builder = _builder(name, data_dir)
    options = tfds.download.DownloadConfig(manual_dir=manual_dir or None)
    try:
        builder.download_and_prepare(download_config=options)
    except UserError:
        raise
    except (AssertionError, OSError, tfds.download.DownloadError) as error:
        raise UserError(f"{name}: {error or type(error).__name__}") from error
    return Path(builder.data_dir)


def _builder(name: str, data_dir: str) -> Any:
    # The import takes seconds, and only these texts need it.
    module = importlib.import_module(f"experiments.language_modelling.data.datasets.{name}")
    builder = getattr(module, name.capitalize())
    return builder(data_dir=data_dir or None, file_format="array_record")
