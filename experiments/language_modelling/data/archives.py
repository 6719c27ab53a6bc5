"""Reads raw text from a plain, `.xz`, `.gz` or `.zip` file."""

from __future__ import annotations

import gzip
import lzma
import zipfile
import zlib
from pathlib import Path
from typing import IO

from experiments.errors import UserError

MOST_BYTES = 4 << 30  # of a text whose size is not known


def read_text(path: Path, member: str = "", most: int = MOST_BYTES) -> bytes:
    """The content of a text file, or of the file in an archive.

    Args:
      path: the file; `.xz`, `.gz` and `.zip` files are unpacked, others are read as they are.
      member: the file in a `.zip` archive; it may be left out if there is only one.
      most: bytes of text; of more, no more is unpacked.

    Raises:
      UserError: the file is missing, no file, damaged or too large, or has no such member.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"cannot read {path}: is no file")
    try:
        if path.suffix == ".xz":
            with lzma.open(path) as file:
                return _bounded(path, file, most)
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return _bounded(path, file, most)
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                name = _member(path, archive.namelist(), member)
                with archive.open(name) as file:
                    return _bounded(path, file, most)
        with open(path, "rb") as file:
            return _bounded(path, file, most)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or truncated: {error}") from None
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or packed in another way
        raise UserError(f"{path}: cannot be unpacked: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _bounded(path: Path, file: IO[bytes] | gzip.GzipFile, most: int) -> bytes:
    text = file.read(most + 1)
    if len(text) > most:
        raise UserError(f"{path}: holds more than the {most} bytes of text that are expected")
    return text


def _member(path: Path, names: list[str], wanted: str) -> str:
    # A Mac's archive has a second, hidden entry for each file.
    files = [n for n in names if not n.endswith("/") and not Path(n).name.startswith("._")]
    found = [name for name in files if Path(name).name == wanted] if wanted else files
    if len(found) != 1:
        raise UserError(
            f"{path}: must hold one file{f' {wanted}' if wanted else ''}; found {', '.join(files)}"
        )
    return found[0]
