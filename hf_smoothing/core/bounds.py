"""Binomial bounds that hold at a fixed number of draws (Clopper-Pearson) and at every stopping time (e-processes).

All functions take scalars or arrays that broadcast together, compute in float64, and return float64 arrays (0-d for
scalars). `successes` of `trials` draws hit the class in question. Nothing here knows of models or noise.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from .validation import check_probability

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class OddsPrior:
    """
    Where an e-process looks for p: at fixed distances above the null.

    Args:
        steps: by how much the log-odds of p may exceed those of the null; positive.
        weights: how likely each step is, `(..., steps)`, positive, of sum 1; by default all equal. With further axes the
            counts have these too: one prior per image.

    A prior that is smooth around p, such as a Beta, needs about `log(draws) / 2` more evidence than one that knows p. Steps
    in geometric progression need `log(number of steps)` more, which is less wherever draws matter.
    """

    steps: tuple[float, ...]
    weights: ArrayLike | None = None

    def __post_init__(self) -> None:
        if not self.steps or not all(0 < step < math.inf for step in self.steps):
            raise ValueError(f"steps={self.steps} must be one or more positive, finite numbers.")
        weights = np.asarray(self.log_weights)
        if self.weights is not None and not (
            weights.shape[-1:] == (len(self.steps),) and (np.abs(np.exp(weights).sum(-1) - 1) < 1e-9).all()
        ):
            raise ValueError(f"weights={self.weights} must be {len(self.steps)} positive numbers of sum 1.")

    @property
    def log_weights(self) -> FloatArray | float:
        """`(..., steps)`, or one number for all steps."""
        if self.weights is None:
            return -math.log(len(self.steps))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(np.asarray(self.weights, np.float64))

    @classmethod
    def for_budget(cls, max_trials: int, alpha: float) -> "OddsPrior":
        """
        Steps from 4.5 (p close to 1) down to the smallest that a quarter of the draws can distinguish from a null of 1/2.
        """
        # near 1/2, a step in log-odds has a divergence of step^2/8
        smallest = math.sqrt(8 * -math.log(alpha) / (max_trials / 4))
        count = max(0, math.floor(math.log(_LARGEST_STEP / smallest) / math.log(_STEP_RATIO)))
        return cls(tuple(_LARGEST_STEP / _STEP_RATIO**k for k in range(count + 1)))

    def reweight(self, distances: ArrayLike, spread: float, floor: float) -> "OddsPrior":
        """
        The same steps, weighted by guesses of p.

        A wrong guess costs at most `log(1/floor)` of evidence, never validity, as long as it is made before the first
        counted draw.

        Args:
            distances: `(..., guesses)`, equally likely guesses of how much the log-odds of p exceed those of the null. A
                guess below 0 means that p is near the null, if it is above it at all.
            spread: standard deviation of the error of a guess, assumed normal; positive.
            floor: the share of the weight that is split equally over the steps, in (0, 1).
        """
        order = np.argsort(self.steps)
        steps = np.array(self.steps)[order]
        # each step stands for the distances that are nearer to it than to other steps, measured by their ratio
        edges = np.concatenate([[0.0], np.sqrt(steps[1:] * steps[:-1]), [np.inf]])
        # computed from above: exact where a guess is far below the null
        beyond = special.ndtr((np.asarray(distances, np.float64)[..., None] - edges) / spread)
        shares = beyond[..., :-1] - beyond[..., 1:]
        hopeless = beyond[..., :1] == 0
        shares = np.where(hopeless, np.arange(len(steps)) == 0, shares / np.where(hopeless, 1.0, beyond[..., :1]))
        mixed = (1 - floor) * shares.mean(-2) + floor / len(steps)
        weights = np.empty_like(mixed)
        weights[..., order] = mixed
        return OddsPrior(self.steps, weights / weights.sum(-1, keepdims=True))


_LARGEST_STEP = 4.5
_STEP_RATIO = 1.6
"""At worst, halfway between two steps, p loses 5 % of the evidence."""

Prior = tuple[float, float] | OddsPrior
"""Parameters of a Beta distribution, or an [`OddsPrior`]."""

JEFFREYS = (0.5, 0.5)


def _counts(successes: ArrayLike, trials: ArrayLike) -> tuple[FloatArray, FloatArray]:
    # `[()]` turns 0-d arrays into scalars, which are several times faster below
    hits, draws = np.asarray(successes, np.float64)[()], np.asarray(trials, np.float64)[()]
    fit = (hits >= 0) & (hits <= draws)
    if not fit.all():
        hits, draws = np.broadcast_arrays(hits, draws)
        bad = int(np.argmin(fit))
        raise ValueError(f"successes={hits.flat[bad]:g} must lie between 0 and trials={draws.flat[bad]:g}.")
    return hits, draws


def _check_prior(prior: Prior) -> None:
    if not isinstance(prior, OddsPrior) and not (0 < prior[0] < np.inf and 0 < prior[1] < np.inf):
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
        ValueError: for inconsistent counts or an alpha outside (0, 1).

    Source: Clopper and Pearson, Biometrika 26 (1934); used by Cohen et al. (arXiv 1902.02918), algorithm CERTIFY.
    """
    hits, draws = _counts(successes, trials)
    check_probability("alpha", alpha)
    quantile = special.betaincinv(np.maximum(hits, 1.0), draws - hits + 1.0, np.asarray(alpha, np.float64))
    return np.asarray(np.where(hits > 0, quantile, 0.0), np.float64)


def log_odds_mixture(
    hits: FloatArray, draws: FloatArray, null: FloatArray, steps: FloatArray, log_weights: FloatArray | float
) -> FloatArray:
    """[`log_e_value`] for an [`OddsPrior`], without checks of its arguments, which have one shape (or are scalars)."""
    gains = np.multiply.outer(hits, steps) - draws[..., None] * np.log1p(np.multiply.outer(null, np.expm1(steps)))
    gains += log_weights
    largest = gains.max(-1)
    return largest + np.log(np.exp(gains - largest[..., None]).sum(-1))


def _log_e_value(hits: FloatArray, draws: FloatArray, null: FloatArray, prior: Prior) -> FloatArray:
    if isinstance(prior, OddsPrior):
        return log_odds_mixture(hits, draws, null, np.asarray(prior.steps), prior.log_weights)
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
    # A prior without (representable) mass above the null gives no evidence, which is always valid.
    return np.where(np.isfinite(log_prior_mass), log_e, np.where(draws > 0, -np.inf, 0.0))


def log_e_value(
    successes: ArrayLike, trials: ArrayLike, null_probability: ArrayLike, prior: Prior = JEFFREYS
) -> FloatArray:
    """
    Logarithm of the e-value of `trials` draws against the hypothesis `p <= null_probability`.

    It is the likelihood ratio of a mixture over `p` above the null (a Beta prior cut to `(null_probability, 1)`, or an
    [`OddsPrior`]) to the null itself. For every `p <= null_probability` it is a non-negative supermartingale that starts at
    1, so by Ville's inequality the probability that it *ever* reaches `1/alpha` is at most alpha: you may look after every
    draw and stop at the luckiest moment.

    Args:
        successes: hits, 0 to `trials`.
        trials: draws; 0 gives 0.
        null_probability: the threshold p0, in (0, 1).
        prior: fixed before the first counted draw. A bad one costs draws, never validity.

    Returns:
        `log E`; `-inf` where the evidence for p > p0 is below what float64 can hold.

    Raises:
        ValueError: for inconsistent counts, a p0 outside (0, 1) or an invalid prior.

    Source: mixture e-processes, e.g. Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference",
    Statistical Science 38 (2023), sections 2 and 5.
    """
    hits, draws = _counts(successes, trials)
    check_probability("null_probability", null_probability)
    _check_prior(prior)
    return np.asarray(_log_e_value(hits, draws, np.asarray(null_probability, np.float64)[()], prior), np.float64)


def confidence_sequence_lower(
    successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike, prior: Prior = JEFFREYS
) -> FloatArray:
    """
    Lower confidence bound of a binomial probability that holds at all numbers of draws at once.

    The bound is the p0 at which [`log_e_value`] against `p <= p0` stops exceeding `log(1/alpha)` as p0 increases from 0. If
    the bound ever exceeded the true p, the e-process against `p` itself would have reached `1/alpha`. So
    `P(at any time, bound > p) <= alpha`, and the largest bound seen so far is a bound too.

    There is only one such p0 with an [`OddsPrior`]: each alternative multiplies the e-value of a hit by
    `exp(step) / (1 + p0 (exp(step) - 1))` and that of a miss by `1 / (1 + p0 (exp(step) - 1))`, and both fall as p0
    increases. For Beta priors the tests find no exception, but there is no proof: the mass that the cut removes could make
    the e-value rise. The sampling rule uses an [`OddsPrior`] only.

    Args and errors as for [`log_e_value`]; `alpha` is in (0, 1), and without draws the bound is 0.

    Returns:
        The bound, rounded down by at most a billionth of its distance to `successes/trials`.
    """
    hits, draws = _counts(successes, trials)
    check_probability("alpha", alpha)
    _check_prior(prior)
    hits, draws, alphas = np.broadcast_arrays(hits, draws, np.asarray(alpha, np.float64))

    def excess(null: FloatArray) -> FloatArray:
        inside = (null > 0) & (null < 1)
        return np.where(inside, _log_e_value(hits, draws, np.where(inside, null, 0.5), prior) + np.log(alphas), np.inf)

    # `E >= 1/alpha` is a test of level alpha at these draws, and Clopper-Pearson inverts the best such test: an upper end.
    low, high = np.zeros(hits.shape), clopper_pearson_lower(hits, draws, alphas)
    mean = np.divide(hits, draws, out=np.zeros(hits.shape), where=draws > 0)
    # Illinois variant of regula falsi; bisection where an end is infinite. `low` is always a rejected null.
    above, below = excess(low), excess(high)
    middle = np.maximum(high - 2 * (mean - high), high / 2)  # the crossing is rarely below this
    last, found = np.zeros(hits.shape, bool), np.zeros(hits.shape, bool)
    for step in range(100):
        value = excess(middle)
        rejected = value >= 0
        again = (rejected == last) & (step > 0)  # an end that stays twice gets half the weight
        above, below = (
            np.where(rejected, value, np.where(again, above / 2, above)),
            np.where(rejected, np.where(again, below / 2, below), value),
        )
        # a bound that was found stays: further steps for the sake of others would change its last bits
        low, high = np.where(rejected & ~found, middle, low), np.where(rejected | found, high, middle)
        found, last = found | (high - low <= _PRECISION * (mean - low)), rejected
        if found.all():
            break
        with np.errstate(invalid="ignore"):
            share = above / (above - below)
        middle = low + (high - low) * np.where(np.isfinite(share) & (step < 50), share, 0.5)
    return np.asarray(low, np.float64)


_PRECISION = 1e-9


def draws_to_reject(null_probability: float, alpha: float, prior: Prior = JEFFREYS) -> int:
    """
    The fewest draws, all of them hits, with which [`log_e_value`] reaches `log(1/alpha)` against `p <= null_probability`.
    """
    check_probability("alpha", alpha)

    def rejects(draws: int) -> bool:
        return bool(log_e_value(draws, draws, null_probability, prior) >= -np.log(alpha))

    most = 1
    while not rejects(most):
        most *= 2
    return bisect_left(range(most), True, lo=most // 2, key=rejects)  # `most` if no smaller number rejects
