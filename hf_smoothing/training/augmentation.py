"""Random crops, flips and RandAugment of training images."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from timm.data import RandomResizedCropAndInterpolation, rand_augment_transform
from torchvision.transforms import Compose, RandomHorizontalFlip
from torchvision.transforms.v2.functional import pil_to_tensor

from .seeds import seed_everything

SMALL = 64
"""Up to this height and width in pixels, images are held in memory and cropped from a padded image, as is usual for CIFAR.
Larger images are read for each batch and cropped at random sizes, as is usual for ImageNet."""

Augmentation = Callable[[Sequence[Image.Image], int], torch.Tensor]
"""From the pictures of a batch and a seed to pixels `(batch, channels, height, width)`, uint8."""


class AugmentationSettings(Protocol):
    """The settings of augmentation; see `ImageSettings`."""

    hflip: float
    auto_augment: str | None


def create_rand_augment(name: str) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment of this name. Raises AssertionError, KeyError or ValueError for a name that it does not know."""
    return rand_augment_transform(name, {"img_mean": (128, 128, 128)})


def augment_small(pixels: torch.Tensor, settings: AugmentationSettings, seed: int) -> torch.Tensor:
    """
    Augment a batch of small images: crop each from its image in a black margin of an eighth of its side, flip, RandAugment.

    Args:
        pixels: `(batch, channels, side, side)`, uint8.
        settings: how to augment.
        seed: seed of everything random.
    """
    generator = np.random.default_rng(seed)
    batch_size, side = len(pixels), pixels.shape[-1]
    margin = side // 8
    padded = np.pad(pixels.numpy(), ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    top, left = generator.integers(0, 2 * margin + 1, (2, batch_size))
    crops = sliding_window_view(padded, (side, side), (2, 3))[np.arange(batch_size), :, top, left]
    flipped = generator.random(batch_size) < settings.hflip
    crops[flipped] = crops[flipped][..., ::-1]
    augmented = torch.from_numpy(crops)
    if settings.auto_augment is None:
        return augmented
    seed_everything(seed)
    rand_augment = create_rand_augment(settings.auto_augment)
    pictures = [Image.fromarray(crop.transpose(1, 2, 0)) for crop in crops]
    return torch.stack([pil_to_tensor(rand_augment(picture)) for picture in pictures])


def create_augmentation(image_size: int, settings: AugmentationSettings) -> Augmentation:
    """
    The augmentation of pictures. Up to [`SMALL`] pixels it is [`augment_small`], of pictures that have this size. Above, it
    crops pictures of any size to a random part, then flips and RandAugment follow.
    """
    if image_size <= SMALL:
        return partial(_augment_small_pictures, settings)
    steps = [RandomResizedCropAndInterpolation(image_size, interpolation="bicubic")]
    if settings.hflip:
        steps.append(RandomHorizontalFlip(settings.hflip))
    if settings.auto_augment:
        steps.append(create_rand_augment(settings.auto_augment))
    return partial(_augment_large_pictures, Compose(steps))


def _augment_small_pictures(
    settings: AugmentationSettings, pictures: Sequence[Image.Image], seed: int
) -> torch.Tensor:
    return augment_small(torch.stack([pil_to_tensor(picture) for picture in pictures]), settings, seed)


def _augment_large_pictures(transform: Compose, pictures: Sequence[Image.Image], seed: int) -> torch.Tensor:
    seed_everything(seed)
    return torch.stack([pil_to_tensor(transform(picture)) for picture in pictures])
