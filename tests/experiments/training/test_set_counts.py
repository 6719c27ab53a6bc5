"""Densities and training FLOPs over a run, against sums over its steps made by hand."""

import json

import numpy as np
import pytest
from toy import CLASSES, INPUTS
from toy_runs import config as toy_config
from toy_runs import run

from experiments.records import summary
from experiments.task import make_task
from topkast_jax import keep_count

STEPS = 20
KERNELS = np.array([INPUTS * 32, 32 * CLASSES])  # both sparse; every product is with one of them


def kept(density):
    return np.array([keep_count(int(n), density) for n in KERNELS])


def top_kast(step, stop):
    """All explore up to the step `stop`, whose update still uses B."""
    return kept(0.2), kept(0.4 if step <= stop else 0.2)


def rigl(step):
    """Every third step brings the dense gradient from which the next sets are chosen."""
    return kept(0.2), KERNELS if step % 3 == 0 else kept(0.2)


def pruning(step):
    """Choices after the steps 3, 6, …; dense until step 2, at a fifth from step 14 on."""
    chosen_at = (step - 1) // 3 * 3
    left = (1 - np.clip((chosen_at - 2) / 12, 0, 1)) ** 3
    count = kept(0.2) + np.round((KERNELS - kept(0.2)) * left).astype(int)
    return count, count


def snip(step):
    """Dense in the first step; the units are shared out over both kernels at once."""
    return (KERNELS, KERNELS) if step == 1 else (kept(0.2), kept(0.2))


STOP = "method.stop_exploring_at"
COMPACT = "method.always_sparse=True"


@pytest.mark.parametrize(
    ("sets", "overrides"),
    [
        (lambda step: top_kast(step, 11), (f"{STOP}=11",)),
        *[
            pytest.param(
                lambda step, stop=stop: top_kast(step, stop), options, marks=pytest.mark.slow
            )
            for stop, options in (
                (10, (f"{STOP}=10",)),  # right after a choice
                (7, (f"{STOP}=7", "method.refresh_every=1")),
                (0, (f"{STOP}=0",)),
            )
        ],
        (lambda step: top_kast(step, 11), (f"{STOP}=11", COMPACT, "method.refresh_delay=1")),
        (rigl, ("method.name=rigl",)),
        (pruning, ("method.name=pruning", "method.begin_at=2", "method.end_at=14")),
        pytest.param(snip, ("method.name=snip",), marks=pytest.mark.slow),
    ],
)
def test_final_is_over_the_run(tmp_path, sets, overrides):
    assert run(tmp_path / "run", "80/60", *overrides) == "finished"
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    forward, backward = (
        np.sum([sets(step)[which] for step in range(1, STEPS + 1)]) / (STEPS * KERNELS.sum())
        for which in (0, 1)
    )
    found = final["densities_over_run"]
    assert found["forward"] == pytest.approx(forward, abs=1e-12)
    assert found["backward"] == pytest.approx(backward, abs=1e-12)
    assert final["densities"]["forward"] == pytest.approx(sum(sets(STEPS)[0]) / KERNELS.sum())
    training = (2 * forward + backward) / 3
    assert final["flops"]["training_fraction"] == pytest.approx(training, abs=1e-12)
    inference = final["densities"]["forward"]
    assert final["flops"]["inference_fraction"] == pytest.approx(inference)
    config = toy_config("80/60", *overrides)
    told_before = summary.description(config, make_task(config))
    assert told_before["training_flops_fraction"] == pytest.approx(training, abs=1e-12)
    assert told_before["active_parameters"] == final["active_parameters"]
