"""Prepares decoded images for the model: the recipes of MNIST, CIFAR and ImageNet.

An image is a uint8 array (height, width, channels). The task normalises it on the device.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

from experiments.registry import Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the images of one kind of data set are prepared.

    Attributes:
        mean: the mean of the training set's pixels, divided by 255; one number for each channel or
            one for all channels.
        std: the standard deviation, in the same form.
        padding: the width of the black border around an image before its random crop.
        flip: whether half of the training images are mirrored.
        resized_crop: whether training uses a random crop of random size and shape. Evaluation then
            resizes the shorter side to 8/7 of the crop and takes the centre.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    flip: bool = False
    resized_crop: bool = False

    def to_fixed_size(self, image: np.ndarray, size: int) -> np.ndarray:
        """The part of the preparation that does not change: nothing before a resized crop."""
        return image if self.resized_crop else resize(image, size, size)

    def augment(self, image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """Prepares an image of `size`×`size` for training."""
        if self.resized_crop:
            image = random_resized_crop(image, size, rng)
        else:
            image = random_padded_crop(resize(image, size, size), self.padding, rng)
        mirror = self.flip and rng.random() < 0.5
        return np.ascontiguousarray(image[:, ::-1] if mirror else image)

    def centre(self, image: np.ndarray, size: int) -> np.ndarray:
        """Prepares an image of `size`×`size` for evaluation."""
        if not self.resized_crop:
            return resize(image, size, size)
        height, width = image.shape[:2]
        scale = math.ceil(size * 8 / 7) / min(height, width)
        image = resize(image, round(height * scale), round(width * scale))
        top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
        return image[top : top + size, left : left + size]


RECIPES: Registry[Recipe] = Registry(
    "config.data.recipe",
    {
        "mnist": Recipe(mean=(0.1307,), std=(0.3081,), padding=2),
        "cifar": Recipe(
            mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), padding=4, flip=True
        ),
        "imagenet": Recipe(
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), flip=True, resized_crop=True
        ),
    },
    (lambda found: isinstance(found, Recipe), "a Recipe"),
)


def resize(
    image: np.ndarray, height: int, width: int, box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """Resizes an image, or its part `box` (left, top, right, bottom), bilinearly."""
    if box is None and image.shape[:2] == (height, width):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized).reshape(height, width, image.shape[-1])


def random_padded_crop(image: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    """Shifts an image by up to `padding` rows and columns, with black at the edges."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), image.dtype)
    padded[padding : padding + height, padding : padding + width] = image
    top, left = rng.integers(0, 2 * padding + 1, size=2)
    return padded[top : top + height, left : left + width]


def random_resized_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Crops 8 % to 100 % of the area at an aspect ratio from 3/4 to 4/3, resized to a square.

    After ten attempts that do not fit, it takes the largest central crop within these ratios (the
    Inception crop).
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return resize(image, size, size, (int(left), int(top), int(left) + w, int(top) + h))
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return resize(image, size, size, (left, top, left + w, top + h))
