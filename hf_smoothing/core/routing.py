"""
How a router makes one classifier of several noise levels, and what its votes prove.

**The system.** The levels are `s_1 < ... < s_K`, and f_l is the classifier smoothed at level l. The base router h maps
a noisy picture to a level. The level of a picture x is the median of h under the router's own noise, `N(0, t^2)`:

    level(x) = the smallest l with P(h(x + noise) <= l) >= 1/2,        g(x) = f_level(x)(x).

So g is one classifier, defined for every picture. Levels have an order, and the median uses it: votes for two
neighbours do not compete, and a few votes for distant levels do not matter. With the most frequent level instead, a
majority of votes inside a set of levels would not keep the level in the set: of .3 / .3 / .4, the first two have .6 of
the votes, and the third wins.

**Theorem.** For each level l, let a_l be a radius within which g cannot use level l: `t Phi^-1(P(h < l))` or `t
Phi^-1(P(h > l))`, if one of them is positive, else 0. Let b_l be a radius within which f_l predicts class c, 0 where
there is none. Then g predicts c within `min over l of max(a_l, b_l)`.

*Proof.* Take x' closer than this. By Neyman-Pearson (Cohen et al. 2019, arXiv 1902.02918, theorem 1; for percentiles:
Chiang et al. 2020, arXiv 2007.03730), P(h < l) at x' is at least `Phi(Phi^-1(P(h < l)) - |x' - x| / t)`, so above 1/2
where `|x' - x| < a_l`: then the level of x' is below l; and likewise for h > l. So for l = level(x') the distance is
at least a_l, hence below b_l, and g(x') = f_l(x') = c. []

Let S be the levels with `a_l` below the radius. The router stays in S within the *router radius*, the smallest a_l
outside S, and all levels in S agree within the smallest b_l in S. The certified radius is the smaller of the two: this
is the certificate of a set of levels. If S is one level, it is the smaller of the router's and the classifier's
radius.

**Probability.** The votes bound the 2 (K - 1) probabilities P(h < l), P(h > l) from below, all at once at level
alpha_r (Clopper-Pearson, each at a part of alpha_r). Each b_l is a certificate of f_l at level alpha_c, with a class
and a number of draws that depend only on draws that it does not count. Then the certificate of g is wrong with
probability at most `alpha_r + alpha_c`, although the set S is chosen by the counted draws, and however many levels it
has.

*Proof.* Suppose that the bounds of the votes hold, and condition on the votes, and on the selection draws, which fix
c. Let a*_l and b*_l be the radii that the true probabilities give, and let l° be a level with the smallest `max(a*_l,
b*_l)`: it is fixed. The certified radius is larger than `max(a*_l°, b*_l°)` only if `b_l° > b*_l°`, since `a_l° <=
a*_l°`. This is an error of the one certificate at l°, and has probability at most alpha_c. []

**What would be wrong.** A router that is not smoothed can be moved by any change of the picture. Falling back to a
default level where the votes are too few to tell is wrong too: doubt is a property of the votes, not of the picture, and
the attacker moves the level, not our doubt. So there is no such fallback: where the router is not sure, the certificate
needs all levels in question to agree.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .bounds import clopper_pearson_lower
from .count_rule import CountRule
from .rule_protocols import FloatArray, NoiseDistribution

ROUTER_SHARE = 0.2
"""The part of alpha that bounds the router's votes."""


@dataclass(frozen=True)
class VoteRule(CountRule):
    """Count `n` votes of a router. Its name gives the votes other noise than the classifier's draws at the same level."""

    n: int = 256

    method: ClassVar[str] = "router"


def median_levels(votes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The medians `(...,)`, as indices of levels, of votes `(..., levels)`; the lower one of two."""
    return (2 * votes.cumsum(-1) >= votes.sum(-1, keepdims=True)).argmax(-1)


def exclusion_radii(votes: NDArray[np.int64], noise: NoiseDistribution, alpha: float) -> FloatArray:
    """
    For each level, a radius within which it is not the level of the picture; 0 where the votes prove none.

    Args:
        votes: `(..., levels)`, of a number of draws fixed in advance, for levels in ascending order.
        noise: the router's.
        alpha: probability that any of the radii is too large.

    Returns:
        `(..., levels)`, in the norm of the noise.
    """
    num_levels, draws = votes.shape[-1], votes.sum(-1, keepdims=True)
    if num_levels == 1:
        return np.zeros(votes.shape)
    at_most = votes.cumsum(-1)
    # no vote is below the lowest level: that takes no bound
    bound = clopper_pearson_lower(np.stack([at_most - votes, draws - at_most]), draws, alpha / (2 * (num_levels - 1)))
    return np.asarray(noise.radius(bound).max(0))


def combine_radii(excluded: FloatArray, radii: FloatArray) -> FloatArray:
    """
    The radii `(...,)` within which the system predicts a class, see the top of this file.

    Args:
        excluded: `(..., levels)`, from [`exclusion_radii`].
        radii: `(..., levels)`, within which the classifier at each level predicts the class; 0 where it is not known
            to.
    """
    return np.maximum(excluded, radii).min(-1)
