"""Runs whose sparse layers are initialised for the inputs that they keep."""

import jax
import numpy as np
import pytest
from toy_runs import config

from experiments.errors import UserError
from experiments.training.program import build

SCALED = "method.scale_to_fan_in=True"


def first(*overrides):
    """The representation and the state before the first step, and its dense parameters."""
    held = build(config("static-80", *overrides), jax.devices()[:1]).representation
    state = held.init()
    return held.to_masked(state).params


@pytest.mark.parametrize("form", [(), ("method.always_sparse=True",)])
def test_kept_entries_are_larger_by_the_root_of_the_share_of_inputs(form):
    plain, scaled = first(*form), first(SCALED, *form)
    for layer in ("in", "out"):
        one, other = np.asarray(plain[layer]["kernel"]), np.asarray(scaled[layer]["kernel"])
        ratio = other / one
        kept = ratio > 1
        assert kept.sum() == round(0.2 * kept.size)
        expected = np.sqrt(len(one) / np.maximum(kept.sum(0, keepdims=True), 1))
        np.testing.assert_allclose(ratio, np.where(kept, expected, 1), rtol=1e-5)


def test_a_method_without_first_sets_is_one_line():
    with pytest.raises(UserError, match="scale_to_fan_in: found True; must be False with snip"):
        build(config("snip-80", SCALED))
