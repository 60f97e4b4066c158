"""Datasets of labelled images: which columns, which of the model's classes, which images, and their pixels."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
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

from ..core.image_loading import load_image, to_pixels
from ..core.preprocessing import Preprocessing

Row = dict[str, Any]

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def find_column(columns: Collection[str], usual: Sequence[str], asked: str | None, flag: str) -> str:
    """
    The column asked for, or the one with a usual name.

    Args:
        columns: those there are.
        usual: usual names of the column.
        asked: the user's choice, if any.
        flag: the flag with which users choose, for the error.

    Raises:
        ValueError: where it is not there, or more than one has a usual name; the message lists the columns.
    """
    found = [name for name in columns if name in ((asked,) if asked is not None else usual)]
    if len(found) == 1:
        return found[0]
    if asked is not None:
        problem = f"There is no column {asked!r}"
    elif found:
        problem = f"Several columns have usual names ({', '.join(found)})"
    else:
        problem = f"No column has a usual name ({', '.join(usual)})"
    raise ValueError(f"{problem}; the dataset has: {', '.join(columns)}. Choose one with {flag}.")


def match_labels(dataset_names: Sequence[str] | None, model_names: Sequence[str]) -> Callable[[Any], int]:
    """
    A function from the labels of a dataset to class indices of a model, matched by the names of the classes.

    Case, spaces, underscores and hyphens make no difference to a name. A dataset may have fewer classes than the model.
    Where either has no names (transformers calls them `LABEL_0`, ...), whole numbers are taken for class indices.

    Args:
        dataset_names: names of the dataset's classes in the order of its labels, `None` where labels are plain.
        model_names: names of the model's classes in the order of its logits.

    Raises:
        ValueError: where the dataset has a class that the model has not (both lists are shown); the function raises it for
            a label out of range.
    """
    plain = [_plain(name) for name in model_names]
    nameless = all(name == f"label{index}" for index, name in enumerate(plain))
    if dataset_names is None:
        indices = list(range(len(plain)))
    else:
        own = [_plain(name) for name in dataset_names]
        position = {name: index for index, name in enumerate(plain)}
        if own == plain or (
            nameless and len(own) == len(plain)
        ):  # equal lists may hold a name twice, as ImageNet's do
            indices = list(range(len(plain)))
        else:
            unmatched = [name for name, key in zip(dataset_names, own) if key not in position or plain.count(key) > 1]
            if unmatched or len(set(own)) < len(own):
                raise ValueError(
                    f"The classes of dataset and model do not match{': ' if unmatched else ''}{', '.join(unmatched)}. "
                    f"The dataset has {list(dataset_names)}; the model has {list(model_names)}."
                )
            indices = [position[key] for key in own]
    by_name = {name: index for index, name in enumerate(plain) if plain.count(name) == 1}

    def to_class(label: Any) -> int:
        if isinstance(label, str) and dataset_names is None and _plain(label) in by_name:
            return by_name[_plain(label)]
        if isinstance(label, (int, np.integer)) and 0 <= label < len(indices):
            return indices[label]
        raise ValueError(
            f"label {label!r} is none of the model's {len(plain)} classes ({', '.join(model_names)}). A split without "
            "labels cannot be scored; a dataset with others needs another model."
        )

    return to_class


def _plain(name: str) -> str:
    return "".join(name.casefold().replace("_", " ").replace("-", " ").split())


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
    Images of a dataset, their labels as classes of a model, and their pixels.

    Args:
        name: what `load_dataset` takes (a name on the Hub, a local folder), or a Parquet file.
        config_name: configuration of the dataset.
        split: its split.
        image_column: column of the images; found if it has a usual name.
        label_column: column of the labels; found if it has a usual name.
        every: take the images whose index in the split is a multiple of this.
        max_samples: take at most this many images, the first ones.
        spread: with `max_samples`, take them from the whole split instead, by chance but always the same ones: splits are
            often sorted by class. Of a stream the first ones are taken all the same.
        streaming: read them as a stream, without storing them.

    Attributes:
        class_names: names of the dataset's classes, `None` where labels are plain.
        fingerprint: changes with the dataset; `None` for a stream, of which nobody knows the rest.
        indices: which images of the split are taken, in order; empty for a stream.
        total: how many images there are; `None` for a stream.
        shape: the shape that pixels must have, once it is set.

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
        spread: bool = False,
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
        # undecoded: a broken file must cost its image, not the run
        source = source.select_columns([self.image_column, self.label_column])
        self.source = source.cast_column(self.image_column, datasets.Image(decode=False))
        self.indices = [] if streaming else list(range(0, len(self.source), self.every))
        if spread and max_samples is not None:
            order = np.random.default_rng(0).permutation(len(self.indices))[:max_samples]
            self.indices = [self.indices[place] for place in sorted(order)]
        self.indices = self.indices[:max_samples]
        self.total = None if streaming else len(self.indices)
        if self.total == 0 or next(iter(self.source), None) is None:
            raise ValueError(f"The split {split!r} of {name!r} is empty.")
        self.shape: tuple[int, ...] | None = None

    def meet(self, names: list[str], preprocessing: Preprocessing | None) -> None:
        """Match the labels to the model's classes; those of a stream can only be looked at when their turn comes."""
        self.preprocessing = preprocessing
        self.to_class = match_labels(self.class_names, names)
        if isinstance(self.source, Dataset):
            labels = self.source.select_columns(self.label_column).select(self.indices)
            for index, row in zip(self.indices, labels):
                self.label(index, row)

    def chosen(self) -> Iterator[tuple[int, Callable[[], Row]]]:
        """The index of each image, and a call that reads its row, in order."""
        if isinstance(self.source, Dataset):
            for index in self.indices:
                yield index, partial(self.source.__getitem__, index)
        else:
            for index, row in islice(islice(enumerate(self.source), 0, None, self.every), self.max_samples):
                yield index, partial(dict, row)

    def label(self, index: int | str, row: Row) -> int:
        try:
            return self.to_class(row[self.label_column])
        except ValueError as error:
            raise ValueError(f"Image {index}: {error}") from None

    def picture(self, row: Row) -> Image.Image:
        """
        A row's image, in RGB.

        Raises:
            ValueError: where there is no image, or its content is no picture: so it will be tomorrow.
            OSError: where its file cannot be read, as when a disk is not mounted: it may be there tomorrow.
        """
        image = row[self.image_column]
        if image is None:
            raise ValueError("The row has no image.")
        return load_image(_read(image["path"]) if image["bytes"] is None else image["bytes"])

    def pixels(self, row: Row) -> torch.Tensor:
        """
        Pixels of a row's image, as the engine takes them.

        Raises:
            ValueError: see [`LabelledImages.picture`]; where they have another shape than the others.
            OSError: where its file cannot be read.
        """
        found = to_pixels(self.picture(row), self.preprocessing)
        at_input = (
            self.preprocessing is None or self.preprocessing.resize is None
        )  # else the base classifier takes all sizes
        if at_input and self.shape is not None and tuple(found.shape) != self.shape:
            raise ValueError(
                f"The image has shape {tuple(found.shape)} behind the image processor, the first one {self.shape}."
            )
        return found

    def find_shape(self) -> tuple[int, ...] | None:
        """
        The shape of the first image that is a picture.

        Raises:
            OSError: where the file of one cannot be read.
        """
        for _, read in self.chosen():
            with suppress(ValueError):
                return tuple(self.pixels(read()).shape)
        return None


def _read(path: str) -> bytes:
    try:
        if "://" in path:  # a stream from elsewhere
            with fsspec.open(path, "rb") as file:
                return file.read()
        return Path(path).read_bytes()
    except Exception as error:  # each protocol of fsspec has errors of its own
        raise OSError(f"The file {path!r} of the dataset cannot be read: {error}.") from error
