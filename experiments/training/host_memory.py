"""Host memory that a process frees is its own again for the next step."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_GROW_BY = 2**28


def keep_freed() -> bool:
    """Makes malloc keep what is freed, where it is glibc's; whether it is.

    On a CPU, XLA asks for a step's temporaries at each step. By default glibc gets more than 32 MB
    from the kernel each time, which hands out zeroed pages one fault at a time. Call it before the
    first large array is made.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another system, another C library
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: _GROW_BY, _ARENA_MAX: 1}
    taken = [bool(mallopt(name, value)) for name, value in settings.items()]
    return all(taken)
