"""Streams of text against plain NumPy slicing."""

import json

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.language_modelling.data.corpus import ArrayTokens
from experiments.language_modelling.data.streams import (
    EvalPlan,
    Share,
    TrainStream,
    eval_segments,
)
from experiments.language_modelling.models.settings import Lengths, TransformerXLConfig
from experiments.language_modelling.models.transformer_xl import LanguageModel

ALL = Share()
TEXT = {"vocabulary": "abc", "tokens": 103}


def tokens(count):
    return ArrayTokens(np.arange(count, dtype=np.uint16))


def stream(count=103, lanes=4, target=7, share=ALL, text=TEXT):
    return TrainStream(tokens(count), lanes, target, share, text)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_lanes_are_contiguous_and_go_round():
    data = stream()
    starts = [lane * 103 // 4 for lane in range(4)]
    for number, batch in enumerate(take(data, 40)):
        for lane, start in enumerate(starts):
            places = (start + number * 7 + np.arange(8)) % 103
            np.testing.assert_array_equal(batch["tokens"][lane], places[:-1])
            np.testing.assert_array_equal(batch["targets"][lane], places[1:])
    data.close()


def test_every_token_is_seen_in_an_epoch():
    data = stream()
    steps = -(-103 // (4 * 7)) + 1
    seen = np.concatenate([batch["targets"].ravel() for batch in take(data, steps)])
    assert set(seen) == set(range(103))
    data.close()


def test_position_survives_json():
    data, resumed = stream(), stream()
    take(data, 5)
    resumed.set_state(json.loads(json.dumps(data.get_state())))
    for one, other in zip(take(data, 4), take(resumed, 4), strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
    assert data.get_state() == resumed.get_state()
    resumed.set_state({"segments": 0, "text": TEXT})
    np.testing.assert_array_equal(next(resumed)["tokens"][0], np.arange(7))
    data.close()
    resumed.close()


@pytest.mark.parametrize("key", ["vocabulary", "tokens"])
def test_position_in_another_text_is_refused(key):
    state = stream().get_state() | {"text": TEXT | {key: "other"}}
    with pytest.raises(UserError, match=f"another text: {key} is 'other' there"):
        stream().set_state(state)


def test_each_host_reads_its_lanes():
    whole = next(stream())["tokens"]
    parts = [next(stream(share=Share(host, 2)))["tokens"] for host in range(2)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("count", [2, 9, 57, 100, 101, 1003])
@pytest.mark.parametrize("lanes", [1, 2, 5, 8])
@pytest.mark.parametrize("warmup", [0, 1, 6])
def test_evaluation_counts_each_token_once(count, lanes, warmup):
    plan = EvalPlan(count - 1, 8, lanes, warmup)
    batches = list(eval_segments(tokens(count), plan, range(8)))
    assert len(batches) == plan.steps
    targets, weights = (np.stack([b[key] for b in batches]) for key in ("targets", "weights"))
    counted = np.sort(targets[weights == 1])
    np.testing.assert_array_equal(counted, np.arange(1, count))
    assert set(np.unique(weights)) <= {0, 1}
    read = np.stack([batch["tokens"] for batch in batches], axis=1)
    for lane in range(lanes):
        start = lane * plan.own * 8
        real = read[lane].ravel()[: max(0, count - start)]
        np.testing.assert_array_equal(real, start + np.arange(len(real)))
        assert lane == 0 or not weights[: plan.warmup, lane].any()


def test_reach_goes_through_the_memories_of_all_layers():
    def reach(n_layer, memory, target):
        sizes = dict.fromkeys(("n_token", "n_head", "d_model", "d_head", "d_inner"), 2)
        model = LanguageModel(TransformerXLConfig(n_layer=n_layer, **sizes))
        return model.reach(Lengths(target=target, memory=memory))

    assert reach(n_layer=4, memory=128, target=128) == 4
    assert reach(n_layer=3, memory=129, target=128) == 6
    assert reach(n_layer=12, memory=0, target=80) == 0


def test_more_lanes_read_less():
    steps = [EvalPlan(10_000, 8, lanes, 6).steps for lanes in (1, 2, 8, 32)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == 1250
    assert steps[-1] == 6 + -(-(1250 - 6) // 32)
