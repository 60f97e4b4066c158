"""
How one classifier uses two noise levels: it backs off to the second one where the noisy copies do not agree.

**The system.** f_1 and f_2 are the classifier smoothed with Gaussian noise of the primary level s_1 and of the fallback
level s_2. Let p_c(x) be the probability of class c at s_1, and q in [1/2, 1) the agreement. Then

    g(x) = f_1(x) where max_c p_c(x) > q, else f_2(x).

So g is one classifier, defined for every picture: if more than a share q of the noisy copies at s_1 agree, their answer,
else the answer at s_2. It needs no network of its own.

**Theorem.** Let `m(x) = s_1 Phi^-1(max_c p_c(x))` and `t = s_1 Phi^-1(q)`, so that the level of x is primary where m > t.

- Let U be an upper bound of max_c p_c(x). Within `a_1 = max(0, t - s_1 Phi^-1(U))`, no picture has the primary level.
- Let L be a lower bound of the probability of some class. Within `a_2 = max(0, s_1 Phi^-1(L) - t)`, none has the fallback
  level.
- Let b_i be a radius within which f_i predicts class c; 0 where none is known.

Then g predicts c within `min(max(a_1, b_1), max(a_2, b_2))`.

*Proof.* Each `s_1 Phi^-1(p_c)` is 1-Lipschitz (Salman et al. 2019, arXiv 1906.04584, lemma 2; theorem 1 of Cohen et al.
2019, arXiv 1902.02918, rests on it), so their largest, m, is too. Take x' closer to x than the radius. If its level is
primary, then `m(x') > t`. Where a_1 > 0, `m(x) <= t - a_1`, so the distance is above a_1. Hence it is below b_1, and g(x') =
f_1(x') = c. If its level is fallback, then `m(x') <= t`. Where a_2 > 0, `m(x) >= t + a_2`, so the distance is at least a_2.
Hence it is below b_2, and g(x') = f_2(x') = c. []

One of a_1 and a_2 is 0, since `L <= U`. So where the two classifiers predict different classes, at most one of them gets a
radius: that of the level in use.

**Probability.** Three bounds share alpha: the certificate of f_1 (L is one of its bounds), that of f_2, and U; see
[`ALPHA_SHARES`]. If all three hold, so does the claim, whatever class, level and number of draws was chosen from which
draws. By the union bound, this is so with probability at least 1 - alpha. Each needs no more than what it claims alone: the
draws that U counts are fresh, or the counted draws of f_1, and their number does not depend on them. U is the
Clopper-Pearson bound of the class drawn most often. It is no less than that of the most probable class, so no alpha is split
over classes.

**What would be wrong.** The level that a few votes show is not the level of the picture: so a radius of f_i alone, without
a_1 and a_2, is none of g. Nor may U see more draws until it is small enough.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from .bounds import clopper_pearson_lower
from .count_rule import CountRule
from .rule_protocols import NoiseDistribution

LEVELS = (0.5, 0.12)
"""The primary and the fallback level, where none are given."""
AGREEMENT = 0.5

ALPHA_SHARES = (0.8, 0.1, 0.1)
"""
The parts of alpha: of the certificate at the primary level, of that at the fallback level, of the bound of the agreement.
The first has most, since large radii rest on it alone.
"""


@dataclass(frozen=True)
class AgreementRule(CountRule):
    """Count `n` draws that bound the agreement. By its name, they get other noise than the certificate at the same level."""

    method: ClassVar[str] = "agreement"


def check_agreement(levels: Sequence[float], agreement: float) -> None:
    """Raise a `ValueError` for levels that are not two, or an agreement out of range."""
    if len(levels) != 2 or levels[0] == levels[1]:
        raise ValueError(
            f"levels={tuple(levels)} must be two noise levels, the primary and the fallback: such as {LEVELS}."
        )
    if not 0.5 <= agreement < 1:
        raise ValueError(f"agreement={agreement} must be a share of the noisy copies from 0.5 to below 1.")


def given_levels(levels: Sequence[float] | None, agreement: float | None) -> dict[str, Any]:
    """Those of the settings that are not `None`."""
    return {name: value for name, value in (("levels", levels), ("agreement", agreement)) if value is not None}


def refuse_levels(settings: Collection[str]) -> None:
    """Raise a `ValueError` where `levels` or `agreement` is among the settings of a classifier of one noise level."""
    if "levels" in settings or "agreement" in settings:
        raise ValueError(
            'levels and agreement are for "auto" in place of a noise level, one classifier of two: leave them out.'
        )


def bound_agreement(counts: ArrayLike, alpha: float) -> float:
    """
    An upper bound of the probability of the most probable class.

    Args:
        counts: `(classes,)`, of a number of draws that does not depend on them.
        alpha: probability that it is too small.
    """
    draws, most = np.sum(counts), np.max(counts)
    return 1 - float(clopper_pearson_lower(draws - most, draws, alpha))


def radius_of_fallback(p_upper: float, agreement: float, noise: NoiseDistribution) -> float:
    """
    `a_1`: within this radius no picture has the primary level.

    Args:
        p_upper: upper bound of the probability of every class, from [`bound_agreement`].
        agreement: the share of noisy copies that must agree.
        noise: Gaussian, of the primary level.
    """
    return 2 * float(noise.radius(agreement, p_upper))


def radius_of_primary(p_lower: float, agreement: float, noise: NoiseDistribution) -> float:
    """`a_2`: within this radius no picture has the fallback level; `p_lower` bounds the probability of some class."""
    threshold = noise.sigma * float(special.ndtri(agreement))
    return max(0.0, float(noise.radius(p_lower)) - threshold)
