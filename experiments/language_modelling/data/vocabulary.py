"""Vocabularies, and the levels at which text is divided into symbols."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"
# A byte is represented by the Latin-1 character of its number. Words are separated by white space.
LEVELS = ("byte", "character", "word")
_CODE_POINTS = 0x110000
_PIECE = 1 << 23


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Symbols and their numbers.

    Attributes:
      level: one of `LEVELS`.
      symbols: the symbols in the order of their numbers, the most frequent first.
    """

    level: str
    symbols: tuple[str, ...]

    def __len__(self) -> int:
        """The number of symbols."""
        return len(self.symbols)

    @property
    def of_text(self) -> int:
        """The number of symbols that are a part of a text: all but `<unk>` and `<eos>`."""
        return len({*self.symbols} - {UNKNOWN, END_OF_LINE})

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The narrowest dtype for the numbers."""
        return np.uint8 if len(self) <= 256 else np.uint16 if len(self) <= 65_536 else np.uint32

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum that differs between different vocabularies."""
        text = "\n".join([self.level, *map(repr, self.symbols)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def encode(self, text: bytes) -> np.ndarray:
        """The numbers of the symbols of a text; unknown symbols have the number of `<unk>`.

        Raises:
          KeyError: a symbol is unknown, and the vocabulary has no `<unk>`.
        """
        if self.level == "word":
            words = (word for line in _lines(text) for word in (*line.split(), END_OF_LINE))
            return np.frombuffer(array("I", map(self._number, words)), np.uint32).astype(self.dtype)
        points = _code_points(text, self.level)
        table = np.zeros(_CODE_POINTS, self.dtype)
        for point in np.flatnonzero(_histogram(points)):
            table[point] = self._number(chr(point))
        return table[points]

    def unknown(self, text: bytes) -> list[str]:
        """The symbols of a text that are not in the vocabulary."""
        return sorted(_count(text, self.level).keys() - self._numbers.keys())

    def decode(self, numbers: Sequence[int] | np.ndarray) -> str:
        """The text of some numbers."""
        symbols = [self.symbols[int(i)] for i in numbers]
        if self.level == "word":
            text = " ".join("\n" if s == END_OF_LINE else s for s in symbols)
            return text.replace(" \n ", "\n").replace("\n ", "\n").replace(" \n", "\n")
        if self.level == "character":
            return "".join(symbols)
        codes = (b"?" if s == UNKNOWN else s.encode("latin-1") for s in symbols)
        return b"".join(codes).decode("utf-8", "replace")

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.symbols)}

    def _number(self, symbol: str) -> int:
        numbers = self._numbers
        return numbers[symbol] if symbol in numbers or UNKNOWN not in numbers else numbers[UNKNOWN]


def build(text: bytes, level: str, min_count: int = 1, *, unknown: bool = True) -> Vocabulary:
    """The vocabulary of a text, by descending frequency.

    Words have the order of the reference. The first is `<eos>`, which ends every line. Of words
    with one frequency, the word that occurs first comes first.

    Args:
      text: the text whose symbols are counted.
      level: one of `LEVELS`.
      min_count: the least frequency of a symbol; rarer ones are left out.
      unknown: whether `<unk>` is added at the end, unless it is a word of the text.
    """
    counts = _count(text, level)
    symbols = [END_OF_LINE] if level == "word" else []
    symbols += [s for s, n in counts.most_common() if n >= min_count and s != END_OF_LINE]
    if unknown and UNKNOWN not in symbols:
        symbols.append(UNKNOWN)
    return Vocabulary(level, tuple(symbols))


def _count(text: bytes, level: str) -> Counter[str]:
    if level == "word":
        return Counter(word for line in _lines(text) for word in line.split())
    counts = _histogram(_code_points(text, level))
    return Counter({chr(point): int(counts[point]) for point in np.flatnonzero(counts)})


def _histogram(points: np.ndarray) -> np.ndarray:
    """The frequency of each code point, in pieces, because bincount copies its input to int64."""
    counts = np.zeros(_CODE_POINTS, np.int64)
    for start in range(0, len(points), _PIECE):
        counts += np.bincount(points[start : start + _PIECE], minlength=_CODE_POINTS)
    return counts


def _lines(text: bytes) -> Iterator[str]:
    lines = text.decode("utf-8", "replace").split("\n")
    yield from lines[:-1] if not lines[-1] else lines


def _code_points(text: bytes, level: str) -> np.ndarray:
    if level == "byte":
        return np.frombuffer(text, np.uint8)
    return np.frombuffer(text.decode("utf-8", "replace").encode("utf-32-le"), np.uint32)
