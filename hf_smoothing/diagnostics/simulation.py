"""Simulated draws from known class probabilities: how many a rule needs, and how often it is wrong."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from ..core.rule_protocols import CleanPass, NoiseDistribution, Outcomes, Rule

_GOLDEN, _GOLDEN_STEPS = (5**0.5 - 1) / 2, 80


def simulate(
    rule: Rule,
    noise: NoiseDistribution,
    probabilities: ArrayLike,
    clean: CleanPass | None,
    generator: np.random.Generator,
) -> tuple[Outcomes, NDArray[np.int64]]:
    """
    Run a rule on images whose draws have known class probabilities.

    Args:
        rule: the sampling rule.
        noise: the smoothing distribution.
        probabilities: `(images, classes)`.
        clean: the results of the clean pass of all images, if the rule uses one.
        generator: makes the draws.

    Returns:
        What was proved, and the number of draws per image, without the clean pass.
    """
    probabilities = np.asarray(probabilities, np.float64)
    runs = rule.start(noise, *probabilities.shape)
    images = np.arange(len(probabilities))
    wanted = runs.start(images, clean)
    total_draws = np.zeros(len(images), np.int64)
    while len(unfinished := images[wanted > 0]):
        counts = generator.multinomial(wanted[unfinished], probabilities[unfinished])
        total_draws[unfinished] += wanted[unfinished]
        wanted[unfinished] = runs.update(unfinished, counts)
    return runs.outcomes(images), total_draws


def wald_draws(p: ArrayLike, p0: float, alpha: float) -> NDArray[np.float64]:
    """
    The least mean number of draws of any valid test of `p > p0` at level alpha that sees only hits and misses, where `p` is
    the true probability; infinite where p is at most p0.

    Source: Wald, Annals of Mathematical Statistics 16 (1945): ln(1/alpha) / KL(p || p0).
    """
    p = np.asarray(p, np.float64)
    divergence = special.rel_entr(p, p0) + special.rel_entr(1 - p, 1 - p0)
    with np.errstate(divide="ignore"):
        return np.log(1 / alpha) / np.where(p > p0, divergence, 0.0)


def joint_draws(
    probabilities: ArrayLike, noise: NoiseDistribution, radius: float, alpha: float
) -> NDArray[np.float64]:
    """
    The least mean number of draws of any valid test that the radius of the most probable class is larger than `radius`;
    infinite where it is not.

    The test sees the class of every draw. Its bound is ln(1/alpha) over the divergence to the nearest probabilities that
    certify no more than `radius`: those on the boundary `p_c = g(p_j)`, where j is the runner-up and the other classes keep
    their proportions.

    Args:
        probabilities: the true ones, `(images, classes)`, at least two classes.
        noise: the smoothing distribution.
        radius: of the test, at least 0.
        alpha: its level.

    Source: as [`wald_draws`]; the nearest null is the reverse information projection, Grunwald, de Heide and Koolen, JRSS B
    86 (2024).
    """
    second, first = np.sort(np.asarray(probabilities, np.float64), axis=1)[:, -2:].T
    others = np.maximum(1 - first - second, 0.0)

    def divergence(p_b: NDArray[np.float64]) -> NDArray[np.float64]:
        p_a = noise.probability_needed(radius, p_b)
        rest = np.maximum(1 - p_a - p_b, 0.0)
        return special.rel_entr(first, p_a) + special.rel_entr(second, p_b) + special.rel_entr(others, rest)

    # golden section: the divergence is convex in the runner-up's probability
    low, high = np.zeros_like(first), np.full_like(first, 1 - noise.probability_needed(radius))
    for _ in range(_GOLDEN_STEPS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        smaller = divergence(left) < divergence(right)
        low, high = np.where(smaller, low, left), np.where(smaller, right, high)
    exceeds = first > noise.probability_needed(radius, second)
    with np.errstate(divide="ignore"):
        return np.log(1 / alpha) / np.where(exceeds, divergence((low + high) / 2), 0.0)
