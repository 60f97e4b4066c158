"""Evaluating a count head: how far its estimates are off. Every figure counts all images, also those it gets wrong."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..core.bounds import FloatArray, clopper_pearson_lower
from ..core.calibration import Calibration
from ..core.noise import GaussianNoise
from ..core.rule_protocols import probabilities_proving
from .comparison import Comparison


def compute_errors(comparison: Comparison, radii: Sequence[float], bins: int = 10) -> dict[str, Any]:
    """
    Disagreement, over- and underestimation, calibration of the predicted p_A, and certified accuracy of both.

    An estimate is too large where it exceeds the radius that Monte-Carlo certifies for the *same* class; that radius is 0
    where Monte-Carlo abstains or predicts another class. An estimate is too small where it is not too large, and below the
    radius that Monte-Carlo certifies for any class.

    The certified accuracy is that at `radii`; the calibration curve has `bins` with equally many images each.
    """
    estimated, certified, agrees = comparison.estimated_radii, comparison.certified_radii, comparison.agrees
    errors = estimated - np.where(agrees, certified, 0.0)
    over = errors > 0
    # an estimate of 0 for another class misses what Monte-Carlo certifies
    errors = np.where(~over & ~agrees, estimated - certified, errors)
    under = errors < 0
    top = comparison.predicted_classes
    measured_shares = np.take_along_axis(comparison.counts, top[:, None], 1)[:, 0] / comparison.n
    predicted_shares = comparison.probabilities.max(1)
    edges = [-np.inf, 0.0, *(radius for radius in radii if radius > 0), np.inf]
    return {
        "sigma": comparison.sigma,
        "images": len(errors),
        "n": comparison.n,
        "disagreement": float((top != comparison.counts.argmax(1)).mean()),
        "overestimated": float(over.mean()),
        "mean_excess": _mean(errors[over]),
        "underestimated": float(under.mean()),
        "mean_shortfall": _mean(-errors[under]),
        "by_radius": [
            {
                "above": None if np.isinf(low) else low,
                "up_to": None if np.isinf(high) else high,
                "images": int(inside.sum()),
                "overestimated": _mean(over[inside]),
                "underestimated": _mean(under[inside]),
                "mean_error": _mean(errors[inside]),
            }
            for low, high in pairwise(edges)
            if (inside := (certified > low) & (certified <= high)).any()
        ],
        "accuracy": {
            "monte_carlo": _certified_accuracy(comparison.predictions == comparison.labels, certified, radii),
            "estimate": _certified_accuracy((top == comparison.labels) & (estimated > 0), estimated, radii),
        },
        "calibration_curve": [
            {
                "predicted": float(predicted_shares[images].mean()),
                "measured": float(measured_shares[images].mean()),
                "images": len(images),
            }
            for images in np.array_split(np.argsort(predicted_shares, kind="stable"), bins)
            if len(images)
        ],
    }


def expect_accuracy(comparison: Comparison, n: int, radii: Sequence[float]) -> dict[str, Any]:
    """
    The certified accuracy to expect of Monte-Carlo with another number of draws, computed from the measured counts, and the
    estimate's accuracy with that number. Nothing here was measured with `n` draws.

    Returns:
        `n`; `monte_carlo`, the expected accuracy at each radius (by the Jeffreys posterior of the true class's probability)
        with its standard `deviation`; and `estimate`, the accuracy of the estimate.
    """
    noise, labels = GaussianNoise(comparison.sigma), comparison.labels
    hits = comparison.counts[np.arange(len(labels)), labels]
    bounds = clopper_pearson_lower(np.arange(n + 1), n, comparison.alpha)
    expected = []
    for radius in radii:
        p_needed = noise.probability_needed(radius)
        hits_needed = np.searchsorted(bounds, p_needed, side="left" if radius > 0 else "right")
        posterior = stats.betabinom(n, hits + 0.5, comparison.n - hits + 0.5)
        p_certified = np.asarray(posterior.sf(hits_needed - 1), np.float64)
        deviation = float(np.sqrt((p_certified * (1 - p_certified)).sum()) / len(p_certified))
        expected.append({"radius": radius, "share": float(p_certified.mean()), "deviation": deviation})
    estimated = comparison.estimate_radii(n)
    correct = (comparison.predicted_classes == labels) & (estimated > 0)
    return {"n": n, "monte_carlo": expected, "estimate": _certified_accuracy(correct, estimated, radii)}


def evaluate_random_splits(
    comparison: Comparison,
    delta: float,
    radii: Sequence[float],
    splits: int = 200,
    seed: int = 0,
    *,
    decided: Sequence[float] | None = None,
) -> dict[str, Any]:
    """
    Calibrate on a random half of the images and evaluate on the other half, repeatedly.

    The parameters are those of [`evaluate_calibration`], the number of random `splits` and their `seed`.

    Returns:
        The means of [`evaluate_calibration`] over all splits, and `binomial_error`, the standard error of a miss rate of
        delta on half of the images.
    """
    generator = np.random.default_rng(seed)
    num_images = len(comparison.labels)
    evaluations = []
    for _ in range(splits):
        order = generator.permutation(num_images)
        predicted, allowed = comparison.select(order[: num_images // 2]).to_calibration()
        scores = {comparison.sigma: predicted}, {comparison.sigma: allowed}
        calibration = Calibration(*scores, comparison.n, comparison.alpha, "a random half", "")
        other_half = comparison.select(order[num_images // 2 :])
        evaluations.append(evaluate_calibration(other_half, calibration, delta, radii, decided=decided))

    def average(name: str) -> list[dict[str, float]]:
        shares = np.mean([[row["share"] for row in evaluation[name]] for evaluation in evaluations], axis=0)
        return [{"radius": radius, "share": float(share)} for radius, share in zip(radii, shares)]

    return {
        "delta": delta,
        "decided": None if decided is None else list(decided),
        "splits": splits,
        **{
            name: float(np.mean([evaluation[name] for evaluation in evaluations]))
            for name in ("miss_rate", "claim_rate")
        },
        "binomial_error": float(np.sqrt(delta * (1 - delta) / (num_images - num_images // 2))),
        **{name: average(name) for name in ("accuracy", "proved_accuracy")},
    }


def evaluate_calibration(
    comparison: Comparison,
    calibration: Calibration,
    delta: float,
    radii: Sequence[float],
    *,
    decided: Sequence[float] | None = None,
) -> dict[str, Any]:
    """
    Evaluate the claims that follow from the estimates and a calibration.

    Args:
        comparison: estimates and certificates, of images that were not calibrated on.
        calibration: of the count head.
        delta: share of images for which the claim may be wrong.
        radii: radii of the certified accuracy.
        decided: radii to decide: the largest one possible is claimed of each image. `None` claims each image's own radius.

    Returns:
        `miss_rate`, the share of images with a larger claim than Monte-Carlo certifies; `claim_rate`, the share with any
        claim; `accuracy` at the radii, as claimed; and `proved_accuracy`, the part of it that Monte-Carlo certifies too.

    Raises:
        ValueError: see [`Calibration.shift`].
    """
    top_probabilities, agrees = comparison.probabilities.max(1), comparison.agrees
    if decided is None:
        shift = calibration.shift(comparison.sigma, delta)
        claimed = comparison.compute_radii(calibration.shifted_lower_bound(top_probabilities, shift))
        answered = claimed > 0
    else:
        p_needed = probabilities_proving(decided, GaussianNoise(comparison.sigma))
        shift = calibration.shift(comparison.sigma, delta, p_needed)
        num_claimed = calibration.count_claimed_radii(top_probabilities, shift, p_needed)
        claimed, answered = np.append(0.0, sorted(decided))[num_claimed], num_claimed > 0
    certified = comparison.certified_radii
    # an answer with radius 0 claims only that Monte-Carlo predicts the same class
    holds = np.where(agrees, claimed <= certified, ~answered)
    correct = (comparison.predicted_classes == comparison.labels) & answered
    return {
        "delta": delta,
        "decided": None if decided is None else list(decided),
        "miss_rate": float((~holds).mean()),
        "claim_rate": float(answered.mean()),
        "accuracy": _certified_accuracy(correct, claimed, radii),
        "proved_accuracy": _certified_accuracy(correct & agrees, np.minimum(claimed, certified), radii),
    }


def _certified_accuracy(
    correct: NDArray[np.bool_], certified: FloatArray, radii: Sequence[float]
) -> list[dict[str, float]]:
    return [{"radius": radius, "share": float((correct & (certified >= radius)).mean())} for radius in radii]


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None
