"""Measured class counts, read from a finished run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.labelled_images import LabelledImages
from ..runs.identity import open_images
from ..runs.run_folder import RunFolder


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
        settings: settings of the run.
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


_COLUMNS = ("index", "sigma", "counts", "label", "prediction", "p_lower")
