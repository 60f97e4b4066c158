"""Measured class counts, read from a finished run or from a table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..core.bounds import clopper_pearson_lower
from ..core.certificates import ABSTAIN
from ..data.labelled_images import LabelledImages
from ..runs.identity import open_images
from ..runs.run_folder import RunFolder
from ..training.training_images import find_class_names


@dataclass(frozen=True)
class MeasuredCounts:
    """
    Measured class counts, one row per image and noise level.

    Attributes:
        indices: `(rows,)`, the image's index in its split.
        sigmas: `(rows,)`, noise levels in units of `[0, 1]` pixels.
        counts: `(rows, classes)`, draws per class.
        labels: `(rows,)`, true classes.
        predictions: `(rows,)`, certified classes; -1 on abstention.
        p_lower: `(rows,)`, lower bounds of their probabilities.
        settings: settings of the run, or what is known of a table.
    """

    indices: np.ndarray
    sigmas: np.ndarray
    counts: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    p_lower: np.ndarray
    settings: dict[str, Any]

    def describe_images(self) -> str:
        """Dataset, split and indices of the images, in words."""
        indices = np.unique(self.indices)
        return (
            f"{self.settings['dataset_name']}, split {self.settings['split']}: {len(indices)} images, index {indices.min()} "
            f"to {indices.max()}, every {self.settings['every']}"
        )

    def open_images(self) -> LabelledImages:
        """Load the images that were counted. Raises a `ValueError` if they cannot be loaded, or were changed since."""
        return open_images(self.settings)

    def select_sigmas(self, sigmas: Sequence[float]) -> "MeasuredCounts":
        """The counts at some of the noise levels. Raises a `ValueError` for a level that was not counted."""
        counted = np.unique(self.sigmas).tolist()
        if missing := [sigma for sigma in sigmas if sigma not in counted]:
            raise ValueError(
                f"sigmas={', '.join(f'{sigma:g}' for sigma in missing)}: these noise levels were not counted, only "
                f"{', '.join(f'{sigma:g}' for sigma in counted)}."
            )
        rows = np.isin(self.sigmas, sigmas)
        columns = ("indices", "sigmas", "counts", "labels", "predictions", "p_lower")
        selected = {name: getattr(self, name)[rows] for name in columns}
        return replace(self, **selected, settings={**self.settings, "sigmas": sorted(sigmas)})


def read_counts(run_dir: Path) -> MeasuredCounts:
    """
    Read the counts of a finished run, from `certify-dataset --method counts` or `fixed`.

    Raises:
        ValueError: for an unfinished run, or a run of a method that stops early, whose counts are biased.
    """
    folder = RunFolder(run_dir)
    settings = folder.read_settings()
    if settings["method"] not in ("counts", "fixed"):
        raise ValueError(
            f"{run_dir} is of method {settings['method']!r}, which draws nothing, or stops when it has seen enough, which "
            "biases counts. Use --method counts, or fixed for certificates too."
        )
    rows = [row for row in folder.read_records([*_COLUMNS, "error"]) if row["error"] is None]
    if not rows:
        raise ValueError(f"{run_dir} holds no counts: all of its images failed.")
    indices, sigmas, counts, labels, predictions, p_lower = (
        np.array([row[name] for row in rows]) for name in _COLUMNS
    )
    return MeasuredCounts(indices, sigmas, counts, labels, predictions, p_lower, settings)


def read_count_table(path: Path, dataset_name: str, split: str) -> MeasuredCounts:
    """
    Read counts from a Parquet file, such as those that others have published.

    The columns are `index` (row of the image in the split), `sigma` (in units of `[0, 1]` pixels) and `counts` (draws per
    class, in the order of the dataset's classes), with the same number of draws in each row. Predictions and `p_lower` are
    those of a one-sided Clopper-Pearson bound at alpha = .001 for the most frequent class, as if other draws had chosen it.

    Args:
        path: the table.
        dataset_name: dataset of the images: name on the Hub, local folder, or Parquet file.
        split: its split.

    Raises:
        ValueError: for a table without these columns or with no rows, an index outside the split, other numbers of classes
            than the dataset's, rows with different numbers of draws, or two rows for one image and noise level; for a
            dataset that cannot be loaded.
    """
    indices, sigmas, counts = _read_columns(path)
    images = LabelledImages(dataset_name, split=split)
    class_names = find_class_names(images)
    if counts.shape[1] != len(class_names):
        raise ValueError(
            f"{path} has counts of {counts.shape[1]} classes, but {dataset_name!r} has {len(class_names)}: name the dataset "
            "that was counted."
        )
    if indices.min() < 0 or indices.max() >= len(images.source):
        wrong = indices.min() if indices.min() < 0 else indices.max()
        raise ValueError(
            f"{path} has index {wrong}, but the split {split!r} of {dataset_name!r} has {len(images.source)} images: name "
            "the split that was counted."
        )
    draws = np.unique(counts.sum(1))
    if len(draws) > 1 or draws[0] < 1 or counts.min() < 0:
        raise ValueError(
            f"{path} has rows of {draws[0]} to {draws[-1]} draws: each row needs the same number, above 0."
        )
    if len(np.unique(np.stack([indices, sigmas], 1), axis=0)) < len(indices):
        raise ValueError(f"{path} has several rows for an image and noise level: keep one.")
    inputs = images.bind(class_names, None)
    stored_labels = images.source.select_columns(images.label_column)
    labels = np.array([inputs.label(index, row) for index, row in enumerate(stored_labels)])[indices]
    p_lower = clopper_pearson_lower(counts.max(1), draws[0], TABLE_ALPHA)
    settings = {
        "dataset_name": dataset_name,
        "dataset_config_name": None,
        "dataset_fingerprint": images.fingerprint,
        "split": split,
        "image_column": images.image_column,
        "label_column": images.label_column,
        "every": 1,
        "max_samples": None,
        "label_names": class_names,
        "table": str(path),
        "sigmas": np.unique(sigmas).tolist(),
        "method": "counts",
        "n": int(draws[0]),
        "alpha": TABLE_ALPHA,
        "seed": None,
    }
    predictions = np.where(p_lower > 0.5, counts.argmax(1), ABSTAIN)
    return MeasuredCounts(indices, sigmas, counts, labels, predictions, p_lower, settings)


def _read_columns(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices, noise levels and counts of a table. Raises a `ValueError` for a table without them."""
    try:
        table = pq.read_table(path, columns=["index", "sigma", "counts"])
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error
    if missing := {"index", "sigma", "counts"} - set(table.column_names):
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}.")
    if not len(table):
        raise ValueError(f"{path} holds no counts: it has no rows.")
    counts = table["counts"].combine_chunks()
    lengths = np.unique(counts.value_lengths().to_numpy(zero_copy_only=False))
    if len(lengths) > 1:
        raise ValueError(f"{path} has rows with counts of {lengths.min():g} to {lengths.max():g} classes.")
    values = counts.flatten().to_numpy().astype(np.int64)
    return table["index"].to_numpy(), table["sigma"].to_numpy(), values.reshape(len(table), -1)


TABLE_ALPHA = 0.001
"""Level of the bounds of a table's counts."""

_COLUMNS = ("index", "sigma", "counts", "label", "prediction", "p_lower")
