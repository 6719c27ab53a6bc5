"""The config of the toy task; `nan` spoils a batch."""

import sys
from pathlib import Path

from experiments.config import apply_variant, base_config
from experiments.task import register_task

sys.path.append(str(Path(__file__).parent))
register_task("toy", "toy")


def get_config(variant: str = ""):
    config = base_config("toy")
    config.steps = 20
    config.batch_size = 32
    config.log_every = 5
    config.method.refresh_every = 3
    flags = apply_variant(config, variant, flags=("nan",))
    if "nan" in flags:
        config.data.poison = 13
    return config
