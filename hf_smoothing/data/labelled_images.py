"""Datasets of labelled images, and their images as inputs of a model."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image

from ..core.image_loading import load_image
from ..core.preprocessing import Preprocessing, to_pixels
from .class_matching import match_classes
from .columns import IMAGE_COLUMNS, LABEL_COLUMNS, find_column

Row = dict[str, Any]


def _load(name: str, config_name: str | None, split: str, streaming: bool) -> Any:
    files = {}
    if name.endswith(".parquet"):
        if not Path(name).is_file():
            raise ValueError(f"There is no Parquet file at {name!r}.")
        files = {"data_files": {re.split(r"[\[+]", split)[0].strip(): name}}  # without a slice such as [:100]
    try:
        return load_dataset("parquet" if files else name, config_name, split=split, streaming=streaming, **files)
    except (OSError, ValueError, DatasetsError) as error:
        if isinstance(error, OSError) and not Path(name).exists():
            problem = f"There is no folder {name!r}, and no dataset of this name can be loaded from the Hub."
        else:
            problem = f"The split {split!r} of {name!r} cannot be loaded."
        raise ValueError(f"{problem} {error}") from error


class LabelledImages:
    """
    Images of a dataset with their labels. [`bind`] makes them the inputs of a model.

    Args:
        name: what `load_dataset` takes (a name on the Hub, a local folder), or a Parquet file.
        config_name: configuration of the dataset.
        split: its split.
        image_column, label_column: columns of the images and labels; found if they have usual names.
        every: take the images whose index in the split is a multiple of this.
        max_samples: take at most this many images: a random sample, always the same one, because splits are often sorted by
            class. Of a stream, the first ones.
        streaming: read them as a stream, without storing them.

    Attributes:
        class_names: names of the dataset's classes, `None` where labels are plain.
        fingerprint: changes with the dataset; `None` for a stream.
        indices: which images of the split are taken, in order; empty for a stream.
        total: how many images there are; `None` for a stream.

    Raises:
        ValueError: for a dataset or split that cannot be loaded, an empty one, or columns that are not there.
    """

    def __init__(
        self,
        name: str,
        *,
        config_name: str | None = None,
        split: str = "test",
        image_column: str | None = None,
        label_column: str | None = None,
        every: int = 1,
        max_samples: int | None = None,
        streaming: bool = False,
    ):
        source = _load(name, config_name, split, streaming)
        if source.features is None:  # a stream of a format that does not say
            source = source._resolve_features()
        self.image_column = find_column(source.features, IMAGE_COLUMNS, image_column, "--image_column")
        self.label_column = find_column(source.features, LABEL_COLUMNS, label_column, "--label_column")
        self.class_names: list[str] | None = getattr(source.features[self.label_column], "names", None)
        self.fingerprint = None if streaming else source._fingerprint
        self.every, self.max_samples = every, max_samples
        # undecoded: a broken file must fail its image, not the run
        source = source.select_columns([self.image_column, self.label_column])
        self.source = source.cast_column(self.image_column, datasets.Image(decode=False))
        self.indices = [] if streaming else list(range(0, len(self.source), self.every))
        if max_samples is not None and max_samples < len(self.indices):
            order = np.random.default_rng(0).permutation(len(self.indices))[:max_samples]
            self.indices = [self.indices[place] for place in sorted(order)]
        self.total = None if streaming else len(self.indices)
        if self.total == 0 or next(iter(self.source), None) is None:
            raise ValueError(f"The split {split!r} of {name!r} is empty.")

    def bind(self, class_names: Sequence[str], preprocessing: Preprocessing | None) -> "ModelInputs":
        """The images as inputs of a model, see [`ModelInputs`]."""
        return ModelInputs(self, class_names, preprocessing)

    def rows(self) -> Iterator[tuple[int, Callable[[], Row]]]:
        """The index of each chosen image, and a call that reads its row, in order."""
        if isinstance(self.source, Dataset):
            for index in self.indices:
                yield index, partial(self.source.__getitem__, index)
        else:
            for index, row in islice(islice(enumerate(self.source), 0, None, self.every), self.max_samples):
                yield index, partial(dict, row)

    def picture(self, row: Row) -> Image.Image:
        """
        A row's image, in RGB. Raises a `ValueError` where there is none, or its content is not a picture; an `OSError`
        where its file cannot be read, as when a disk is not mounted: trying again may help.
        """
        image = row[self.image_column]
        if image is None:
            raise ValueError("The row has no image.")
        return load_image(_read(image["path"]) if image["bytes"] is None else image["bytes"])


class ModelInputs:
    """
    Images of a dataset as inputs of a model: `pixels, label = inputs[index]`, and the same of each image on iteration.

    Args:
        images: the images.
        class_names: names of the model's classes in the order of its logits.
        preprocessing: the model's, from a picture to pixels.

    Raises:
        ValueError: for classes that do not match, or a label outside them. The labels of a stream are checked as they are
            read.
    """

    def __init__(self, images: LabelledImages, class_names: Sequence[str], preprocessing: Preprocessing | None):
        self.images, self.preprocessing = images, preprocessing
        self._to_class = match_classes(images.class_names, class_names)
        if isinstance(images.source, Dataset):
            labels = images.source.select_columns(images.label_column).select(images.indices)
            for index, row in zip(images.indices, labels):
                self.label(index, row)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Pixels and class of the image at `index` of the split; not for a stream."""
        row = self.images.source[int(index)]
        return self.pixels(row), self.label(index, row)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for index, read in self.images.rows():
            row = read()
            yield self.pixels(row), self.label(index, row)

    def label(self, index: int | str, row: Row) -> int:
        """The class of a row. Raises a `ValueError` that names `index` for a label outside the classes."""
        try:
            return self._to_class(row[self.images.label_column])
        except ValueError as error:
            raise ValueError(f"Image {index}: {error}") from None

    def pixels(self, row: Row) -> torch.Tensor:
        """The pixels of a row's [`LabelledImages.picture`] before the noise: `(channels, height, width)` in `[0, 1]`."""
        return to_pixels(self.images.picture(row), self.preprocessing)


def _read(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except Exception as error:  # each protocol of fsspec has errors of its own
        raise OSError(f"The file {path!r} of the dataset cannot be read: {error}.") from error
