"""
The plans of the two-stage rule: how many draws images are worth.

A plan maximises `mean radius - price * mean draws` by backward induction under a prior on the probability of the class that
the selection draws favour. The prior and the price are settings: whatever they are, certificates hold, and a prior that does
not fit the images costs draws only.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from .bounds import clopper_pearson_lower
from .rule_protocols import FloatArray, NoiseDistribution

STAGES = (8, 16, 32, 64, 128, 256, 512)
"""Selection draws after which an image may be given up, or its counted draws be planned."""

_QUANTILES = np.arange(-1.2, 4.6, 0.08)
_PROBABILITIES = special.ndtr(_QUANTILES)
_PRIOR = np.exp(-0.5 * ((_QUANTILES - 0.8) / 1.6) ** 2)
"""Quantiles of p are normal with mean .8 and standard deviation 1.6: from images that nobody can certify to p = 1 - 1e-5."""
_RUNNER_UP_SHARES = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
"""Levels of the runner-up's share of the draws that miss the class."""
_UPPER_SHARE = 0.2
"""The part of alpha that bounds the runner-up."""
_SIZE_RATIO = 1.19
_SMALLEST_SIZE = 8
_LOWEST_PRICE = 1e-9
_PRICE_TOLERANCE = 0.01
"""Of the logarithm of the price."""
_HEAD_SPREAD, _HEAD_TRUST = 0.9, 0.8
"""Assumed standard deviation of the error of the log-odds that a count head predicts, and how often it is right about the
class."""


def runner_up_level(runner_up: NDArray[np.int64], misses: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of the levels of the runner-up's share of the misses fits the selection draws best."""
    middles = (np.array(_RUNNER_UP_SHARES[1:]) + np.array(_RUNNER_UP_SHARES[:-1])) / 2
    return np.searchsorted(middles, (runner_up + 2) / (misses + 4))


def prove(hits: ArrayLike, runner_up: ArrayLike, draws: ArrayLike, alpha: float) -> tuple[FloatArray, FloatArray]:
    """
    Bounds that hold together with probability at least `1 - alpha`: a lower one of the class's probability, and an upper one
    of every other class's.

    The lower bound has four fifths of alpha. The rest bounds the class that is drawn most often of the others. Its bound is
    no less than that of the *most probable* other class, so no alpha is split over classes.
    """
    p_lower = clopper_pearson_lower(hits, draws, (1 - _UPPER_SHARE) * alpha)
    return p_lower, np.minimum(1 - p_lower, _bound_runner_up(runner_up, draws, alpha))


def _bound_runner_up(runner_up: ArrayLike, draws: ArrayLike, alpha: float) -> FloatArray:
    return 1 - clopper_pearson_lower(np.asarray(draws) - np.asarray(runner_up), draws, _UPPER_SHARE * alpha)


@dataclass(frozen=True)
class Plan:
    """
    What to do after each stage of selection.

    Attributes:
        actions: for each stage, `(levels of the runner-up, stage + 1)`, by the draws of the leading class: the number of
            counted draws; 0 to abstain, -1 for the next stage.
        mean_draws: draws per image under the prior.
    """

    actions: tuple[NDArray[np.int64], ...]
    mean_draws: float


@lru_cache
def make_planner(noise: NoiseDistribution, alpha: float, max_draws: int) -> "Planner":
    """A [`Planner`], made once for all runs with the same settings, since it takes a part of a second."""
    return Planner(noise, alpha, max_draws)


class Planner:
    """
    Plans for one distribution, level and budget.

    Args:
        noise: the smoothing distribution.
        alpha: level of the bounds.
        max_draws: the most draws per image, 16 or more.
    """

    def __init__(self, noise: NoiseDistribution, alpha: float, max_draws: int):
        self.max_draws = max_draws
        self.stages = tuple(stage for stage in STAGES if 2 * stage <= max_draws)
        sizes = [_SMALLEST_SIZE]
        while (larger := max(sizes[-1] + 1, round(sizes[-1] * _SIZE_RATIO))) < max_draws - self.stages[0]:
            sizes.append(larger)
        self.sizes = np.array(sorted({*sizes, *(max_draws - stage for stage in self.stages)}))
        self.expected = np.stack([_expected_radius(noise, alpha, size) for size in self.sizes.tolist()], axis=2)
        """`(levels, probabilities, sizes)`: the mean radius that so many counted draws prove."""
        self.prior = _PRIOR / _PRIOR.sum()
        self._prices: dict[int, float] = {}
        self._plans: dict[tuple[float, float | None], Plan] = {}

    def price_for(self, mean_draws: int) -> float:
        """The price, in radius per draw, at which images like the prior's take so many draws on average."""
        if mean_draws not in self._prices:

            def excess(log_price: float) -> float:
                return math.log(self.plan(math.exp(log_price)).mean_draws / mean_draws)

            low, high = math.log(_LOWEST_PRICE), math.log(float(self.expected.max()))
            log_price = low if excess(low) <= 0 else optimize.brentq(excess, low, high, xtol=_PRICE_TOLERANCE)
            self._prices[mean_draws] = math.exp(log_price)
        return self._prices[mean_draws]

    def plan_for_guess(self, price: float, log_odds: float | None) -> Plan:
        """The plan for a count head's guess of the log-odds of p; without one, for the prior."""
        key = (price, log_odds)
        if key not in self._plans:
            prior = self.prior
            if log_odds is not None:
                near = prior * np.exp(-0.5 * ((special.logit(_PROBABILITIES) - log_odds) / _HEAD_SPREAD) ** 2)
                prior = _HEAD_TRUST * near / near.sum() + (1 - _HEAD_TRUST) * prior
            self._plans[key] = self.plan(price, prior)
        return self._plans[key]

    def plan(self, price: float, prior: FloatArray | None = None) -> Plan:
        """The best plan at a price, under a prior `(probabilities,)` on `_PROBABILITIES`."""
        prior = self.prior if prior is None else prior
        all_gains = self.expected - price * self.sizes
        actions: list[NDArray[np.int64]] = []
        value = draws = np.zeros((len(all_gains), 1))  # of the stage after, by level and hits
        for stage, following in zip(self.stages[::-1], (None, *self.stages[:0:-1])):
            posterior = _posterior(stage, prior)
            possible = np.searchsorted(self.sizes, self.max_draws - stage, side="right")
            gain = posterior @ all_gains[:, :, :possible]  # (levels, hits, sizes)
            best = np.maximum(gain.max(2), 0.0)
            action = np.where(best > 0, self.sizes[gain.argmax(2)], 0)
            planned = action.astype(np.float64)
            if following is not None:
                step = following - stage
                chances = posterior @ _binomial(step)
                after = np.arange(stage + 1)[:, None] + np.arange(step + 1)
                going_on = (chances * value[:, after]).sum(2) - price * step
                more = going_on > best
                planned = np.where(more, (chances * draws[:, after]).sum(2) + step, planned)
                best, action = np.where(more, going_on, best), np.where(more, -1, action)
            value, draws = best, planned
            actions.insert(0, action)
        start = prior @ _binomial(self.stages[0])
        return Plan(tuple(actions), float((draws @ start).mean()) + self.stages[0])


@lru_cache
def _binomial(draws: int) -> FloatArray:
    """`(probabilities, draws + 1)`: the chances of each number of hits."""
    hits = np.arange(draws + 1)
    return (
        special.binom(draws, hits) * _PROBABILITIES[:, None] ** hits * (1 - _PROBABILITIES[:, None]) ** (draws - hits)
    )


def _posterior(draws: int, prior: FloatArray) -> FloatArray:
    """`(draws + 1, probabilities)`: how likely each probability is after each number of hits."""
    hits = np.arange(draws + 1)[:, None]
    with np.errstate(divide="ignore"):
        log_weights = hits * np.log(_PROBABILITIES) + (draws - hits) * np.log1p(-_PROBABILITIES) + np.log(prior)
    weights = np.exp(log_weights - log_weights.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def _expected_radius(noise: NoiseDistribution, alpha: float, draws: int) -> FloatArray:
    """`(levels, probabilities)`: the mean radius that so many draws prove."""
    misses = [0]
    while misses[-1] < 0.75 * draws:  # with gaps of .5 standard deviations; two bounds prove radii below p = 1/2 too
        gap = 0.5 * math.sqrt(misses[-1] * (1 - misses[-1] / draws))
        misses.append(misses[-1] + (2 * int(gap / 2) + 1 if gap > 1 else 1))
    numbers = np.array(misses)
    numbers = numbers[numbers <= draws]
    edges = np.append((numbers[:-1] + numbers[1:] - 1) // 2, numbers[-1])
    chances = np.diff(special.bdtr(edges[None], draws, (1 - _PROBABILITIES)[:, None]), axis=1, prepend=0.0)
    p_lower = clopper_pearson_lower(draws - numbers, draws, (1 - _UPPER_SHARE) * alpha)
    # the bounds of shares of these numbers are interpolated: each takes long to compute
    shares = np.multiply.outer(_RUNNER_UP_SHARES, numbers)
    upper = np.interp(np.sqrt(shares), np.sqrt(numbers), _bound_runner_up(numbers, draws, alpha))
    return np.asarray(noise.radius(p_lower, np.minimum(1 - p_lower, upper))) @ chances.T
