"""Binomial bounds that hold at a number of draws fixed in advance. Nothing here knows of models or noise."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from .validation import check_probability

FloatArray = NDArray[np.float64]


def clopper_pearson_lower(successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike) -> FloatArray:
    """
    One-sided lower confidence bound of a binomial probability, for a number of draws fixed in advance.

    Args:
        successes: hits, 0 to `trials`.
        trials: draws; 0 gives the bound 0.
        alpha: probability that the bound exceeds the true value, in (0, 1).

    Scalars or arrays that broadcast together; computed in float64.

    Returns:
        The largest p0 such that `P(Binomial(trials, p0) >= successes) <= alpha`.

    Raises:
        ValueError: for inconsistent counts or an alpha outside (0, 1).

    Source: Clopper and Pearson, Biometrika 26 (1934); used by Cohen et al. (arXiv 1902.02918), algorithm CERTIFY.
    """
    hits, draws = _counts(successes, trials)
    check_probability("alpha", alpha)
    quantile = special.betaincinv(np.maximum(hits, 1.0), draws - hits + 1.0, np.asarray(alpha, np.float64))
    return np.asarray(np.where(hits > 0, quantile, 0.0), np.float64)


def _counts(successes: ArrayLike, trials: ArrayLike) -> tuple[FloatArray, FloatArray]:
    # `[()]` turns 0-d arrays into scalars, which are several times faster below
    hits, draws = np.asarray(successes, np.float64)[()], np.asarray(trials, np.float64)[()]
    fit = (hits >= 0) & (hits <= draws)
    if not fit.all():
        hits, draws = np.broadcast_arrays(hits, draws)
        bad = int(np.argmin(fit))
        raise ValueError(f"successes={hits.flat[bad]:g} must lie between 0 and trials={draws.flat[bad]:g}.")
    return hits, draws
