"""Reads raw text from a plain, `.xz` or `.zip` file."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from pathlib import Path

from experiments.errors import UserError


def read_text(path: Path, member: str = "") -> bytes:
    """The content of a text file, or of the file in an archive.

    Args:
      path: the file; `.xz` and `.zip` files are unpacked, others are read as they are.
      member: the file in a `.zip` archive; it may be left out if there is only one.

    Raises:
      UserError: the file is missing or damaged, or has no such member.
    """
    try:
        if path.suffix == ".xz":
            with lzma.open(path) as file:
                return file.read()
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                return archive.read(_member(path, archive.namelist(), member))
        return path.read_bytes()
    except (EOFError, lzma.LZMAError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or truncated: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _member(path: Path, names: list[str], wanted: str) -> str:
    files = [name for name in names if not name.endswith("/")]
    found = [name for name in files if Path(name).name == wanted] if wanted else files
    if len(found) != 1:
        raise UserError(
            f"{path}: must hold one file{f' {wanted}' if wanted else ''}; found {', '.join(files)}"
        )
    return found[0]
