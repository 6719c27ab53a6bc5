"""One byte an entry: the sets it is in now, was in at the start, and has ever been in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.method import Sets

FORWARD = 1
BACKWARD = 2
START_FORWARD = 4
START_BACKWARD = 8
LAST_FORWARD = 16
EVER_FORWARD = 32


def has(flags: jax.Array, bit: int) -> jax.Array:
    """Where a bit is set."""
    return flags & np.uint8(bit) != 0


def explores(flags: Any) -> Any:
    """Whether any entry is in the backward set alone; of NumPy flags, on the host."""
    return (has(flags, BACKWARD) & ~has(flags, FORWARD)).any()


def unpack(flags: jax.Array) -> Sets:
    """The present sets of a leaf, by entry."""
    return Sets(has(flags, FORWARD), has(flags, BACKWARD))


def first_flags(sets: Sets) -> jax.Array:
    """Flags of sets that have just started."""
    forward = FORWARD | START_FORWARD | LAST_FORWARD | EVER_FORWARD
    backward = BACKWARD | START_BACKWARD
    return _pick(sets.forward, forward) | _pick(sets.backward, backward)


def next_flags(flags: jax.Array, sets: Sets) -> jax.Array:
    """Flags after a choice: the new sets, and the history with the old forward set as the last."""
    history = flags & np.uint8(START_FORWARD | START_BACKWARD | EVER_FORWARD)
    last = _pick(has(flags, FORWARD), LAST_FORWARD)
    new = _pick(sets.forward, FORWARD | EVER_FORWARD) | _pick(sets.backward, BACKWARD)
    return history | last | new


def frozen_flags(flags: jax.Array) -> jax.Array:
    """Flags with the forward set in use as the backward set too."""
    return jnp.where(
        has(flags, FORWARD), flags | np.uint8(BACKWARD), flags & np.uint8(255 - BACKWARD)
    )


def _pick(mask: jax.Array, bits: int) -> jax.Array:
    return jnp.where(mask, np.uint8(bits), np.uint8(0))
