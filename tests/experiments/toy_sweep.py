"""A sweep over the toy config."""

from pathlib import Path

CONFIG = str(Path(__file__).with_name("toy_config.py"))


def get_sweep(variant: str = ""):
    for method in ("dense", "80/60", "50/50", "static-80", "static-50"):
        yield method.replace("/", "-"), f"{CONFIG}:{method}", {"steps": 10}
    if variant == "nan":
        yield "spoilt", f"{CONFIG}:nan", {"optimizer.schedule.name": "cosine"}
