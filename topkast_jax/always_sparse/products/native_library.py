"""The library that the C++ files here are compiled to: where it is, how it is made, its calls.

It is compiled for the processor at hand by a C++ compiler of the system, with the headers of the
installed jaxlib, once: `python -m topkast_jax.always_sparse.build_native`. Its name has a hash of
the sources, the flags, jaxlib's version, the processor's instructions and the C library, so that
another version, or another machine that shares the folder, does not find it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import jax
import jaxlib.version

from topkast_jax.errors import SparsityError
from topkast_jax.varying import result_like

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in ("native_tiles.h", "native_cpu.cc", "native_convolutions.cc")
)
TARGETS = (
    "topkast_block_spmm",
    "topkast_block_sddmm",
    "topkast_entry_spmm",
    "topkast_entry_sddmm",
    "topkast_convolution",
    "topkast_convolution_kernel_gradient",
    "topkast_channel_sums",
    "topkast_max_pool",
    "topkast_max_pool_gradient",
)
COMMAND = "python -m topkast_jax.always_sparse.build_native"
COMPILERS = ("c++", "g++", "clang++")
_registered: list[ctypes.CDLL] = []
_lock = threading.Lock()


@functools.cache
def path() -> Path:
    """Where the library for this machine is, or will be: in the user's folder for caches."""
    sources = [source.read_bytes() for source in SOURCES]
    parts = (*sources, *_flags(), jaxlib.version.__version__, _processor())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else f"\0{part}".encode())
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(folder) / "topkast_jax" / f"native_cpu-{digest.hexdigest()[:16]}.so"


def unavailable() -> str | None:
    """Why the library cannot be used, or None; the first call that finds it loads it."""
    if _registered:
        return None
    with _lock:
        if _registered:
            return None
        library = _load()
        if isinstance(library, str):
            return library
        for name in TARGETS:
            handler = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
        _registered.append(library)
    return None


def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        if not path().exists():
            return f"its kernels are not compiled yet ({COMMAND})"
        library = ctypes.CDLL(str(path()))
        for name in TARGETS:
            getattr(library, name)
    except (OSError, AttributeError) as error:
        return f"its kernels cannot be loaded: {error}"
    return library


def call(
    target: str, results: list[tuple[Any, Any]], arrays: tuple[jax.Array, ...], **attributes: Any
) -> list[jax.Array]:
    """Calls a function of the library.

    Args:
      target: its name, one of `TARGETS`.
      results: shape and dtype of each result.
      arrays: the operands.
      **attributes: NumPy integers and arrays, or bool.

    Returns:
      The results. Under `vmap`, the function is called once for each element.

    Raises:
      RuntimeError: the library cannot be used.
    """
    if reason := unavailable():
        raise RuntimeError(f"{target}: {reason}")
    types = [result_like(shape, dtype, arrays[0]) for shape, dtype in results]
    called = jax.ffi.ffi_call(target, types, vmap_method="sequential")
    return list(called(*arrays, **attributes))


def build() -> Path:
    """Compiles the library unless it is there and loads; two processes may do so at once.

    Returns:
      `path()`.

    Raises:
      SparsityError: there is no compiler, or it fails, or the folder cannot be written, or what it
        made cannot be loaded.
    """
    if not isinstance(_load(), str):
        return path()
    try:
        compiler = _compiler()
        path().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path().parent) as folder:
            made = Path(folder) / path().name
            headers = ("-isystem", jax.ffi.include_dir())
            files = [str(source) for source in SOURCES if source.suffix == ".cc"]
            command = [*compiler, *_flags(), *headers, *files, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                said = next((line for line in lines if "error" in line), lines[0])
                raise SparsityError(f"{shlex.join(compiler)} failed: {said}")
            os.replace(made, path())
    except OSError as error:
        raise SparsityError(f"the CPU kernels cannot be compiled: {error}") from error
    if isinstance(reason := _load(), str):
        raise SparsityError(f"{shlex.join(compiler)} made {path()}, and {reason}")
    return path()


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX")
    names = [chosen] if chosen else list(COMPILERS)
    for name in names:
        try:
            command = shlex.split(name)
        except ValueError as error:
            raise SparsityError(f"CXX: found {name!r}: {error}") from error
        if command and shutil.which(command[0]):
            return command
    where = "CXX" if chosen else "PATH"
    raise SparsityError(f"no C++ compiler in {where}: looked for {', '.join(names)}")


def _flags() -> tuple[str, ...]:
    arm = platform.machine().lower() in ("arm64", "aarch64")
    native = "-mcpu=native" if arm else "-march=native"
    return ("-std=c++17", "-O3", native, "-ffp-contract=fast", "-shared", "-fPIC", "-w")


def _processor() -> str:
    """What instructions this processor has, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    said = (line.partition(":") for line in lines)
    flags = next((value for key, _, value in said if key.strip() in ("flags", "Features")), "")
    return f"{platform.system()} {platform.machine()} {platform.libc_ver()} {flags}"
