"""Batches of images that Grain reads: endless shuffled epochs, and exact evaluation passes."""

import dataclasses
import functools
import math
import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from experiments.errors import UserError
from experiments.grain_batches import EndlessBatches
from experiments.image_classification.data.preprocessing import Recipe
from experiments.image_classification.data.sources import ArraySource, Example, Source

Batch = dict[str, Any]
_ENDLESS = 2**40  # batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How batches are made.

    Attributes:
        recipe: how an image is prepared.
        image_size: the height and the width of the model's input.
        batch_size: the number of images in a batch, over all hosts.
        seed: the seed of the order and of the augmentation.
        threads: the number of batches that one process makes at the same time.
        workers: the number of processes that make batches; 0 makes them in this process.
        read_ahead: the number of batches that one process makes ahead, if not fewer than threads.
        host: the number of this host.
        hosts: the number of hosts; each of them makes its part of every batch.
    """

    recipe: Recipe
    image_size: int
    batch_size: int
    seed: int
    threads: int
    workers: int = 0
    read_ahead: int = 2
    host: int = 0
    hosts: int = 1


class TrainBatches(EndlessBatches):
    """Endless batches of freshly shuffled epochs, with a position.

    An epoch takes every image once, and its end may lie inside a batch. The content of a batch
    depends only on the seed and on its number, not on threads, workers or hosts.
    """

    def __init__(self, source: Source, options: Options):
        batches = grain.MapDataset.range(_ENDLESS).map(_TrainBatch(source, options))
        self._images = len(source)
        super().__init__(batches, functools.partial(_prefetch, options=options))

    def get_state(self) -> dict[str, int]:
        """The position, which `set_state` takes."""
        return {"batches": self.position, "images": self._images}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a position that `get_state` gave.

        Raises:
            UserError: the position belongs to another number of images.
        """
        there = state.get("images", self._images)
        if there != self._images:
            raise UserError(
                f"the checkpoint was trained on {there} images, and there are {self._images} here; "
                "bring back those images, or choose another --workdir"
            )
        self.go_to(state["batches"])


def eval_batches(source: Source, options: Options) -> Iterator[Batch]:
    """Every image once, in order. The last batch is padded with images of weight 0."""
    total = math.ceil(len(source) / options.batch_size) * options.batch_size
    examples = grain.MapDataset.range(total).map(_PaddedExample(source, options))
    mine = examples[options.host :: options.hosts]
    batches = iter(_prefetch(mine.batch(options.batch_size // options.hosts), options))
    try:
        yield from batches
    finally:
        batches.close()


def cached(source: Source, recipe: Recipe, size: int) -> ArraySource:
    """A source that keeps all images of another one in memory, decoded."""
    examples = [source[i] for i in range(len(source))]
    images = [recipe.to_fixed_size(example["image"], size) for example in examples]
    return ArraySource(images, [example["label"] for example in examples])


def _prefetch(batches: grain.MapDataset, options: Options) -> grain.IterDataset:
    ahead = max(options.read_ahead, options.threads)
    read = grain.ReadOptions(num_threads=options.threads, prefetch_buffer_size=ahead)
    made = batches.to_iter_dataset(read)
    if options.workers:
        if (
            not flags.FLAGS.is_parsed()
        ):  # The processes of Grain read its flags, which a test does not parse.
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=options.workers)
        made = made.mp_prefetch(workers, _end_with_parent)
        # Batches come in shared memory, which Grain frees in a thread when they are dropped. Those
        # that an error keeps until the process ends would never be freed, and be complained of.
        made = made.map(_copied)
    return made


def _end_with_parent(worker: int, workers: int) -> None:
    """Ends a process of Grain when the one that started it is killed, which Grain does not see."""
    del worker, workers

    def end() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _copied(batch: Batch) -> Batch:
    return {name: np.array(values) for name, values in batch.items()}


class _TrainBatch(grain.transforms.Map):
    """Chooses and augments the images of the batch of a number.

    With Grain's own `shuffle` and `random_map`, which take one example at a time, a small model on
    a CPU would spend as much time on its input as on its steps.
    """

    def __init__(self, source: Source, options: Options):
        self._source, self._options = source, options
        self._epochs: dict[int, np.ndarray] = {}

    def map(self, element: int) -> Batch:
        options, recipe = self._options, self._options.recipe
        own = np.arange(options.host, options.batch_size, options.hosts)
        epochs, places = np.divmod(int(element) * options.batch_size + own, len(self._source))
        examples = [
            self._source[int(self._order(int(epoch))[place])]
            for epoch, place in zip(epochs, places, strict=True)
        ]
        # All hosts draw for the whole batch, so that an image is augmented alike on any of them.
        draws = _random(options.seed, 1, int(element)).random((options.batch_size, recipe.draws))
        images = [example["image"] for example in examples]
        return {
            "image": recipe.augment(images, options.image_size, draws[own]),
            "label": np.asarray([example["label"] for example in examples], np.int32),
        }

    def _order(self, epoch: int) -> np.ndarray:
        """The images in the order of an epoch. Batches that are made ahead need two of them."""
        order = self._epochs.get(epoch)
        if order is None:
            order = _random(self._options.seed, 0, epoch).permutation(len(self._source))
            self._epochs = {epoch: order} | dict([*self._epochs.items()][:1])
        return order


def _random(seed: int, purpose: int, number: int) -> np.random.Generator:
    """Random numbers for one purpose; 0 is the order of an epoch, 1 the augmentation of a batch."""
    return np.random.default_rng((seed, purpose, number))


class _PaddedExample(grain.transforms.Map):
    """Prepares the example of a number for evaluation; after the last one, padding of weight 0."""

    def __init__(self, source: Source, options: Options):
        self._source = source
        self._recipe, self._size = options.recipe, options.image_size

    def map(self, element: int) -> Example:
        real = element < len(self._source)
        example = self._source[int(element) if real else 0]
        image = self._recipe.centre(example["image"], self._size)
        return {
            "image": image if real else np.zeros_like(image),
            "label": example["label"] if real else np.int32(0),
            "weight": np.float32(real),
        }
