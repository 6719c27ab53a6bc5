"""Processes that tests start."""

import os


def one_device(optimization=0):
    """What `os.environ` becomes for a process with one CPU device in place of the tests' eight.

    `optimization`: XLA's level, 0 as in the tests' own processes; 1 where programs run for long.
    """
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    flags = flags.replace("optimization_level=0", f"optimization_level={optimization}")
    return os.environ | {"XLA_FLAGS": flags}
