"""Eight fake CPU devices for every test, and the TPU compiler; set before jax is imported."""

import os

from experiments.tpu import library

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
library.use()
