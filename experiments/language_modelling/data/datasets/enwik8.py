"""enwik8: the first 100 MB of an English Wikipedia dump of 2006, byte by byte."""

from __future__ import annotations

import numpy as np

from experiments.language_modelling.data import vocabulary
from experiments.language_modelling.data.corpus import cut
from experiments.language_modelling.data.datasets.builder import Source, TokenText
from experiments.language_modelling.data.vocabulary import Vocabulary


class Enwik8(TokenText):
    """The first 90 MB for training, the next 5 MB for validation and the last 5 MB for testing.

    All 205 bytes that occur are symbols. The preparation of the reference loses the line feeds and
    therefore has 204 symbols.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = "enwik8, enwik8.xz or enwik8.zip"
    URL = "http://mattmahoney.net/dc/enwik8.zip"
    SOURCES = (Source("enwik8", "57b8363b814821dc9d47aa4d41f58733519076b2", 100_000_000),)
    DTYPE = np.uint8

    def split_text(self, texts: list[bytes]) -> tuple[Vocabulary, dict[str, bytes]]:
        """The vocabulary of the whole file, and its three parts."""
        return vocabulary.build(texts[0], "byte", unknown=False), cut(texts[0])
