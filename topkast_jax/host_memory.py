"""Settings of malloc, so that a process keeps the memory that it frees for its next step."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_GROW_BY = 2**28


def keep_freed() -> bool:
    """Makes malloc keep the memory that is freed. Call it before the first large array is made.

    On a CPU, XLA allocates the temporaries of a step in every step. By default, glibc returns
    allocations above 32 MB to the kernel, which then hands out zeroed pages again, with one page
    fault each. `experiments.main` calls this for runs on a CPU. The setting is that of the whole
    process, which holds the most memory that it ever needed until it ends.

    Returns:
      Whether malloc accepted the settings; only glibc's does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # Another system or C library.
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: _GROW_BY, _ARENA_MAX: 1}
    taken = [bool(mallopt(name, value)) for name, value in settings.items()]
    return all(taken)
