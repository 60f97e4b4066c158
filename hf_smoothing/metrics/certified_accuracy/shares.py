"""Shares of images with their intervals, and how many certificates may be wrong.

[`certified_accuracy`] loads this file beside it: `evaluate.load` copies both.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def exact_interval(right: int, images: int) -> list[float]:
    """The exact (Clopper-Pearson) 95 % interval of a share: its low and its high end."""
    interval = stats.binomtest(right, images).proportion_ci(0.95, method="exact")
    return [float(interval.low), float(interval.high)]


def most_wrong_certificates(certificates: int, alpha: float, num_results: int = 1) -> int:
    """
    The number of wrong certificates that is not exceeded with 95 % confidence: the 95 % quantile of Binomial(N, alpha).

    A certificate is wrong if a change smaller than its radius changes the prediction of the smoothed classifier. Given the
    images, certificate i is wrong with probability p_i <= alpha, independently of the others, since each image has its own
    draws. Let it be wrong if U_i <= p_i, with independent, uniform U_i; then U_i <= alpha. So the number W of wrong ones is
    stochastically at most Binomial(N, alpha), and W <= q with 95 % confidence, where q is the 95 % quantile.

    Let k of M images be right and certified at some radius. At most W of these certificates are wrong, so at k - W images or
    more the smoothed classifier gives the right class under every change smaller than that radius: the true certified
    accuracy on these images is at least (k - W) / M. A certificate is wrong or not as a whole, so W does not depend on the
    radius, and with 95 % confidence the true certified accuracy is at least (k - q) / M at *all* radii at once.

    If several results are shown together, each takes its share of the 5 % (Bonferroni), and the bounds of all of them hold
    at once, even if their draws depend on each other. The bound is about these images. The intervals of
    [`certified_accuracy`] are about the population that the images are drawn from, and count every certificate as correct.

    Args:
        certificates: N, images that did not fail; abstentions count too. They must be different images.
        alpha: largest probability that one certificate is wrong (`per_input`), over its draws.
        num_results: how many results are shown together.

    >>> most_wrong_certificates(500, 0.001), most_wrong_certificates(10_000, 0.001)
    (2, 15)
    """
    return int(stats.binom.ppf(1 - 0.05 / num_results, certificates, alpha))


def share_of_sample(
    right: NDArray[np.bool_], estimated: NDArray[np.bool_], sampled: NDArray[np.bool_]
) -> tuple[float, list[float]]:
    """
    The share of N images for which something holds, known for a random sample of n and estimated for all.

    The images are divided by their estimate. Within each part the sample gives a share, and the share of all images is their
    mean, weighted with the sizes of the parts, which are known. So good estimates make the interval narrow, and useless
    ones leave it as wide as it is without them: the sample alone decides what is claimed.

    Args:
        right: whether it holds, `(n,)`, in the order of the images.
        estimated: whether it holds by the estimates, `(N,)`.
        sampled: which images are in the sample, `(N,)`, n of them; drawn at random without regard to the estimates.

    Returns:
        The share, and a 95 % interval: Wilson's score interval in each part, with the correction for finite populations,
        combined as the square root of the sum of squares. It is approximate. In simulations with 100 images or more it
        covers the true share in 94 % of cases or more (see the tests).

    Source: Angelopoulos et al., Prediction-Powered Inference (arXiv 2301.09633), for estimates that are true or false. The
    combination of intervals is that of Zou and Donner, Statistics in Medicine 27 (2008).

    >>> right, estimated = np.array([True, False]), np.array([True, True, False, False])
    >>> share_of_sample(right, estimated, np.array([True, False, True, False]))[0]
    0.5
    """
    share, below, above = 0.0, 0.0, 0.0
    for part in (estimated, ~estimated):
        size, drawn = int(part.sum()), int((part & sampled).sum())
        weight = size / len(part)
        if not drawn:  # nothing is known of it
            low, middle, high = 0.0, 0.5, 1.0
        else:
            middle = float(right[part[sampled]].mean())
            left_out = (size - drawn) / max(size - 1, 1)
            low, high = _wilson_interval(middle, drawn, _NORMAL_95 * math.sqrt(left_out))
        share += weight * middle
        below += (weight * (middle - low)) ** 2
        above += (weight * (high - middle)) ** 2
    return share, [share - math.sqrt(below), share + math.sqrt(above)]


_NORMAL_95 = float(stats.norm.ppf(0.975))


def _wilson_interval(share: float, draws: int, z: float) -> tuple[float, float]:
    centre = share + z * z / (2 * draws)
    half = z * math.sqrt(share * (1 - share) / draws + z * z / (4 * draws * draws))
    return (centre - half) / (1 + z * z / draws), (centre + half) / (1 + z * z / draws)


def unanimous(counts: list[Any], classes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether all counted draws of each image gave its class; False without draws, and for an abstention."""
    agrees = np.zeros(len(classes), bool)
    for at, (row, prediction) in enumerate(zip(counts, classes.astype(int))):
        if row is not None and prediction >= 0:
            draws = np.asarray(row)
            if draws.ndim != 1 or prediction >= len(draws):
                raise ValueError(
                    f"counts[{at}]={row!r} must be the counts of all classes; the prediction is {prediction}."
                )
            agrees[at] = draws[prediction] == draws.sum() > 0
    return agrees
