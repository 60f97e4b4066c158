"""Images for training, shuffled and augmented.

Order and augmentation depend only on the seed, the epoch and the batch: a resumed training sees the same images.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import torch
from datasets import Dataset as StoredDataset
from PIL import Image
from timm.data import Mixup
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers.hf_argparser import HfArg

from ..core.preprocessing import to_pixels
from ..core.progress_bar import open_bar
from ..core.validation import check_count
from ..data.labelled_images import LabelledImages, ModelInputs, Row
from .augmentation import SMALL, Augmentation, augment_small, create_augmentation, create_rand_augment
from .batches import Batch, Batches
from .noise_mixture import NoiseMixture
from .seeds import derive_seed

_SHUFFLE_BUFFER = 10_000


@dataclass
class ImageSettings:
    """
    What a model is trained on.

    Raises:
        ValueError: for a setting out of range.
    """

    dataset_name: str = HfArg(help="dataset: name on the Hub, local folder (also of image files), or Parquet file")
    dataset_config_name: str | None = HfArg(default=None, help="configuration of the dataset")
    train_split: str = HfArg(default="train", help="split to train on")
    image_column: str | None = HfArg(default=None, help="column of the images (default: img or image)")
    label_column: str | None = HfArg(default=None, help="column of the labels (default: label, labels or fine_label)")
    max_train_samples: int | None = HfArg(default=None, help="largest number of training images, chosen at random")
    streaming: bool = HfArg(default=False, help="read the dataset as a stream, shuffled only within a buffer")
    sigmas: list[float] = HfArg(
        default_factory=lambda: [0.0],
        help="noise levels (standard deviations, for pixels in [0, 1]); each image gets a random one",
    )
    sigma_weights: list[float] | None = HfArg(
        default=None, help="relative frequencies of the noise levels (default: equal)"
    )
    hflip: float = HfArg(default=0.5, help="probability of a horizontal flip; 0 for digits and letters")
    auto_augment: str | None = HfArg(default=None, help="timm's RandAugment, such as rand-m9-mstd0.5")
    mixup_alpha: float = HfArg(default=0.0, help="strength of mixup; 0: none")
    cutmix_alpha: float = HfArg(default=0.0, help="strength of cutmix; 0: none")
    label_smoothing: float = HfArg(default=0.0, help="amount of label smoothing")
    consistency_weight: float = HfArg(
        default=0.0,
        help="weight of a loss for equal predictions on two noisy copies of an image (arXiv 2006.04062; 10 or 20 is "
        "usual): doubles the computation and gives larger certified radii",
    )
    dataloader_num_workers: int = HfArg(
        default=0, help="processes per training process that read images, and augment large ones"
    )

    def __post_init__(self) -> None:
        if self.max_train_samples is not None:
            check_count("max_train_samples", self.max_train_samples)
        for name, valid, allowed in (
            ("hflip", 0 <= self.hflip <= 1, "a probability, between 0 and 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 or above, and below 1"),
            ("consistency_weight", 0 <= self.consistency_weight < math.inf, "0 or above"),
            ("mixup_alpha", self.mixup_alpha >= 0, "0 or above"),
            ("cutmix_alpha", self.cutmix_alpha >= 0, "0 or above"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name):g} must be {allowed}.")
        if self.consistency_weight and (self.mixup_alpha or self.cutmix_alpha or self.label_smoothing):
            raise ValueError(
                "consistency_weight sharpens answers; mixup, cutmix and label_smoothing soften them: choose one."
            )
        if self.consistency_weight and not any(self.sigmas):
            raise ValueError(
                "consistency_weight compares noisy copies of an image: give a noise level above 0 in sigmas."
            )
        if self.auto_augment is not None:
            try:
                create_rand_augment(self.auto_augment)
            except (AssertionError, KeyError, ValueError) as error:
                raise ValueError(
                    f"auto_augment={self.auto_augment!r} must be a RandAugment of timm, such as rand-m9-mstd0.5."
                ) from error
        if self.streaming and self.dataloader_num_workers > 1:
            raise ValueError(f"dataloader_num_workers={self.dataloader_num_workers}: a stream takes 0 or 1.")
        self.mixture()

    def mixture(self) -> NoiseMixture:
        """The mixture of noise levels."""
        return NoiseMixture(tuple(self.sigmas), None if self.sigma_weights is None else tuple(self.sigma_weights))

    def mixing(self, num_labels: int) -> Mixup | None:
        """timm's mixup and cutmix; `None` where both are off."""
        if self.mixup_alpha == 0 and self.cutmix_alpha == 0:
            return None
        return Mixup(self.mixup_alpha, self.cutmix_alpha, label_smoothing=self.label_smoothing, num_classes=num_labels)

    def open(self, eval_split: str | None = None, eval_samples: int | None = None) -> LabelledImages:
        """
        Load the images to train on, or at most `eval_samples` images of a split to evaluate on.

        Raises:
            ValueError: see [`LabelledImages`].
        """
        return LabelledImages(
            self.dataset_name,
            config_name=self.dataset_config_name,
            split=eval_split or self.train_split,
            image_column=self.image_column,
            label_column=self.label_column,
            max_samples=eval_samples if eval_split else self.max_train_samples,
            streaming=self.streaming,
        )


def find_class_names(images: LabelledImages) -> list[str]:
    """
    Find the names of the dataset's classes; classes without names are named by their numbers.

    Raises:
        ValueError: for labels that are no class numbers, or a stream without class names.
    """
    if images.class_names is not None:
        return images.class_names
    if not isinstance(images.source, StoredDataset):
        raise ValueError(
            f"The column {images.label_column!r} of a stream has no class names: cast it to ClassLabel, or train without "
            "streaming."
        )
    labels = set(images.source.unique(images.label_column))
    if any(isinstance(label, str) for label in labels):
        return sorted(str(label) for label in labels)
    # numbers with wide gaps are identifiers, not class numbers
    if not all(isinstance(label, int) and 0 <= label < 100 * len(labels) for label in labels):
        raise ValueError(
            f"The column {images.label_column!r} holds {sorted(map(str, labels))[:5]}: labels must be class numbers from 0 "
            "on, or names."
        )
    return [str(number) for number in range(max(labels) + 1)]


def _read_picture(inputs: ModelInputs, index: int | str, row: Row, size: int | None) -> tuple[Image.Image, int]:
    """The picture of a row, resized to `size` pixels where that is given, and its label."""
    label = inputs.label(index, row)
    try:
        picture = inputs.images.picture(row)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Image {index} of the split cannot be trained on: {error} Fix it or leave it out."
        ) from error
    if size is not None and picture.size != (size, size):
        pixels = to_pixels(picture, inputs.preprocessing)  # resized as for certification
        picture = Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy())
    return picture, label


class TrainingBatches(Batches):
    """
    The batches of one process, epoch by epoch; see the top of this file for what they depend on.

    Args:
        inputs: the images, bound to a model.
        settings: how to augment images.
        image_size: height and width of the augmented images.
        batch_size: images per batch of one process.
        seed: seed of order and augmentation.
        process_index, num_processes: see [`Batches`].
        show_progress: whether to show a progress bar while images are read.

    Raises:
        ValueError: for fewer images than processes. Small images (see [`SMALL`]) are read at once: for an image that
            cannot be read, or a label outside the classes.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        settings: ImageSettings,
        image_size: int,
        batch_size: int,
        *,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        show_progress: bool = True,
    ):
        images = inputs.images
        super().__init__(images.total, batch_size, seed, process_index, num_processes)
        self.settings, self.num_workers = settings, settings.dataloader_num_workers
        size = image_size if image_size <= SMALL else None
        augmentation = create_augmentation(image_size, settings)
        self.source: _Stream | _Pictures | _StoredPixels
        if images.total is None:
            self.source = _Stream(inputs, augmentation, size, batch_size, process_index, num_processes)
        elif size is None:
            self.source = _Pictures(inputs, augmentation)
        else:
            self.source = _store_pixels(inputs, size, self.num_workers, show_progress)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `first` on."""
        if isinstance(self.source, _Stream):
            source = replace(self.source, seed=derive_seed(self.seed, number), first=first)
            return iter(DataLoader(source, batch_size=None, num_workers=self.num_workers))
        keys = [
            (derive_seed(self.seed, number, position, self.process_index), images)
            for position, images in enumerate(self.shuffle(number))
        ][first:]
        if isinstance(self.source, _Pictures):
            return iter(DataLoader(self.source, batch_size=None, sampler=keys, num_workers=self.num_workers))
        pixels, labels = self.source
        return ((augment_small(pixels[images], self.settings, seed), labels[images]) for seed, images in keys)


_StoredPixels = tuple[torch.Tensor, torch.Tensor]
"""Pixels `(images, channels, height, width)`, uint8, and labels `(images,)`, in memory."""


def _store_pixels(inputs: ModelInputs, size: int, num_workers: int, show_progress: bool) -> _StoredPixels:
    """Read all images, in `num_workers` processes beside this one where that is above 0."""
    batches: Any = DataLoader(_Rows(inputs, size), batch_size=64, num_workers=num_workers)
    parts = []
    with open_bar(desc="reading images", total=inputs.images.total, disable=not show_progress) as progress_bar:
        for pixels, labels in batches:
            parts.append((pixels, labels))
            progress_bar.update(len(labels))
    pixels, labels = (torch.cat(tensors) for tensors in zip(*parts))
    return pixels, labels


@dataclass(eq=False)
class _Rows(Dataset):
    """Pixels, uint8, and labels of small images, by their position among the chosen ones."""

    inputs: ModelInputs
    size: int

    def __len__(self) -> int:
        return self.inputs.images.total or 0

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        index = self.inputs.images.indices[position]
        picture, label = _read_picture(self.inputs, index, self.inputs.images.source[index], self.size)
        return pil_to_tensor(picture), label


@dataclass(eq=False)
class _Pictures(Dataset):
    """Augmented batches of large images. A key is the seed of the batch's augmentation, and the positions of its images."""

    inputs: ModelInputs
    augmentation: Augmentation

    def __getitem__(self, key: tuple[int, Sequence[int]]) -> Batch:
        seed, positions = key
        indices = [self.inputs.images.indices[position] for position in positions]
        examples = [_read_picture(self.inputs, index, self.inputs.images.source[index], None) for index in indices]
        pictures, labels = zip(*examples)
        return self.augmentation(pictures, seed), torch.tensor(labels)


@dataclass(eq=False)
class _Stream(IterableDataset):
    """The batches of one process from a shuffled stream, from batch `first` on. Every process reads the complete stream."""

    inputs: ModelInputs
    augmentation: Augmentation
    size: int | None
    batch_size: int
    process_index: int
    num_processes: int
    seed: int = 0
    first: int = 0

    def __iter__(self) -> Iterator[Batch]:
        global_batch_size = self.batch_size * self.num_processes
        images = self.inputs.images
        source: Any = images.source
        if images.max_samples is not None:  # the first rows, in any order
            source = source.take(images.max_samples)
        shuffled = source.shuffle(seed=self.seed, buffer_size=_SHUFFLE_BUFFER)
        rows = islice(enumerate(shuffled), self.first * global_batch_size, None)
        for position in count(self.first):
            global_batch = list(islice(rows, global_batch_size))
            if len(global_batch) < global_batch_size:  # stop on all processes at once: none waits for another
                return
            share = global_batch[self.process_index :: self.num_processes]
            # the index in the split is unknown after shuffling a stream
            examples = [
                _read_picture(self.inputs, f"{place} in the shuffled order", row, self.size) for place, row in share
            ]
            pictures, labels = zip(*examples)
            seed = derive_seed(self.seed, position, self.process_index)
            yield self.augmentation(pictures, seed), torch.tensor(labels)
