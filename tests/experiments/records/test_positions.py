"""A position in the data belongs to no number of hosts: nothing is repeated, nothing is skipped."""

import collections

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.image_classification.data.pipeline import Options, TrainBatches
from experiments.image_classification.data.preprocessing import Recipe
from experiments.image_classification.data.sources import ArraySource
from experiments.language_modelling.data.streams import Share, TrainStream
from experiments.records.checkpoints import meta_of

STAGES = ((2, 3), (1, 4), (4, 2), (2, 1))  # hosts, and the batches that they take


PLAIN = Recipe(mean=(0.0,), std=(1.0,))  # images as they are


def images(host, hosts):
    source = ArraySource([np.full((2, 2, 1), i, np.uint8) for i in range(40)], list(range(40)))
    options = Options(
        recipe=PLAIN, image_size=2, batch_size=8, seed=3, threads=1, host=host, hosts=hosts
    )
    return TrainBatches(source, options)


class Numbers:
    """A text whose tokens are their own places."""

    def __len__(self):
        return 61

    def read(self, start, stop):
        return np.arange(start, stop)


def text(host, hosts):
    return TrainStream(Numbers(), 8, 3, Share(host, hosts), {"size": 61})


def taken(make, stages):
    """The batches of all hosts, put together, where every stage goes on from the one before."""
    state, batches = None, []
    for hosts, count in stages:
        parts = [make(host, hosts) for host in range(hosts)]
        for part in parts:
            if state is not None:
                part.set_state(state)
        for _ in range(count):
            own = [next(part) for part in parts]
            batches.append({k: np.concatenate([b[k] for b in own]) for k in own[0]})
        metas = [{"data": part.get_state()} for part in parts]
        state = meta_of(metas, 0, 1)["data"]
        for part in parts:
            part.close()
    return batches


def test_images():
    batches = taken(images, STAGES)
    labels = np.concatenate([batch["label"] for batch in batches]).tolist()
    assert set(collections.Counter(labels).values()) == {2}  # two whole epochs
    assert sorted(labels[:40]) == list(range(40))
    for one, other in zip(batches, taken(images, [(1, 10)]), strict=True):
        assert sorted(one["label"]) == sorted(other["label"])


@pytest.mark.slow
def test_text():
    for one, other in zip(taken(text, STAGES), taken(text, [(1, 10)]), strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
        np.testing.assert_array_equal(one["targets"], other["targets"])


def test_positions_that_belong_to_hosts_are_refused_elsewhere():
    metas = [{"data": {"rows": 3}}, {"data": {"rows": 5}}]
    assert meta_of(metas, 1, 2) == metas[1]
    with pytest.raises(UserError, match=r"saved by 2 hosts, each with a position .* found 4"):
        meta_of(metas, 0, 4)
