"""Measures how many images a second and a core the input pipeline makes, and what a chip needs.

    .venv/bin/python scripts/bench_input.py [--config=configs/NAME.py:VARIANT] [--images=N] \
        [--seconds=S] [--chip=v5e] [--chip_images=N] [--config.KEY=VALUE …]

It writes synthetic JPEGs of ImageNet's size (500×375 pixels, about 110 kB) into a temporary
folder, and reads them as a run of the config would: decoded, cropped, flipped and batched by Grain,
with `data.threads`, `data.workers` and `data.read_ahead`. The files stay in the page cache, so this
is the work of the cores and not that of a disk. A batch has 256 images without
`--config.batch_size`.

Images a second and a core are images over the processor time of all processes, which other programs
on the machine disturb little. What one chip needs is its peak over the FLOPs of training on one
image, three times those of the forward pass: no step is faster. `--chip_images` takes another
number, such as the batch size over the `roofline_seconds` of scripts/aot_tpu.py. The last line is
JSON.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.chips import CHIPS
from experiments.config import command_line, load, resolve
from experiments.errors import UserError
from experiments.records.summary import leaf_flops
from experiments.task import make_task

WIDTH, HEIGHT, QUALITY, NOISE = 500, 375, 95, 8.0  # Together they make files of about 110 kB.
BATCH = 256


def make_images(root: Path, count: int) -> int:
    """Writes a data set of two classes with so many training images; returns their mean size."""
    rng, sizes = np.random.default_rng(0), []
    for number in range(count + 2):
        split = "train" if number < count else "test"
        folder = root / split / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        pixels = smooth + rng.normal(0, NOISE, (HEIGHT, WIDTH, 1))
        path = folder / f"{number}.jpg"
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=QUALITY)
        sizes.append(path.stat().st_size)
    return round(sum(sizes) / len(sizes))


def processor_seconds() -> float:
    """The processor time of this process and of the worker processes that live."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure(data: Any, batch_size: int, seconds: float) -> tuple[float, float]:
    """Images a second, and images a second of processor time; the first batch is not counted."""
    next(data)
    begun, used, batches = time.perf_counter(), processor_seconds(), 0
    while (passed := time.perf_counter() - begun) < seconds or not batches:
        next(data)
        batches += 1
    images = batches * batch_size
    return images / passed, images / (processor_seconds() - used)


def report(
    spec: str, overrides: Sequence[str], count: int, seconds: float, chip: str, needs: int | None
) -> dict[str, Any]:
    """Measures one config; returns the record that is printed."""
    task = getattr(load(spec), "task", None)
    if task not in ("image_classification", None):  # What has no task is refused by resolve.
        raise UserError(f"--config={spec}: of the task {task}; must be of image_classification")
    with tempfile.TemporaryDirectory() as folder:
        own = [f"data.dir={folder}", "data.name=image_folder", "data.cache=False"]
        if not any(text.startswith("batch_size=") for text in overrides):
            own.append(f"batch_size={BATCH}")
        config = resolve(spec, [*own, *overrides])
        size = make_images(Path(folder), max(count, config.batch_size))
        task = make_task(config)
        data = task.train_data()
        try:
            rate, of_a_core = measure(data, config.batch_size, seconds)
        finally:
            data.close()  # type: ignore[attr-defined]
    flops = 3 * sum(leaf_flops(task).values()) / config.batch_size
    needed = needs or round(CHIPS[chip].flops / flops)
    return {
        "config": config.name,
        "overrides": list(overrides),
        "bytes_an_image": size,
        **{key: config.data[key] for key in ("threads", "workers", "read_ahead")},
        "images_per_second": round(rate, 1),
        "images_per_second_per_core": round(of_a_core, 1),
        "chip": chip,
        "chip_images_per_second": needed,
        "cores_per_chip": math.ceil(needed / of_a_core),
    }


@command_line.command
def main(argv: list[str]) -> None:
    """Runs the command line."""
    parser = command_line.Parser(prog="scripts/bench_input.py", description=__doc__)
    parser.add_argument("--config", default="configs/imagenet_resnet50.py:dense")
    parser.add_argument("--images", type=command_line.positive, default=512)
    parser.add_argument("--seconds", type=command_line.positive, default=20)
    parser.add_argument("--chip", choices=[*CHIPS], default="v5e")
    parser.add_argument("--chip_images", type=command_line.positive, help="a second")
    args, overrides = command_line.parse(parser, argv)
    found = report(args.config, overrides, args.images, args.seconds, args.chip, args.chip_images)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
