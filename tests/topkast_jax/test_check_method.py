"""Every method of the package against the conformance suite, and the suite against broken ones."""

import functools

import optax
import pytest

import topkast_jax as tk
from topkast_jax import testing
from topkast_jax.methods.pruning import Pruning

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
    "injected": lambda inner: optax.inject_hyperparams(tk.top_kast)(inner, 0.1, 0.2, 2),
}  # fmt: skip


# These differ from "top_kast" in options that only some checks can tell apart; -m slow runs all.
TELLING = {
    "top_kast_every_step": ("types",),
    "top_kast_stopping": ("types", "checkpoints"),
    "top_kast_blocks": ("types",),
    "injected": (),
    "static_random": ("types", "ensemble", "checkpoints"),
}


def cases():
    for method in METHODS:
        for check in testing.CHECKS:
            rarely = check not in TELLING.get(method, testing.CHECKS)
            yield pytest.param(method, check, marks=[pytest.mark.slow] if rarely else [])


@pytest.mark.parametrize(("method", "check"), list(cases()))
def test_conformance(method, check):
    testing.check_method(METHODS[method], checks=[check])


def test_hyperparameters_have_numbers():
    injected, plain = (
        testing.leaves_of(METHODS[name](optax.sgd(0.1)), testing.example())
        for name in ("injected", "top_kast")
    )
    assert list(injected) == list(plain) == ["in/kernel", "out/kernel"]
    for path, leaf in injected.items():
        assert tuple(map(int, leaf.counts)) == plain[path].counts


class Scheduled(Pruning):
    allocate = tk.Method.allocate  # `scheduled` alone changes the counts.


@pytest.mark.parametrize(
    ("factory", "fixed"),
    [
        (METHODS["top_kast"], True),
        (METHODS["injected"], True),
        (lambda inner: tk.sparsify(inner, Scheduled(1, 9), forward_density=0.1), False),
        (lambda inner: optax.inject_hyperparams(tk.methods.pruning)(inner, 0.1, 1, 9), False),
    ],
)
def test_the_suite_knows_which_counts_change(factory, fixed):
    assert testing._has_fixed_counts(factory(optax.sgd(0.1)), testing.example()) is fixed


PATTERNS = (tk.Unstructured(), tk.Block(4, 2), tk.Channel(), tk.NOfM(2, 4), tk.FanIn())
OPTIONS = {
    "top_kast": {"backward_density": 0.75, "refresh_every": 2},
    "static_random": {"seed": 0},
    "pruning": {"begin_at": 0, "end_at": 4, "refresh_every": 2},
    "pruning globally": {"begin_at": 0, "end_at": 4, "refresh_every": 2, "ranking": "global"},
    "top_kast at random": {
        "backward_density": 0.75, "refresh_every": 2, "exploration_set": "random",
    },
    "snip": {},
}  # fmt: skip
RANKED_OVER_ALL = ("snip", "snfs", "pruning globally")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", sorted({*tk.methods.names(), *OPTIONS}))
def test_every_method_takes_every_pattern_or_refuses_it(name, pattern):
    options = dict(OPTIONS.get(name, {"refresh_every": 2}))
    if name != "srigl":
        options["pattern"] = pattern
    elif pattern != tk.FanIn():
        pytest.skip("SRigL has a pattern of its own")
    make = functools.partial(tk.methods.get(name.split()[0]), forward_density=0.5, **options)
    if name in RANKED_OVER_ALL and isinstance(pattern, tk.NOfM | tk.FanIn):
        with pytest.raises(tk.SparsityError, match="fixes how many each group keeps"):
            testing.check_method(make, checks=["types"])
    else:
        testing.check_method(make, checks=["types", "checkpoints"])
