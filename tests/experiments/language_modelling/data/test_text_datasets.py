"""The builders, on small texts in place of the real ones."""

import lzma
import zipfile

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.language_modelling import prepare
from experiments.language_modelling.data import prepared
from experiments.language_modelling.data.datasets import builder, enwik8, wikitext103

PARTS = {"train": "the cat\n\nthe <unk> sat\n" * 40, "valid": "the\n" * 9, "test": "cat\n dog\n"}


def source(name, text, size=None):
    return builder.Source(name, builder.hashlib.sha1(text).hexdigest(), size)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with small texts under the real names, which the builders accept."""
    numbers = np.random.default_rng(0).integers(0, 16, 2_000) ** 2
    raw = numbers.astype(np.uint8).tobytes()
    words = {f"wiki.{part}.tokens": text.encode() for part, text in PARTS.items()}
    monkeypatch.setattr(builder, "CHUNK", 256)
    monkeypatch.setattr(enwik8.Enwik8, "SOURCES", (source("enwik8", raw, 2_000),))
    sources = tuple(source(name, text) for name, text in words.items())
    monkeypatch.setattr(wikitext103.Wikitext103, "SOURCES", sources)
    small = {"enwik8": ("byte", 16), "wikitext103": ("word", 5)}
    monkeypatch.setattr(prepared, "PREPARED", small)
    folder = tmp_path / "manual"
    folder.mkdir()
    (folder / "enwik8").write_bytes(raw)
    with zipfile.ZipFile(folder / "wikitext-103-v1.zip", "w") as archive:
        for name, text in words.items():
            archive.writestr(f"wikitext-103/{name}", text)
    return folder


def run(name, tmp_path, folder):
    return prepare.main([name, f"--data_dir={tmp_path / 'data'}", f"--manual_dir={folder}"])


@pytest.mark.parametrize("form", ["", ".xz", ".zip"])
def test_enwik8_comes_back_byte_by_byte(tiny, tmp_path, form, capsys):
    raw = (tiny / "enwik8").read_bytes()
    if form:
        (tiny / "enwik8").unlink()
    if form == ".xz":
        (tiny / "enwik8.xz").write_bytes(lzma.compress(raw))
    if form == ".zip":
        with zipfile.ZipFile(tiny / "enwik8.zip", "w") as archive:
            archive.writestr("enwik8", raw)
    assert run("enwik8", tmp_path, tiny) == 0
    assert "prepared enwik8 in" in capsys.readouterr().out
    corpus = prepared.open_prepared("enwik8", str(tmp_path / "data"))
    assert [len(tokens) for tokens in corpus.splits.values()] == [1_800, 100, 100]
    symbols = np.array([ord(s) for s in corpus.vocabulary.symbols], np.uint8)
    parts = [symbols[tokens.read(0, len(tokens))] for tokens in corpus.splits.values()]
    assert np.concatenate(parts).tobytes() == raw
    train = corpus.splits["train"]
    for start, stop in ((0, 1), (255, 257), (200, 1_100), (1_792, 1_800), (1_800, 1_800)):
        assert symbols[train.read(start, stop)].tobytes() == raw[start:stop]
        assert train.read(start, stop).dtype == np.int32


@pytest.mark.parametrize("unpacked", [False, True])
def test_wikitext103_comes_back_word_by_word(tiny, tmp_path, unpacked):
    if unpacked:
        with zipfile.ZipFile(tiny / "wikitext-103-v1.zip") as archive:
            archive.extractall(tiny)
        (tiny / "wikitext-103-v1.zip").unlink()
    assert run("wikitext103", tmp_path, tiny) == 0
    corpus = prepared.open_prepared("wikitext103", str(tmp_path / "data"))
    assert corpus.vocabulary.symbols == ("<eos>", "the", "cat", "<unk>", "sat")
    tokens = {split: t.read(0, len(t)).tolist() for split, t in corpus.splits.items()}
    assert tokens["train"] == [1, 2, 0, 0, 1, 3, 4, 0] * 40
    assert tokens["validation"] == [1, 0] * 9
    assert tokens["test"] == [2, 0, 3, 0]


def fail(name, tmp_path, folder, capsys):
    assert run(name, tmp_path, folder) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    return error[-1]


def test_a_wrong_file_is_refused(tiny, tmp_path, capsys):
    path = tiny / "enwik8"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    assert "truncated: 1999 bytes of enwik8's 2000" in fail("enwik8", tmp_path, tiny, capsys)
    path.write_bytes(raw[:-1] + b"?")
    assert "wrong checksum: enwik8 has SHA-1" in fail("enwik8", tmp_path, tiny, capsys)
    path.rename(tiny / "enwik8.zip")
    assert "damaged or truncated" in fail("enwik8", tmp_path, tiny, capsys)
    (tiny / "enwik8.zip").unlink()
    assert "holds none of enwik8, enwik8.xz" in fail("enwik8", tmp_path, tiny, capsys)
    assert "no such folder" in fail("enwik8", tmp_path, tmp_path / "none", capsys)
    assert not list((tmp_path / "data").glob("enwik8/1*"))


def test_a_text_that_is_not_prepared_names_the_command(tiny, tmp_path):
    with pytest.raises(UserError, match=r"prepare it with: scripts/prepare_text enwik8 --data_dir"):
        prepared.open_prepared("enwik8", str(tmp_path))


def test_another_vocabulary_than_the_known_is_refused(tiny, tmp_path, monkeypatch):
    assert run("enwik8", tmp_path, tiny) == 0
    monkeypatch.setattr(prepared, "PREPARED", {"enwik8": ("byte", 205)})
    with pytest.raises(UserError, match="holds 16 symbols at level byte; enwik8 has 205"):
        prepared.open_prepared("enwik8", str(tmp_path / "data"))
