"""The accuracy of single entries and of blocks of 16, 32 and 128 at the same densities.

It reproduces no row of the paper. The runs are those of `configs/enwik8_small.py`, shortened to 400
steps with a refresh every 40 steps: Top-KAST 75/50, and 90/80 without blocks of 128, of which a
kernel of 256×256 has only four.

Hardware: two CPU cores, two minutes for 400 steps of the dense model (0.28 s each, 2026-11-30), and
the test.

Command:
    python -m experiments.sweep --config=configs/sweeps/enwik8_small_blocks.py --seeds=3 \
        --workdir=runs/blocks
"""

from collections.abc import Iterator

PATTERNS = {
    "entries": "unstructured",
    "blocks_16": "block:16x16",
    "blocks_32": "block:32x32",
    "blocks_128": "block:128x128",
}
SHORT: dict[str, object] = {
    "steps": 400,
    "method.refresh_every": 40,
    "checkpoint_every": 0,
    "log_every": 100,
}


def get_sweep() -> Iterator[tuple[str, str, dict[str, object]]]:
    # The denser network has the smaller learning rate, as in configs/enwik8_small.py.
    for variant, rate in (("75/50", 3e-3), ("90/80", 1e-2)):
        for name, pattern in PATTERNS.items():
            if variant == "75/50" or name != "blocks_128":
                overrides = SHORT | {"method.pattern": pattern, "optimizer.learning_rate": rate}
                yield (
                    f"{variant.replace('/', '_')}_{name}",
                    f"configs/enwik8_small.py:{variant}",
                    overrides,
                )
