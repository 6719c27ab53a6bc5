"""Every method of the package against the conformance suite, and the suite against broken ones."""

import functools

import pytest

import topkast_jax as tk
from topkast_jax import testing

METHODS = {
    "top_kast": functools.partial(tk.top_kast, forward_density=0.1, backward_density=0.2,
                                  refresh_every=2),
    "top_kast_every_step": functools.partial(tk.top_kast, forward_density=0.1,
                                             backward_density=0.2, refresh_every=1,
                                             inner_state="reset"),
    "top_kast_stopping": functools.partial(tk.top_kast, forward_density=0.1, backward_density=0.2,
                                           refresh_every=2, stop_exploring_at=3,
                                           inner_state="reset"),
    "top_kast_blocks": functools.partial(tk.top_kast, forward_density=0.25, backward_density=0.5,
                                         refresh_every=2, pattern=tk.Block(4, 2)),
    "static_random": functools.partial(tk.static_random, forward_density=0.1, seed=3),
}  # fmt: skip


# These differ from "top_kast" in options that only some checks can tell apart; -m slow runs all.
TELLING = {
    "top_kast_every_step": ("types", "inner_optimizers"),
    "top_kast_stopping": ("types", "checkpoints"),
    "top_kast_blocks": ("types", "precision", "ensemble", "sharding"),
    "static_random": ("types", "ensemble", "sharding", "checkpoints"),
}


def cases():
    for method in METHODS:
        for check in testing.CHECKS:
            rarely = check not in TELLING.get(method, testing.CHECKS)
            yield pytest.param(method, check, marks=[pytest.mark.slow] if rarely else [])


@pytest.mark.parametrize(("method", "check"), list(cases()))
def test_conformance(method, check):
    testing.check_method(METHODS[method], checks=[check])
