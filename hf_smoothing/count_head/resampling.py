"""What a count head's estimates are worth for guarantees, over many random choices of the certified images."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from ..core.bounds import FloatArray
from ..core.calibration import Calibration, estimate_lower_bound
from ..core.noise import GaussianNoise
from ..core.rule_protocols import probabilities_proving
from ..core.selection import count_selected_radii
from ..metrics.certified_accuracy.shares import exact_interval, share_of_sample
from .comparison import Comparison
from .recalibration import Recalibration


def evaluate_selection(
    comparison: Comparison, radii: list[float], false_claims: float, splits: int, seed: int
) -> list[dict[str, Any]]:
    """
    Calibrate a conformal selection on a random half of the images and count its claims about the other half, repeatedly.

    Args:
        comparison: estimates and certificates.
        radii: radii to claim, each for itself.
        false_claims: the share of wrong claims that is allowed.
        splits: how many random halves.
        seed: their seed.

    Returns:
        For each radius: `false_share`, the mean share of claims that Monte-Carlo does not prove (0 where nothing is
        claimed); `error`, its binomial standard error for as many claims as one half gets on average, were exactly
        `false_claims` of them wrong; `claimed` and `proved`, the mean numbers of images, in a half, for which the radius is
        claimed, and for which Monte-Carlo proves it.
    """
    generator = np.random.default_rng(seed)
    needed = probabilities_proving(radii, GaussianNoise(comparison.sigma))
    predicted, allowed = (np.array(values) for values in comparison.to_calibration())
    p_lower = estimate_lower_bound(comparison.probabilities.max(1), comparison.n, comparison.alpha)
    p_lower[p_lower <= 0.5] = 0.0
    certified = comparison.certified_radii[:, None] >= np.array(radii)
    proved = certified & comparison.agrees[:, None]
    counted = []
    for _ in range(splits):
        calibrated, judged = np.array_split(generator.permutation(len(predicted)), 2)
        calibration = Calibration(
            {comparison.sigma: tuple(predicted[calibrated])},
            {comparison.sigma: tuple(allowed[calibrated])},
            comparison.n,
            comparison.alpha,
            "a random half",
            "",
        )
        number = count_selected_radii(calibration, comparison.sigma, p_lower[judged], needed, false_claims)
        claimed = number[:, None] > np.arange(len(radii))
        false = (claimed & ~proved[judged]).sum(0)
        counted.append((false / np.maximum(claimed.sum(0), 1), claimed.sum(0), certified[judged].sum(0)))
    shares, claims, certificates = np.mean(counted, axis=0)
    errors = np.sqrt(false_claims * (1 - false_claims) / np.maximum(claims, 1))
    return [
        {
            "radius": radius,
            "false_claims": false_claims,
            "splits": splits,
            "false_share": float(share),
            "error": float(error),
            "claimed": float(claim),
            "proved": float(certificate),
        }
        for radius, share, error, claim, certificate in zip(radii, shares, errors, claims, certificates)
    ]


def evaluate_estimated_share(
    right: NDArray[np.bool_], estimated: NDArray[np.bool_], sample: int, resamplings: int, seed: int
) -> dict[str, Any]:
    """
    Estimate a certified accuracy from a random sample of certificates and the estimates of all images, repeatedly.

    Args:
        right: `(images,)`, whether Monte-Carlo certifies the right class with the radius.
        estimated: `(images,)`, whether the estimate does.
        sample: number of certificates.
        resamplings: how many random samples.
        seed: their seed.

    Returns:
        `coverage`, the share of 95 % intervals that hold the true share of all images, and their mean `width`; `exact`, the
        same of the exact binomial interval from the sample alone; `times_fewer`, how many times as many certificates the
        exact interval takes to become as narrow.
    """
    generator = np.random.default_rng(seed)
    truth = float(right.mean())
    intervals, exact = [], []
    # there are few different numbers, and an interval takes longer than all else of a sample
    interval_of = functools.cache(exact_interval)
    for _ in range(resamplings):
        sampled = np.zeros(len(right), bool)
        sampled[generator.choice(len(right), sample, replace=False)] = True
        intervals.append(share_of_sample(right[sampled], estimated, sampled)[1])
        exact.append(interval_of(int(right[sampled].sum()), sample))
    width = float(np.mean(np.diff(intervals)))
    return {
        "share": truth,
        "sample": sample,
        "resamplings": resamplings,
        "coverage": _coverage(np.array(intervals), truth),
        "width": width,
        "exact": {"coverage": _coverage(np.array(exact), truth), "width": float(np.mean(np.diff(exact)))},
        "times_fewer": _certificates_for_width(truth, width) / sample,
    }


def evaluate_few_certificates(
    comparison: Comparison, radii: Sequence[float], sample: int, repeats: int, seed: int
) -> dict[str, Any]:
    """
    Recalibrate a head with the certificates of a few random images and judge its certified accuracy on all other images,
    repeatedly.

    Args:
        comparison: estimates and certificates.
        radii: radii of the certified accuracy.
        sample: number of certificates.
        repeats: how many random samples.
        seed: their seed.

    Returns:
        How far the certified accuracy of the other images is from that of Monte-Carlo, at the radius where the difference is
        largest: its `mean` over the samples, its `quantile_95`, and `within`, the share of samples with at most
        [`LARGEST_GAP`]. `recalibrated` is that of the recalibrated estimates, `post_stratified` that of the share which
        [`share_of_sample`] computes from the same certificates and the estimates as they are.
    """
    generator = np.random.default_rng(seed)
    right, estimated = comparison.predictions == comparison.labels, _claim(comparison, radii)
    certified = right[:, None] & (comparison.certified_radii[:, None] >= np.array(radii))
    images = len(right)
    gaps: dict[str, list[float]] = {"recalibrated": [], "post_stratified": []}
    for _ in range(repeats):
        order = generator.permutation(images)
        sampled = np.zeros(images, bool)
        sampled[order[:sample]] = True
        others = np.flatnonzero(~sampled)
        fitted = Recalibration.fit(comparison.select(np.flatnonzero(sampled)))
        claimed = _claim(fitted.apply(comparison.select(others)), radii)
        gaps["recalibrated"].append(float(np.abs(claimed.mean(0) - certified[others].mean(0)).max()))
        shares = [share_of_sample(c[sampled], e, sampled)[0] for c, e in zip(certified.T, estimated.T)]
        # the certificates of the sample are known: the whole difference lies in the others
        gap = np.abs(shares - certified.mean(0)).max() * images / len(others)
        gaps["post_stratified"].append(float(gap))
    return {"sample": sample, "repeats": repeats, **{name: _describe_gaps(values) for name, values in gaps.items()}}


LARGEST_GAP = 0.03
"""The difference of certified accuracies that an estimate should not exceed at any radius."""


def _claim(comparison: Comparison, radii: Sequence[float]) -> NDArray[np.bool_]:
    """Whether the estimate is right and has at least these radii, `(images, radii)`."""
    noise = GaussianNoise(comparison.sigma)
    needed = np.array([noise.probability_needed(radius) for radius in radii])
    p_lower = estimate_lower_bound(comparison.probabilities.max(1), comparison.n, comparison.alpha)[:, None]
    right = (comparison.predicted_classes == comparison.labels)[:, None]
    # at radius 0 an answer counts only if its radius is above 0
    return right & np.where(np.array(radii) > 0, p_lower >= needed, p_lower > needed)


def _describe_gaps(gaps: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(gaps)),
        "quantile_95": float(np.quantile(gaps, 0.95)),
        "within": float(np.mean(np.array(gaps) <= LARGEST_GAP)),
    }


def _coverage(intervals: FloatArray, truth: float) -> float:
    return float(((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).mean())


def _certificates_for_width(share: float, width: float) -> float:
    """How many certificates give an exact binomial interval of this width, for an observed share."""

    def excess(number: float) -> float:
        right, wrong = share * number, (1 - share) * number
        low = stats.beta.ppf(0.025, right, wrong + 1) if right else 0.0
        high = stats.beta.ppf(0.975, right + 1, wrong) if wrong else 1.0
        return float(high - low) - width

    return float(optimize.brentq(excess, 1.0, 1e8))
