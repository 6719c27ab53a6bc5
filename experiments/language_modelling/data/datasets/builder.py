"""The common part of the builders, from checked files to records of token numbers."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from experiments.errors import UserError
from experiments.language_modelling.data.archives import MOST_BYTES, read_text
from experiments.language_modelling.data.vocabulary import Vocabulary

CHUNK = 65_536  # The number of tokens in a record.


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of raw text, as its authors published it.

    Attributes:
      name: the name of the file, which may be in an archive.
      sha1: the checksum of the raw text.
      size: the size in bytes; None if only the checksum is known.
    """

    name: str
    sha1: str
    size: int | None = None

    def read(self, path: Path) -> bytes:
        """Reads the text, from an archive or not.

        Raises:
          UserError: the file holds another text.
        """
        text = read_text(path, self.name, self.size or MOST_BYTES)
        if self.size is not None and len(text) < self.size:
            raise UserError(f"{path}: truncated: {len(text)} bytes of {self.name}'s {self.size}")
        found = hashlib.sha1(text).hexdigest()
        if found != self.sha1:
            raise UserError(
                f"{path}: wrong checksum: {self.name} has SHA-1 {found}, not {self.sha1}"
            )
        return text


class TokenText(tfds.core.GeneratorBasedBuilder, abc.ABC):
    """A text as numbers, in order, with its vocabulary in the metadata.

    Attributes:
      URL: the address of the official archive.
      SOURCES: the files in the archive.
      DTYPE: the dtype of the numbers.
    """

    VERSION = tfds.core.Version("1.0.0")
    URL: ClassVar[str]
    SOURCES: ClassVar[tuple[Source, ...]]
    DTYPE: ClassVar[Any]

    @abc.abstractmethod
    def split_text(self, texts: list[bytes]) -> tuple[Vocabulary, dict[str, bytes]]:
        """The vocabulary, and the text of each split, from the sources' texts."""

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "tokens": tfds.features.Tensor(
                        shape=(CHUNK,), dtype=self.DTYPE, encoding=tfds.features.Encoding.BYTES
                    ),
                    "length": np.int32,  # Less than CHUNK in the last record.
                }
            ),
            homepage=self.URL,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> Mapping[str, Iterator[Any]]:
        paths = self._paths(dl_manager)
        texts = [source.read(path) for source, path in zip(self.SOURCES, paths, strict=True)]
        vocabulary, splits = self.split_text(texts)
        self.info.metadata.update(level=vocabulary.level, symbols=list(vocabulary.symbols))
        return {
            name: self._generate_examples(vocabulary.encode(text)) for name, text in splits.items()
        }

    def _generate_examples(self, numbers: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, start in enumerate(range(0, len(numbers), CHUNK)):
            chunk = numbers[start : start + CHUNK].astype(self.DTYPE)
            yield index, {"tokens": np.pad(chunk, (0, CHUNK - len(chunk))), "length": len(chunk)}

    def _paths(self, dl_manager: Any) -> list[Path]:
        """The path of each source, in the user's folder if there is one, otherwise downloaded."""
        try:
            folder = Path(dl_manager.manual_dir)
        except AssertionError:
            return [Path(dl_manager.download(self.URL))] * len(self.SOURCES)
        return [_find(folder, source.name, Path(self.URL).name) for source in self.SOURCES]


def _find(folder: Path, name: str, archive: str) -> Path:
    wanted = (name, f"{name}.xz", f"{name}.zip", archive)
    found = [path for file in wanted for path in sorted(folder.rglob(file)) if path.is_file()]
    if not found:
        raise UserError(f"--manual_dir={folder}: holds none of {', '.join(dict.fromkeys(wanted))}")
    return found[0]
