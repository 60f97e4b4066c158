"""Rules at work on draws of known class probabilities: what they cost, and how often they are wrong."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from ..core.sampling_rule import CleanPass, NoiseDistribution, Outcome, Rule


def simulate(
    rule: Rule, noise: NoiseDistribution, probabilities: ArrayLike, clean: CleanPass, generator: np.random.Generator
) -> tuple[Outcome, int]:
    """
    Run a rule on one image.

    Args:
        rule: the rule.
        noise: the smoothing distribution, for the radii.
        probabilities: `(classes,)`, of the classes under noise, of sum 1.
        clean: what the clean pass said.
        generator: of the draws.

    Returns:
        What was proved, and the draws that it took; the clean pass is none of them.
    """
    run, spent = rule.start(noise, clean), 0
    while wanted := run.next_draws():
        run.update(generator.multinomial(wanted, np.asarray(probabilities)))
        spent += wanted
    return run.outcome(), spent


def wald_draws(p: float, p0: float, alpha: float) -> float:
    """
    Draws below which no sound test of `p > p0` at level alpha can stay on average, if it sees only hits and misses.

    Args:
        p: the true probability, above `p0`.
        p0: the threshold.
        alpha: level.

    Source: Wald, Annals of Mathematical Statistics 16 (1945): ln(1/alpha) / KL(p || p0).
    """
    divergence = special.rel_entr(p, p0) + special.rel_entr(1 - p, 1 - p0)
    return float(np.log(1 / alpha) / divergence)
