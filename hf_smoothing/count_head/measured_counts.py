"""Measured class counts, as a finished run holds them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.labelled_images import LabelledImages
from ..runs.identity import open_images
from ..runs.run_folder import RunFolder


@dataclass(frozen=True)
class Counts:
    """
    Measured class counts, one row an image and noise level.

    Attributes:
        indices: `(rows,)`, of the image in its split.
        sigmas: `(rows,)`, in `[0, 1]` pixels.
        counts: `(rows, classes)`.
        labels: `(rows,)`, true classes.
        predictions: `(rows,)`, class that was certified; -1 on abstention.
        p_lower: `(rows,)`, lower bound of its probability.
        settings: of the run that they come from.
    """

    indices: np.ndarray
    sigmas: np.ndarray
    counts: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    p_lower: np.ndarray
    settings: dict[str, Any]

    @property
    def images(self) -> str:
        """Which images these are, in words."""
        found = np.unique(self.indices)
        return (
            f"{self.settings['dataset_name']}, split {self.settings['split']}: {len(found)} images, index {found.min()} to "
            f"{found.max()}, every {self.settings['every']}"
        )

    def open(self) -> LabelledImages:
        """
        The images that were counted.

        Raises:
            ValueError: where they are no longer those.
        """
        return open_images(self.settings)


def read_counts(run_dir: Path) -> Counts:
    """
    The counts of a finished run, from `certify-dataset --method counts` or `fixed`.

    Args:
        run_dir: its folder.

    Raises:
        ValueError: for a run that is not finished, or of a method that stops early: its counts are biased.
    """
    folder = RunFolder(run_dir)
    settings = folder.read_settings()
    if settings["method"] not in ("counts", "fixed"):
        raise ValueError(
            f"{run_dir} is of method {settings['method']!r}, which draws nothing, or stops when it has seen enough: that "
            "biases counts. Use --method counts, or fixed for certificates too."
        )
    rows = [row for row in folder.read_records([*_COLUMNS, "error"]) if row["error"] is None]
    if not rows:
        raise ValueError(f"{run_dir} holds no counts: all of its images failed.")
    indices, sigmas, counts, labels, predictions, p_lower = (
        np.array([row[name] for row in rows]) for name in _COLUMNS
    )
    return Counts(indices, sigmas, counts, labels, predictions, p_lower, settings)


_COLUMNS = ("index", "sigma", "counts", "label", "prediction", "p_lower")
