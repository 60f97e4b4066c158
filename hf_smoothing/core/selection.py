"""Conformal selection: of the claims that are made at a radius, at most a given share is expected to be wrong."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from .bounds import FloatArray
from .calibration import Calibration, estimate_lower_bound


def count_selected_radii(
    calibration: Calibration, sigma: float, p_lower: FloatArray, p_needed: Sequence[float], false_claims: float
) -> NDArray[np.int64]:
    """
    Choose at each radius the images that may claim it.

    For an image whose estimate is p, the p-value of "Monte-Carlo does not prove this radius for the predicted class" is
    `(1 + k) / (n + 1)`. Here k of the n calibration images have an estimate of at least p, but Monte-Carlo does not prove
    the radius for their predicted class. Benjamini-Hochberg selects images by these p-values at level `false_claims`. So,
    averaged over exchangeable calibration and test images, at most this share of the claims at a radius is not proved by
    Monte-Carlo, however good or bad the estimates are. Whoever may claim a radius may claim every smaller one.

    Args:
        calibration: of the count head that made the estimates.
        sigma: a calibrated noise level, in `[0, 1]` pixels.
        p_lower: `(images,)`, the estimated lower bounds of p_A of *all* images that may get a claim, see
            [`estimate_lower_bound`]; 0 where the estimate abstains, which is never selected.
        p_needed: the probabilities that prove the radii, see [`probabilities_proving`].
        false_claims: the share of wrong claims, in (0, 1).

    Returns:
        How many of the radii each image may claim `(images,)`, the smallest first.

    Raises:
        ValueError: for a level that was not calibrated.

    Source: Jin and Candes 2023, "Selection by prediction with conformal p-values" (arXiv 2210.01408).
    """
    predicted, _ = calibration.at(sigma)
    estimates = estimate_lower_bound(special.expit(predicted), calibration.n, calibration.alpha)
    selected = np.zeros(len(p_lower), np.int64)
    for proved in calibration.proves(sigma, np.sort(p_needed)).T:
        wrong = np.sort(estimates[~proved])
        at_least = len(wrong) - np.searchsorted(wrong, p_lower, side="left")
        p_values = np.where(p_lower > 0, (1 + at_least) / (len(estimates) + 1), 1.0)
        selected += stats.false_discovery_control(p_values) <= false_claims
    return selected
