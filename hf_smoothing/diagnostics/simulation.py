"""Simulated draws from known class probabilities: how many a rule needs, and how often it is wrong."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from ..core.rule_protocols import CleanPass, NoiseDistribution, Outcomes, Rule


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


def wald_draws(p: float, p0: float, alpha: float) -> float:
    """
    The least mean number of draws of any valid test of `p > p0` at level alpha that sees only hits and misses, where `p` is
    the true probability.

    Source: Wald, Annals of Mathematical Statistics 16 (1945): ln(1/alpha) / KL(p || p0).
    """
    divergence = special.rel_entr(p, p0) + special.rel_entr(1 - p, 1 - p0)
    return float(np.log(1 / alpha) / divergence)
