"""Memory that is freed is used again, in place of pages that the kernel has to clear anew."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from experiments import host_memory
kept = sys.argv[1] == "keep" and host_memory.keep_freed()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.sum(jnp.sort(jnp.outer(x, x), axis=0)))
x = jnp.ones(4096)
step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step(x).block_until_ready()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's malloc")
def test_a_step_finds_the_memory_of_the_last_one():
    kept, faults = {}, {}
    for how in ("keep", "return"):
        out = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
        ).stdout.split()
        kept[how], faults[how] = out[0], int(out[1])
    assert kept == {"keep": "True", "return": "False"}
    assert faults["keep"] < faults["return"] / 10
