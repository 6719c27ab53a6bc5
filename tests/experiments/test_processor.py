"""The CPU as Linux tells it."""

from pathlib import Path

import pytest

from experiments import processor

X86 = "processor\t: 0\nmodel name\t: Some CPU 9\nflags\t\t: fma avx avx2 {}\nmodel name\t: other\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86.format(""), "Some CPU 9, AVX2"),
        (X86.format("avx512f"), "Some CPU 9, AVX-512"),
        (ARM.format(""), "NEON"),
        (ARM.format("sve"), "SVE"),
        ("", "unknown"),
    ],
)
def test_name_and_widest_vectors(monkeypatch, text, expected):
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert processor.processor() == expected


def test_another_system_is_unknown(monkeypatch):
    def absent(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    assert processor.processor() == "unknown"
