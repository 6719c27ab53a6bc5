"""Finds the TPU compiler."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from experiments.errors import UserError

_VARIABLE = "TPU_LIBRARY_PATH"
_SETTINGS = {
    # Compilation uses no TPU, so that several processes may do it while another one trains.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Without these settings libtpu prints several lines about an unknown machine at its start.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def find() -> Path | None:
    """The libtpu.so of `TPU_LIBRARY_PATH`, of `scripts/setup aot`, or of an installed package."""
    candidates = [Path(sys.prefix) / "aot/libtpu/libtpu.so"]
    if _VARIABLE in os.environ:
        candidates.insert(0, Path(os.environ[_VARIABLE]))
    spec = importlib.util.find_spec("libtpu")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "libtpu.so")
    return next((path for path in candidates if path.is_file()), None)


def use() -> bool:
    """Tells JAX where the compiler is. It must be called before JAX looks for devices.

    Returns:
        Whether there is a compiler.
    """
    library = find()
    if library is None:
        os.environ.pop(_VARIABLE, None)
        return False
    os.environ[_VARIABLE] = str(library)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    return True


def require() -> None:
    """Does what `use` does; raises UserError if there is no compiler."""
    if not use():
        raise UserError(
            f"libtpu: found none in {sys.prefix}/aot, as a package, or at {_VARIABLE}; "
            "get it with scripts/setup aot (Linux on x86-64 only)"
        )
