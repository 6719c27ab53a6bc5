"""Reads data sets that tensorflow_datasets prepared, without TensorFlow."""

from typing import Any

import numpy as np

from experiments.errors import UserError
from experiments.image_classification.data.sources import Example, decode

# The number of classes of each data set, and the split that is evaluated.
DATASETS = {
    "cifar10": (10, "test"),
    "imagenet2012": (1000, "validation"),
    "mnist": (10, "test"),
}


class TfdsSource:
    """The records of a prepared data set. Pillow decodes the images.

    Args:
        name: the name of the builder.
        split: "train" or "test".
        data_dir: the folder with prepared data sets; "" for the default of tensorflow_datasets.
        channels: 1 for grey images, 3 for colour images.
    """

    def __init__(self, name: str, split: str, data_dir: str, channels: int):
        self._arguments = (name, split, data_dir, channels)
        self._name = f"{name}/{split}"
        self._channels = channels
        self._records = open_records(name, split, data_dir)

    def __reduce__(self) -> tuple[type["TfdsSource"], tuple[str, str, str, int]]:
        """Makes a worker process open the files itself."""
        return TfdsSource, self._arguments

    def __len__(self) -> int:
        """The number of images."""
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        """One image and its label."""
        try:
            record = self._records[index]
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().replace("\n", " ")
            raise UserError(f"cannot read record {index} of {self._name}: {reason}") from None
        image = decode(record["image"], self._channels, f"{index} of {self._name}")
        return {"image": image, "label": np.int32(record["label"])}


def open_records(name: str, split: str, data_dir: str) -> Any:
    """The data source of a prepared builder, with encoded images."""
    # The import takes seconds, and only these data sets need it.
    import tensorflow_datasets as tfds

    actual = DATASETS[name][1] if split == "test" else split
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        return builder.as_data_source(actual, decoders={"image": tfds.decode.SkipDecoding()})
    except (AssertionError, KeyError, NotImplementedError, OSError, ValueError) as error:
        where = f" --data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"config.data.name: no {name} prepared as array_record in "
            f"{data_dir or 'the default data_dir'}; prepare it with: "
            f"scripts/prepare_tfds {name}{where}"
        ) from error
