"""Texts as numbers: a file of the user, or the documentation that comes with Python."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from experiments.errors import UserError
from experiments.language_modelling.data import vocabulary
from experiments.language_modelling.data.archives import read_text
from experiments.language_modelling.data.vocabulary import Vocabulary

SPLITS = ("train", "validation", "test")
# The shares of the training and the validation part, in bytes; the rest is for testing.
PARTS = (0.90, 0.05)


class Tokens(Protocol):
    """A text as numbers, of which any range can be read."""

    def __len__(self) -> int:
        """The number of tokens."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from start to stop - 1, int32."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The three parts of a text.

    Attributes:
      name: the name of the text in messages.
      vocabulary: the vocabulary of its symbols.
      splits: the parts, by the names in `SPLITS`.
    """

    name: str
    vocabulary: Vocabulary
    splits: Mapping[str, Tokens]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A text that a config names.

    Attributes:
      open: reads it; raises UserError if that is not possible.
      known: the level and the size of the vocabulary, if they are known without the text. If it is
        None, the text is opened as soon as the config is read.
    """

    open: Callable[[], Corpus]
    known: tuple[str, int] | None = None


class ArrayTokens:
    """Tokens in memory."""

    def __init__(self, numbers: np.ndarray):
        self._numbers = numbers

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self._numbers)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from start to stop - 1."""
        return self._numbers[start:stop].astype(np.int32)


def text_file(file: str, level: str, min_count: int) -> Corpus:
    """A file of raw text, divided by bytes into 90 % for training, 5 % and 5 %.

    Characters and words are those of UTF-8 text; a byte-order mark before it is left out.

    Raises:
      UserError: there is no such file, or it is damaged or, but for bytes, no UTF-8.
    """
    if not file:
        raise UserError("config.data.file is empty; text_file needs a file of raw text")
    path = Path(file)
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise UserError(f"config.data.file: cannot read {file}: {error.strerror}") from None
    if not path.is_file():
        raise UserError(f"config.data.file: cannot read {file}: is no file")
    return _text_file(path, changed, level, min_count)


@functools.lru_cache(maxsize=2)
def _text_file(path: Path, changed: int, level: str, min_count: int) -> Corpus:
    del changed  # A changed file is read again.
    text = read_text(path)
    if not text:
        raise UserError(f"config.data.file: {path} holds no text")
    if level != "byte":
        text = text.removeprefix(codecs.BOM_UTF8)
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"config.data.file: {path} is no UTF-8 text: found "
                f"{error.object[error.start]:#04x} at byte {error.start}; "
                "config.data.level='byte' takes any"
            ) from None
    return from_text(str(path), text, level, min_count)


@functools.lru_cache(maxsize=2)
def python_docs(level: str, min_count: int) -> Corpus:
    """The topics of Python's help(), about 0.4 MB. They differ between versions."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    return from_text("python_docs", text, level, min_count)


def from_text(name: str, text: bytes, level: str, min_count: int) -> Corpus:
    """Divides a text in three. The vocabulary is that of the training part, with `<unk>`."""
    parts = cut(text, level)
    known = vocabulary.build(parts["train"], level, min_count)
    splits = {split: ArrayTokens(known.encode(part)) for split, part in parts.items()}
    return Corpus(name, known, splits)


def cut(text: bytes, level: str = "byte") -> dict[str, bytes]:
    """The parts of a text, divided by bytes; at another level, a symbol is not cut in two.

    A text of words is cut after the line, or if lines are long after the word, and one of
    characters after the character.
    """
    ends = [round(len(text) * PARTS[0]), round(len(text) * sum(PARTS)), len(text)]
    if level != "byte":
        ends = [_end_of_symbol(text, end, level) for end in ends]
    parts = (text[start:end] for start, end in zip([0, *ends], ends, strict=False))
    return dict(zip(SPLITS, parts, strict=True))


def _end_of_symbol(text: bytes, end: int, level: str) -> int:
    """The first place from `end` on, at most a hundredth of the text on, at which to cut."""
    if level == "word":
        near = text[max(0, end - 1) : end + len(text) // 100]
        for space in (b"\n", rb"\s"):
            if found := re.search(space, near):
                return max(0, end - 1) + found.end()
    while end < len(text) and text[end] & 0xC0 == 0x80:  # within a character of UTF-8
        end += 1
    return end
