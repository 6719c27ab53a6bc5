"""Data sets that tensorflow_datasets prepared, read without TensorFlow."""

from typing import Any

import numpy as np

from experiments.errors import UserError
from experiments.image_classification.data.sources import Example, decode

# Name → classes and the split that is evaluated.
DATASETS = {
    "cifar10": (10, "test"),
    "imagenet2012": (1000, "validation"),
    "mnist": (10, "test"),
}


class TfdsSource:
    """Records of a prepared data set; images are decoded by Pillow.

    Args:
        name: of the builder.
        split: "train" or "test".
        data_dir: where it was prepared; "" for the default of tensorflow_datasets.
        channels: 1 for grey, 3 for colour.
    """

    def __init__(self, name: str, split: str, data_dir: str, channels: int):
        self._arguments = (name, split, data_dir, channels)
        self._name = f"{name}/{split}"
        self._channels = channels
        self._records = open_records(name, split, data_dir)

    def __reduce__(self) -> tuple[type["TfdsSource"], tuple[str, str, str, int]]:
        """A worker process opens the files anew."""
        return TfdsSource, self._arguments

    def __len__(self) -> int:
        """How many there are."""
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
    """The data source of a prepared builder, its images still encoded."""
    import tensorflow_datasets as tfds  # takes seconds, and only these data sets need it

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
