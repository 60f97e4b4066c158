"""Binomial bounds that hold at a fixed number of draws (Clopper-Pearson) and at every stopping time (e-processes).

All functions take scalars or arrays that broadcast together, compute in float64, and return float64 arrays (0-d for
scalars). `successes` of `trials` draws hit the class in question. Nothing here knows of models or noise.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

FloatArray = NDArray[np.float64]


def _counts(successes: ArrayLike, trials: ArrayLike) -> tuple[FloatArray, FloatArray]:
    # `[()]` makes scalars of 0-d arrays, on which everything below is several times faster
    hits, draws = np.asarray(successes, np.float64)[()], np.asarray(trials, np.float64)[()]
    fit = (hits >= 0) & (hits <= draws)
    if not fit.all():
        hits, draws = np.broadcast_arrays(hits, draws)
        bad = int(np.argmin(fit))
        raise ValueError(f"successes={hits.flat[bad]:g} must lie between 0 and trials={draws.flat[bad]:g}.")
    return hits, draws


def check_probability(name: str, value: ArrayLike) -> None:
    """Raise a `ValueError` that names the value unless all of `value` lies strictly between 0 and 1."""
    values = np.asarray(value, np.float64)[()]
    if not ((values > 0) & (values < 1)).all():
        raise ValueError(f"{name}={value!r} must lie strictly between 0 and 1.")


def _check_prior(prior: tuple[float, float]) -> None:
    if not (0 < prior[0] < np.inf and 0 < prior[1] < np.inf):
        raise ValueError(f"prior={prior} must be two positive numbers, the parameters of a Beta distribution.")


def clopper_pearson_lower(successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike) -> FloatArray:
    """
    One-sided lower confidence bound of a binomial probability, for a number of draws fixed in advance.

    Args:
        successes: hits, 0 to `trials`.
        trials: draws; 0 gives the bound 0.
        alpha: probability that the bound exceeds the true value, in (0, 1).

    Returns:
        The largest p0 such that `P(Binomial(trials, p0) >= successes) <= alpha`.

    Raises:
        ValueError: for counts that do not fit together or an alpha outside (0, 1).

    Source: Clopper and Pearson, Biometrika 26 (1934); used by Cohen et al. (arXiv 1902.02918), algorithm CERTIFY.
    """
    hits, draws = _counts(successes, trials)
    check_probability("alpha", alpha)
    quantile = special.betaincinv(np.maximum(hits, 1.0), draws - hits + 1.0, np.asarray(alpha, np.float64))
    return np.asarray(np.where(hits > 0, quantile, 0.0), np.float64)


def _log_e_value(hits: FloatArray, draws: FloatArray, null: FloatArray, prior: tuple[float, float]) -> FloatArray:
    a, b = prior
    with np.errstate(divide="ignore", invalid="ignore"):
        log_prior_mass = np.log(special.betaincc(a, b, null))
        log_e = (
            special.betaln(a + hits, b + draws - hits)
            - special.betaln(a, b)
            + np.log(special.betaincc(a + hits, b + draws - hits, null))
            - log_prior_mass
            - special.xlogy(hits, null)
            - special.xlog1py(draws - hits, -null)
        )
    if np.isfinite(log_prior_mass).all():
        return log_e
    # A prior without (representable) mass above the null says nothing: no evidence, which is always valid.
    return np.where(np.isfinite(log_prior_mass), log_e, np.where(draws > 0, -np.inf, 0.0))


def log_e_value(
    successes: ArrayLike,
    trials: ArrayLike,
    null_probability: ArrayLike,
    prior: tuple[float, float] = (0.5, 0.5),
) -> FloatArray:
    """
    Logarithm of the e-value of `trials` draws against the hypothesis `p <= null_probability`.

    It is the likelihood ratio of a mixture over `p` above the null (a Beta prior cut to `(null_probability, 1)`) to the
    null itself. For every `p <= null_probability` it is a non-negative supermartingale that starts at 1 as draws come
    in, so by Ville's inequality the probability that it *ever* reaches `1/alpha` is at most alpha: one may look after
    every draw and stop at the luckiest moment.

    Args:
        successes: hits, 0 to `trials`.
        trials: draws; 0 gives 0.
        null_probability: the threshold p0, in (0, 1).
        prior: parameters of the Beta distribution. A wrong one costs draws, never validity, as long as it is fixed
            before the first counted draw.

    Returns:
        `log E`; `-inf` where the evidence for p > p0 is below what float64 can hold.

    Raises:
        ValueError: for counts that do not fit together, a p0 outside (0, 1) or a prior that is no Beta distribution.

    Source: mixture e-processes, e.g. Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference",
    Statistical Science 38 (2023), sections 2 and 5.
    """
    hits, draws = _counts(successes, trials)
    check_probability("null_probability", null_probability)
    _check_prior(prior)
    return np.asarray(_log_e_value(hits, draws, np.asarray(null_probability, np.float64)[()], prior), np.float64)


def confidence_sequence_lower(
    successes: ArrayLike,
    trials: ArrayLike,
    alpha: ArrayLike,
    prior: tuple[float, float] = (0.5, 0.5),
) -> FloatArray:
    """
    Lower confidence bound of a binomial probability that holds at all numbers of draws at once.

    The bound is where [`log_e_value`] against `p <= p0` stops exceeding `log(1/alpha)` as p0 ascends from 0. If it ever
    exceeded the true p, the e-process against `p` itself would have reached `1/alpha`; so
    `P(at any time, bound > p) <= alpha`, and the largest bound seen so far is a bound too.

    Args:
        successes: hits, 0 to `trials`.
        trials: draws; 0 gives the bound 0.
        alpha: probability that the bound ever exceeds the true value, in (0, 1).
        prior: parameters of the Beta prior, see [`log_e_value`].

    Returns:
        The bound, from below: the true crossing lies within one bisection step (2^-60) above it.

    Raises:
        ValueError: as [`log_e_value`].
    """
    hits, draws = _counts(successes, trials)
    check_probability("alpha", alpha)
    _check_prior(prior)
    hits, draws, threshold = np.broadcast_arrays(hits, draws, -np.log(np.asarray(alpha, np.float64)))
    # At p0 = successes/trials no alternative is likelier than the null, so E <= 1: the crossing lies below.
    low = np.zeros(hits.shape)
    high = np.divide(hits, draws, out=np.zeros(hits.shape), where=draws > 0)
    for _ in range(60):
        middle = (low + high) / 2
        inside = (middle > 0) & (middle < 1)
        null = np.where(inside, middle, 0.5)
        rejected = inside & (_log_e_value(hits, draws, null, prior) >= threshold)
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return np.asarray(low, np.float64)


def draws_to_reject(null_probability: float, alpha: float, prior: tuple[float, float] = (0.5, 0.5)) -> int:
    """
    The fewest draws with which [`log_e_value`] can reach `log(1/alpha)` against `p <= null_probability`: all hits.

    Raises:
        ValueError: for a probability outside (0, 1).
    """
    check_probability("alpha", alpha)
    threshold = -np.log(alpha)

    def rejects(draws: int) -> bool:
        return bool(log_e_value(draws, draws, null_probability, prior) >= threshold)

    most = 1
    while not rejects(most):
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if rejects(middle) else (middle, most)
    return most
