"""Set before jax is imported: eight fake CPU devices, the TPU compiler, no silent promotion."""

import gc
import importlib.metadata
import os
from pathlib import Path

import pytest

from experiments.tpu import library

# Later versions of XLA end the process at this flag.
KNOWS_FUSION_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 "  # Most of the time of the tests goes into compiling.
    "--xla_cpu_parallel_codegen_split_count=1 "  # Each worker has one core.
    + ("--xla_cpu_use_fusion_emitters=false " if KNOWS_FUSION_EMITTERS else "")
    + os.environ.get("XLA_FLAGS", "")
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # A tenth of a small program's compile time.
# The same programs are compiled again and again, by many tests and in the processes they start.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
library.use()
# Traced programs are many objects that live long: collecting as often as Python does by default
# took a twentieth of the time of the tests.
gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Refuses names that differ between processes, with which pytest-xdist runs nothing."""
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        for value in values:
            if isinstance(value, set | frozenset) and len(value) > 1 and str(value) in item.name:
                raise pytest.UsageError(f"{item.nodeid}: a set in the name; take a tuple, or an id")


@pytest.fixture(scope="session")
def native_cpu():
    """The compiled products of the CPU; skips where no compiler is."""
    from topkast_jax.always_sparse.products import native_library
    from topkast_jax.errors import SparsityError

    try:
        native_library.build()
    except SparsityError as error:
        pytest.skip(str(error))
    assert native_library.unavailable() is None
