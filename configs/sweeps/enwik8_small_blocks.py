"""What blocks cost in accuracy: single entries and blocks of 16, 32 and 128 at the same densities.

Reproduces no row of the paper. Top-KAST 75/50, for a kernel of 256×256 has four blocks of 128, and
90/80 without these; `configs/enwik8_small.py` cut to 400 steps, refresh every 40. Hardware: two CPU
cores.

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
    # The denser network takes the smaller steps, as in configs/enwik8_small.py.
    for variant, rate in (("75/50", 3e-3), ("90/80", 1e-2)):
        for name, pattern in PATTERNS.items():
            if variant == "75/50" or name != "blocks_128":
                overrides = SHORT | {"method.pattern": pattern, "optimizer.learning_rate": rate}
                yield (
                    f"{variant.replace('/', '_')}_{name}",
                    f"configs/enwik8_small.py:{variant}",
                    overrides,
                )
