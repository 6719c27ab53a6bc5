"""WikiText-103: good and featured articles of Wikipedia, word by word."""

from __future__ import annotations

import numpy as np

from experiments.language_modelling.data import vocabulary
from experiments.language_modelling.data.corpus import SPLITS
from experiments.language_modelling.data.datasets.builder import Source, TokenText
from experiments.language_modelling.data.vocabulary import Vocabulary


class Wikitext103(TokenText):
    """The splits of its authors, with `<eos>` at the end of every line, also of an empty one.

    The 267,735 words are those of the training part, which include `<unk>`, and `<eos>`.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = "wikitext-103-v1.zip, or wiki.{train,valid,test}.tokens"
    # Users report that the authors' address no longer answers; this is the first author's own.
    URL = "https://wikitext.smerity.com/wikitext-103-v1.zip"
    SOURCES = (
        Source("wiki.train.tokens", "b7497e2dfe77e72cfef5e3dbc61b7b53712ac211"),
        Source("wiki.valid.tokens", "c326ac59dc587676d58c422eb8a03e119582f92b"),
        Source("wiki.test.tokens", "8a5befc548865cec54ed4273cf87dbbad60d1e47"),
    )
    DTYPE = np.uint32

    def split_text(self, texts: list[bytes]) -> tuple[Vocabulary, dict[str, bytes]]:
        """The vocabulary of the training part."""
        known = vocabulary.build(texts[0], "word", unknown=False)
        return known, dict(zip(SPLITS, texts, strict=True))
