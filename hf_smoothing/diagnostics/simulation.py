"""Simulated draws from known class probabilities: how many a rule needs, and how often it is wrong."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from ..core.rule_protocols import CleanPass, NoiseDistribution, Outcome, Rule


def simulate(
    rule: Rule, noise: NoiseDistribution, probabilities: ArrayLike, clean: CleanPass, generator: np.random.Generator
) -> tuple[Outcome, int]:
    """
    Run a rule on one image, whose draws have known class probabilities `(classes,)`.

    Returns:
        What was proved, and the number of draws, without the clean pass.
    """
    run, total_draws = rule.start(noise, clean), 0
    while draws := run.next_draws():
        run.update(generator.multinomial(draws, np.asarray(probabilities)))
        total_draws += draws
    return run.outcome(), total_draws


def wald_draws(p: float, p0: float, alpha: float) -> float:
    """
    The least mean number of draws of any valid test of `p > p0` at level alpha that sees only hits and misses, where `p` is
    the true probability.

    Source: Wald, Annals of Mathematical Statistics 16 (1945): ln(1/alpha) / KL(p || p0).
    """
    divergence = special.rel_entr(p, p0) + special.rel_entr(1 - p, 1 - p0)
    return float(np.log(1 / alpha) / divergence)
