"""Memory that is freed is used again, in place of pages that the kernel has to clear anew."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from topkast_jax import host_memory
kept = sys.argv[1] == "keep" and host_memory.keep_freed()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
c.free.argtypes, size = [ctypes.c_void_p], 2**26
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(4):
    before, p = faults(), c.malloc(size)
    c.memset(p, 1, size)
    c.free(p)
print(kept, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc")
def test_large_memory_that_was_freed_comes_back_without_new_pages():
    kept, faults = {}, {}
    for how in ("keep", "return"):
        out = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
        ).stdout.split()
        kept[how], faults[how] = out[0], int(out[1])
    assert kept == {"keep": "True", "return": "False"}
    assert faults["keep"] < faults["return"] / 10
