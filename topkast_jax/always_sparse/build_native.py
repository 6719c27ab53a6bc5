"""Compiles the products of compact kernels, and convolutions, for this CPU, once.

    python -m topkast_jax.always_sparse.build_native

Afterwards `matmul` (backend "native_cpu") and the image models of `experiments` use them on CPUs;
without them, XLA computes. It needs a C++ compiler: CXX, or c++, g++ or clang++. The library is
written to the user's folder for caches, XDG_CACHE_HOME or ~/.cache. Prints its path.
"""

from __future__ import annotations

import argparse
import sys

from topkast_jax.always_sparse.products import native_library
from topkast_jax.errors import SparsityError


def main(argv: list[str] | None = None) -> int:
    """Returns the status of the command: 0, or 2 after one line that says what is missing."""
    parser = argparse.ArgumentParser(
        prog=native_library.COMMAND,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    try:
        print(native_library.build())
    except SparsityError as error:
        print(f"build_native: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
