"""A count head's estimates beside the Monte-Carlo certificates of the same images."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoImageProcessor

from ..core.bounds import FloatArray
from ..core.calibration import compare_estimates, estimate_lower_bound
from ..core.certificates import ABSTAIN
from ..core.count_predictor import CountPredictor
from ..core.noise import GaussianNoise
from ..core.preprocessing import Preprocessing
from ..core.progress_bar import open_bar
from .measured_counts import MeasuredCounts


@dataclass(frozen=True)
class Comparison:
    """
    Estimates and Monte-Carlo certificates of the same images, at one noise level.

    Attributes:
        sigma: noise level, in units of `[0, 1]` pixels.
        probabilities: `(images, classes)`, predicted.
        counts: `(images, classes)`, measured with `n` draws per image.
        predictions: `(images,)`, class of the Monte-Carlo certificate; -1 where it abstains.
        p_lower: `(images,)`, its lower bound of p_A.
        labels: `(images,)`, true classes.
        alpha: level of the certificates.
    """

    sigma: float
    probabilities: FloatArray
    counts: NDArray[np.int64]
    predictions: NDArray[np.int64]
    p_lower: FloatArray
    labels: NDArray[np.int64]
    alpha: float

    @property
    def n(self) -> int:
        """Draws per image."""
        return int(self.counts[0].sum())

    @property
    def predicted_classes(self) -> NDArray[np.int64]:
        """The classes with the largest predicted probability."""
        return self.probabilities.argmax(1)

    @property
    def agrees(self) -> NDArray[np.bool_]:
        """Whether the predicted class is that of the certificate."""
        return self.predicted_classes == self.predictions

    @property
    def estimated_radii(self) -> FloatArray:
        """Radii of the estimates with `n` nominal draws."""
        return self.estimate_radii(self.n)

    @property
    def certified_radii(self) -> FloatArray:
        """Radii of the certificates; 0 where they abstain."""
        return np.where(self.predictions == ABSTAIN, 0.0, self.compute_radii(self.p_lower))

    def estimate_radii(self, n: int) -> FloatArray:
        """Radii of the estimates with `n` nominal draws."""
        return self.compute_radii(estimate_lower_bound(self.probabilities.max(1), n, self.alpha))

    def compute_radii(self, p_lower: FloatArray) -> FloatArray:
        """Radii that follow from lower bounds of p_A; 0 where none follows."""
        noise = GaussianNoise(self.sigma)
        return np.array([noise.radius(float(p)) for p in p_lower])

    def select(self, images: NDArray[np.int64]) -> "Comparison":
        """The comparison of some of the images."""
        columns = ("probabilities", "counts", "predictions", "p_lower", "labels")
        return replace(self, **{name: getattr(self, name)[images] for name in columns})

    def to_calibration(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What is predicted and what is allowed of each image, see [`core.calibration.compare_estimates`]."""
        return compare_estimates(self.probabilities, self.predictions, self.p_lower, self.n, self.alpha)


def predict_counts(
    predictor: CountPredictor, measured: MeasuredCounts, folder: str | Path, batch_size: int = 256
) -> FloatArray:
    """
    Predict the class frequencies of images that were counted.

    The image processor of the model in `folder` preprocesses the images.

    Returns:
        Predicted class frequencies `(rows, classes)`.

    Raises:
        ValueError: for images that were changed since they were counted.
    """
    preprocessing = Preprocessing.from_image_processor(AutoImageProcessor.from_pretrained(folder))
    inputs = measured.open_images().bind(predictor.class_names, preprocessing)
    indices, rows = np.unique(measured.indices, return_inverse=True)
    sigmas, levels = np.unique(measured.sigmas, return_inverse=True)
    probabilities = np.empty((len(rows), len(predictor.class_names)))
    for start in open_bar(range(0, len(indices), batch_size), "predicting counts", leave=False):
        batch = indices[start : start + batch_size]
        pixels = torch.stack([inputs[index][0] for index in batch])
        # all noise levels in one pass through the encoder
        predicted = predictor(pixels, torch.tensor(sigmas).expand(len(batch), -1)).double().cpu().numpy()
        in_batch = (rows >= start) & (rows < start + batch_size)
        probabilities[in_batch] = predicted[rows[in_batch] - start, levels[in_batch]]
    return probabilities


def compare_with_certificates(measured: MeasuredCounts, probabilities: FloatArray) -> list[Comparison]:
    """Compare predictions `(rows, classes)` with the certificates of a run of method `fixed`, at each noise level."""
    return [
        Comparison(
            float(sigma),
            probabilities[rows],
            measured.counts[rows],
            measured.predictions[rows],
            measured.p_lower[rows],
            measured.labels[rows],
            measured.settings["alpha"],
        )
        for sigma in np.unique(measured.sigmas)
        for rows in [measured.sigmas == sigma]
    ]
