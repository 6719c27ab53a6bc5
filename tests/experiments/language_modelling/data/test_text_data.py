"""Vocabularies, raw text files, and what is wrong with them."""

import gzip
import lzma
import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from experiments.config import base_config, resolve
from experiments.config.validation import finish
from experiments.errors import UserError
from experiments.language_modelling.data import vocabulary
from experiments.language_modelling.data.archives import read_text
from experiments.language_modelling.data.corpus import cut, from_text, python_docs, text_file
from experiments.language_modelling.data.vocabulary import Vocabulary
from experiments.language_modelling.generate import encode_prompt
from experiments.training import methods

SMALL = "configs/enwik8_small.py:smoke"
LARGE = "configs/wikitext103_large.py:smoke"
WORDS = b" b a b\n\n c  b a <unk>\n"


@pytest.fixture
def text(tmp_path):
    """Makes a file of so many bytes and gives the overrides that name it."""

    def make(size, name="text.txt"):
        letters = np.random.default_rng(0).integers(97, 123, size).astype(np.uint8)
        (tmp_path / name).write_bytes(letters.tobytes())
        return ["data.name=text_file", f"data.file={tmp_path / name}"]

    return make


def test_words_are_numbered_as_in_the_reference():
    # By frequency, and of equals the first to occur; <eos> ends every line, also an empty one.
    known = vocabulary.build(WORDS, "word", unknown=False)
    assert known.symbols == ("<eos>", "b", "a", "c", "<unk>")
    assert known.encode(WORDS).tolist() == [1, 2, 1, 0, 0, 3, 1, 2, 4, 0]
    assert known.encode(b"b zebra").tolist() == [1, 4, 0]
    assert known.decode(known.encode(WORDS)) == "b a b\n\nc b a <unk>\n"


@pytest.mark.parametrize("level", ["byte", "character"])
def test_text_survives(level):
    text = "naïve Ω café\n"
    known = vocabulary.build(text.encode(), level)
    assert known.decode(known.encode(text.encode())) == text
    assert len(known) == len(set(text if level == "character" else text.encode())) + 1


def test_unknown_symbols():
    known = vocabulary.build(b"aaab", "byte", min_count=2)
    assert known.symbols == ("a", "<unk>")
    assert known.encode(b"abc").tolist() == [0, 1, 1]
    with pytest.raises(KeyError):
        vocabulary.build(b"aaab", "byte", unknown=False).encode(b"c")


@pytest.mark.parametrize(("count", "dtype"), [(256, "uint8"), (257, "uint16"), (70_000, "uint32")])
def test_numbers_take_no_more_room_than_they_need(count, dtype):
    known = Vocabulary("character", tuple(map(chr, range(count))))
    assert known.encode(b"a").dtype == dtype


def test_fingerprint_sees_order_and_level():
    prints = {
        Vocabulary(level, symbols).fingerprint
        for level in ("byte", "word")
        for symbols in (("a", "b"), ("b", "a"), ("a\nb",))
    }
    assert len(prints) == 6


def test_parts_are_cut_by_bytes_and_the_vocabulary_is_of_the_first():
    text = b"a" * 90 + b"b" * 5 + b"c" * 5
    assert [len(part) for part in cut(text).values()] == [90, 5, 5]
    corpus = from_text("it", text, "byte", 1)
    assert corpus.vocabulary.symbols == ("a", "<unk>")
    assert corpus.splits["test"].read(0, 5).tolist() == [1] * 5


@pytest.mark.parametrize("lines", [True, False])
def test_no_word_is_cut_in_two(lines):
    words = [f"word{i}" for i in range(3000)]
    text = "".join(w + ("\n" if lines and i % 5 == 4 else " ") for i, w in enumerate(words))
    parts = cut(text.encode(), "word")
    assert b"".join(parts.values()).decode() == text
    assert [w for part in parts.values() for w in part.decode().split()] == words
    assert all(abs(len(part) / len(text) - share) < 0.02
               for part, share in zip(parts.values(), (0.9, 0.05, 0.05), strict=True))  # fmt: skip
    if lines:
        assert all(part.endswith(b"\n") for part in parts.values())


@pytest.mark.parametrize("length", range(20, 32))
def test_no_character_is_cut_in_two(length):
    text = "éß€𝄞" * length
    parts = [part.decode() for part in cut(text.encode(), "character").values()]
    assert "".join(parts) == text
    symbols = from_text("it", text.encode(), "character", 1).vocabulary.symbols
    assert sorted(symbols) == sorted((*"éß€𝄞", "<unk>"))


def test_prepared_texts_have_all_their_symbols():
    with pytest.raises(UserError, match=r"config.data.min_count: found 50; must be 1, because"):
        resolve("configs/enwik8_small.py:dense", ["data.min_count=50"])


def test_python_docs_are_there():
    corpus = python_docs("byte", 1)
    assert len(corpus.splits["train"]) > 200_000
    assert corpus.vocabulary.decode(corpus.splits["train"].read(0, 300)).isprintable() is False


def test_archives_hold_the_same_text(tmp_path):
    plain, packed, zipped = (tmp_path / f"t{end}" for end in ("", ".xz", ".zip"))
    plain.write_bytes(b"some text" * 99)
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.write(plain, "folder/t")
    assert read_text(packed) == read_text(zipped) == read_text(plain) == plain.read_bytes()
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"t.xz: damaged or truncated"):
        read_text(packed)
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr("__MACOSX/._t", b"what a Mac adds")
    assert read_text(zipped) == plain.read_bytes()
    zipped.write_bytes(zipped.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"t.zip: damaged or truncated"):
        read_text(zipped)
    with pytest.raises(UserError, match="cannot read .*: No such file"):
        read_text(tmp_path / "none")


def test_what_is_unpacked_is_bounded(tmp_path):
    """A small archive of a large text is refused before the text is in memory."""
    size = 5_000_000
    (tmp_path / "t.gz").write_bytes(gzip.compress(bytes(size)))
    (tmp_path / "t.xz").write_bytes(lzma.compress(bytes(size), preset=0))
    with zipfile.ZipFile(tmp_path / "t.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("t", bytes(size))
    for name in ("t.gz", "t.xz", "t.zip"):
        assert len(read_text(tmp_path / name)) == size
        tracemalloc.start()
        with pytest.raises(UserError, match=f"{name}: holds more than the 1000 bytes"):
            read_text(tmp_path / name, most=1000)
        assert tracemalloc.get_traced_memory()[1] < size / 4
        tracemalloc.stop()


def test_an_archive_that_cannot_be_unpacked_is_one_line(tmp_path):
    path = tmp_path / "t.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("t", b"text")
    packed = bytearray(path.read_bytes())
    for at in (packed.index(b"PK\3\4") + 6, packed.index(b"PK\1\2") + 8):
        packed[at] |= 1  # says that it is encrypted
    path.write_bytes(packed)
    with pytest.raises(UserError, match="t.zip: cannot be unpacked: .*encrypted"):
        read_text(path)


def test_a_fifo_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "t")
    with pytest.raises(UserError, match="is no file"):
        read_text(tmp_path / "t")


@pytest.mark.parametrize("level", ["character", "word"])
def test_text_that_is_no_utf_8(tmp_path, level):
    text = "größer als\n" * 50
    path = tmp_path / "text"
    for encoding, byte in (("latin-1", 2), ("utf-16", 0)):
        path.write_bytes(text.encode(encoding))
        os.utime(path, ns=(byte + 1, byte + 1))
        with pytest.raises(UserError, match=f"is no UTF-8 text: found 0x.. at byte {byte}; "):
            text_file(str(path), level, 1)
        assert len(text_file(str(path), "byte", 1).splits["train"]) > 400
    path.write_bytes(text.encode("utf-8-sig"))
    symbols = text_file(str(path), level, 1).vocabulary.symbols
    assert "größer" in symbols if level == "word" else "ö" in symbols
    assert not any("\ufeff" in symbol for symbol in symbols)


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"ab" * 50)
    assert len(text_file(str(path), "byte", 1).vocabulary) == 3
    path.write_bytes(b"abcd" * 50)
    assert len(text_file(str(path), "byte", 1).vocabulary) == 5


def test_what_the_data_decides_is_in_the_config(text):
    data = resolve(SMALL, text(5_000)).data
    assert data.vocabulary_size == 27
    resolve(SMALL, [*text(5_000), f"data.vocabulary={data.vocabulary}"])
    assert resolve("configs/enwik8_large.py:dense").data.vocabulary_size == 205


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.name=text"],
            r"config.data.name: found 'text'; must be one of text_file, python_docs, enwik8",
        ),
        (
            ["data.level=letter"],
            "data.level: found 'letter'; must be one of 'byte', 'character', 'word'",
        ),
        (["data.name=text_file"], "config.data.file is empty"),
        (["data.name=text_file", "data.file=/no/such"], "config.data.file: cannot read /no/such"),
        (["data.name=text_file", "data.file=/"], "config.data.file: cannot read /: is no file"),
        (
            ["data.eval_batch_size=0"],
            "data.eval_batch_size: found 0; must be an integer of at least 1",
        ),
        (["data.min_count=0"], "config.data.min_count: found 0; must be an integer of at least"),
        (["data.vocabulary=abc"], "config.data.vocabulary: found 'abc'; python_docs has "),
        (
            ["data.name=enwik8", "data.vocabulary_size=9"],
            "vocabulary_size: found 9; enwik8 has 205",
        ),
        (
            ["data.min_count=9999999"],
            "min_count: found 9999999, which leaves 0 symbols of python_docs",
        ),
        (
            ["data.min_count=9999999", "data.level=word"],
            "min_count: found 9999999, which leaves 0 symbols of python_docs",
        ),
        (["method.rules=(('layers/(','dense'),)"], r"rule 'layers/\(' is no regular expression"),
        (["model.evaluation.memory=-1"], "config.model.evaluation.memory=-1: must be a whole"),
        (["model.train.target=0"], "config.model.train.target=0: must be a whole"),
        (
            ["model.train.target=900000"],
            r"train.target=900000: beyond the data; .* python_docs has",
        ),
        (["model.evaluation.target=90000"], "evaluation.target=90000: beyond the data; the valid"),
        (["batch_size=16000"], r"config.batch_size=16000: too few tokens; 16000 lanes of 32 \+ 1"),
        (["model.dropout=1.0"], r"config.model: dropout=1.0: must be in \[0, 1\)"),
        (
            ["model.small_dense.forward_density=2.0"],
            "small_dense.forward_density: found 2.0; must be a number above 0 and",
        ),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve(SMALL, overrides)
    assert "\n" not in str(caught.value)


def test_stacked_layers_need_rules():
    config = base_config("language_modelling")
    config.method.name, config.model.scan = "top_kast", True
    methods.complete(config)
    with pytest.raises(
        UserError, match="config.method.rules: found None; with config.model.scan=True"
    ):
        finish(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "data.file: .* holds no text"), (b"a b", "train part of .* has 3 tokens"),
     (b"a" * 9_000, "data.name: found 'text_file'; .*text has 1 symbol to train on; must have 2"),
     (None, "cannot read .*: is no file")],
)  # fmt: skip
def test_a_file_of_no_use_is_one_line(tmp_path, content, message):
    path = tmp_path / "text"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        resolve(SMALL, ["data.name=text_file", f"data.file={path}"])


@pytest.mark.parametrize("cutoffs", ["(2.5,300)", "(300,100)", "(0,100)", "(9000000,100)"])
def test_cutoffs_must_ascend(cutoffs):
    with pytest.raises(UserError, match="config.model: cutoffs=.*: must be ascending, above 0 and"):
        resolve(LARGE, [f"model.cutoffs={cutoffs}"])


def test_prompts():
    known = vocabulary.build(WORDS, "word", unknown=False)
    assert encode_prompt(known, "b a") == [1, 2]
    assert encode_prompt(known, "b a\n") == [1, 2, 0]
    with pytest.raises(UserError, match="--prompt: empty"):
        encode_prompt(known, "")


@pytest.mark.parametrize("unknown", [True, False])
@pytest.mark.parametrize(
    ("level", "prompt", "told"),
    [("word", "b c a d c\n", "'c', 'd'"), ("character", "a\u00fc", "'\u00fc'"),
     ("byte", "a\u00fc", "0xbc, 0xc3")],
)  # fmt: skip
def test_a_prompt_of_unknown_symbols_is_one_line(level, prompt, told, unknown):
    """Whether or not the vocabulary has the symbol `<unk>` for rare ones."""
    known = vocabulary.build(b"a b\nb a\n", level, unknown=unknown)
    with pytest.raises(UserError, match=f"^--prompt: not in the vocabulary of the run: {told}$"):
        encode_prompt(known, prompt)
