"""Prepares decoded images for the model: the recipes of MNIST, CIFAR and ImageNet.

An image is a uint8 array (height, width, channels). The task normalises it on the device.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from experiments.registry import Registry

CROP_ATTEMPTS = 10


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

    @property
    def draws(self) -> int:
        """How many random numbers the augmentation of an image takes."""
        return 1 + (4 * CROP_ATTEMPTS if self.resized_crop else 2)

    def augment(self, images: Sequence[np.ndarray], size: int, draws: np.ndarray) -> np.ndarray:
        """Prepares images for training.

        Args:
            images: uint8 (height, width, channels), of any size.
            size: the height and the width of the result.
            draws: random numbers in [0, 1), `draws` of them for each image.

        Returns:
            uint8 (images, size, size, channels).
        """
        if self.resized_crop:
            views = [random_resized_crop(*x, size) for x in zip(images, draws[:, 1:], strict=True)]
            made = np.stack(views)
        else:
            resized = np.stack([resize(image, size, size) for image in images])
            made = random_padded_crops(resized, self.padding, draws[:, 1:])
        if self.flip:
            mirrored = draws[:, 0] < 0.5
            made[mirrored] = made[mirrored, :, ::-1]
        return made

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


def random_padded_crops(images: np.ndarray, padding: int, draws: np.ndarray) -> np.ndarray:
    """Shifts each image by up to `padding` rows and columns, with black at the edges.

    Args:
        images: (images, height, width, channels).
        padding: at least 0.
        draws: two random numbers in [0, 1) for each image.
    """
    count, height, width, channels = images.shape
    border = 2 * padding
    padded = np.zeros((count, height + border, width + border, channels), images.dtype)
    padded[:, padding : padding + height, padding : padding + width] = images
    crops = np.empty_like(images)
    for i, (top, left) in enumerate((draws * (border + 1)).astype(int).tolist()):
        crops[i] = padded[i, top : top + height, left : left + width]
    return crops


def random_resized_crop(image: np.ndarray, draws: np.ndarray, size: int) -> np.ndarray:
    """Crops 8 % to 100 % of the area at an aspect ratio from 3/4 to 4/3, resized to a square.

    After ten attempts that do not fit, it takes the largest central crop within these ratios (the
    Inception crop).

    Args:
        image: (height, width, channels).
        draws: four random numbers in [0, 1) for each attempt.
        size: the height and the width of the result.
    """
    height, width = image.shape[:2]
    for of_area, of_ratio, of_top, of_left in draws.reshape(CROP_ATTEMPTS, 4).tolist():
        area = height * width * (0.08 + 0.92 * of_area)
        ratio = (3 / 4) * (16 / 9) ** of_ratio
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(of_top * (height - h + 1)), int(of_left * (width - w + 1))
            return resize(image, size, size, (left, top, left + w, top + h))
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return resize(image, size, size, (left, top, left + w, top + h))
