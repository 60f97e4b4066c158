"""Recalibrating a count head's estimates with certificates of other images."""

from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from ..core.bounds import FloatArray
from .comparison import Comparison


@dataclass(frozen=True)
class Recalibration:
    """
    A monotone map from the predicted to the measured probability of the top class, at one noise level.

    Attributes:
        predicted: log-odds of predicted probabilities, ascending.
        measured: the frequencies that they become, ascending.
    """

    predicted: FloatArray
    measured: FloatArray

    @classmethod
    def fit(cls, comparison: Comparison) -> "Recalibration":
        """
        Match quantiles: among the images with the right predicted class, the k-th largest prediction becomes the k-th
        largest frequency that Monte-Carlo measures among those with the right most frequent class.

        So on these images the estimates have the certified accuracy of Monte-Carlo at every radius. A regression on the
        measured frequency (also an isotonic one) would not: it predicts the mean of what is possible, or the median, and
        extreme values are too rare among them. Predictions for more images than Monte-Carlo gets right become the smallest
        of its frequencies.

        Raises:
            ValueError: if there is no image that both get right.
        """
        tops = comparison.counts.argmax(1)
        right = comparison.predicted_classes == comparison.labels
        frequencies = comparison.counts.max(1)[tops == comparison.labels] / comparison.n
        predicted = _log_odds(comparison.probabilities.max(1)[right])
        size = min(len(predicted), len(frequencies))
        if not size:
            raise ValueError("Head or classifier get no image right: a recalibration needs some.")
        return cls(np.sort(predicted)[-size:], np.sort(frequencies)[-size:])

    def apply(self, comparison: Comparison) -> Comparison:
        """
        Replace the probabilities of the predicted classes; those of the others change in proportion. Each predicted class
        stays the same: where its probability would fall below that of another class, both become equal, and nothing is
        claimed.
        """
        probabilities, rows = comparison.probabilities, np.arange(len(comparison.labels))
        top = comparison.predicted_classes
        others = probabilities.copy()
        others[rows, top] = 0
        others /= np.maximum(others.sum(1, keepdims=True), 1e-300)
        second = others.max(1)
        # the largest share that keeps the top class on top, a bit above a tie
        least = second / (1 + second) * (1 + 1e-9)
        wanted = np.maximum(np.interp(_log_odds(probabilities.max(1)), self.predicted, self.measured), least)
        changed = others * (1 - wanted[:, None])
        changed[rows, top] = wanted
        return replace(comparison, probabilities=changed)


def recalibrate_by_halves(comparison: Comparison, seed: int = 0) -> tuple[Comparison, list[Comparison]]:
    """
    Recalibrate each random half of the images with the certificates of the other half (cross-fitting): no image is judged by
    a map that it was part of. It takes a Monte-Carlo certificate of every image, so it shows what a recalibration can
    reach; it saves nothing.

    Returns:
        All images, in their order, and the two halves. The certified accuracy of all is nearer to Monte-Carlo's than that of
        a half: if one half has more certificates than the other, its map is too generous for the other half, and the
        other's too cautious for it. So a half shows how far a recalibration is off for images that it has not seen.
    """
    order = np.random.default_rng(seed).permutation(len(comparison.labels))
    halves = np.array_split(order, 2)
    probabilities, judged_halves = np.empty_like(comparison.probabilities), []
    for fitted, judged in (halves, halves[::-1]):
        judged_halves.append(Recalibration.fit(comparison.select(fitted)).apply(comparison.select(judged)))
        probabilities[judged] = judged_halves[-1].probabilities
    return replace(comparison, probabilities=probabilities), judged_halves


def _log_odds(probabilities: FloatArray) -> FloatArray:
    return np.asarray(special.logit(np.clip(probabilities, 1e-15, 1 - 1e-15)), np.float64)
