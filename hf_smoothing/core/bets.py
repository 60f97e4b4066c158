"""
Bets on class counts: the e-processes of the sequential rule.

Notation. Draws are independent with class probabilities p; `n_c` of n draws hit class c. `g(b) = probability_needed(r, b)`:
class c holds to the radius r if `p_c > g(p_j)` for every rival j. The null of a pair is `N(c, j) = {p: p_c <= g(p_j)}`.

**One bet.** g is concave and increases (Gaussian: `g'(b) = exp(-d z - d^2/2)` with `z = Phi^-1(b)` and `d = 2 r/sigma`
falls in b; uniform: linear; Laplace: the smaller of two lines). So N(c, j) lies below each tangent: `p_c - s p_j <= m` with
`s = g'(b)` and `m = g(b) - s b >= 0`. A draw pays `1 + lam (1 - m)` if it hits c, `1 - lam (m + s)` if it hits j, and
`1 - lam m` otherwise, for `0 < lam < 1/(m + s)`. All payoffs are positive, and their mean is
`1 + lam (p_c - s p_j - m) <= 1` for every p in N(c, j). So the product over the draws is a non-negative supermartingale, and
so is a mixture of such products with weights fixed before the first counted draw,

    E_cj = sum_k w_k (1 + lam_k (1 - m_k))^n_c (1 - lam_k (m_k + s_k))^n_j (1 - lam_k m_k)^(n - n_c - n_j).

By Ville's inequality, `P(E_cj ever reaches 1/a) <= a` for every p in N(c, j). (Each bet is the likelihood ratio of some q to
its reverse information projection on N(c, j), and so log-optimal against q.) At r = 0, s = 1 and m is the sampler's error,
almost 0: the sign test.

**Every rival.** Given `n_c` and n, `E_cj` falls in `n_j`, since s > 0: all rivals are rejected if the one with the most
draws is. No alpha is split over rivals: if the radius of c is at most r, p lies in N(c, j) for some *fixed* j, and the claim
needs that `E_cj` too (an intersection-union test).

Sources: Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference", Statistical Science 38 (2023);
Grunwald, de Heide and Koolen, "Safe testing", JRSS B 86 (2024), theorem 1; Berger, Technometrics 24 (1982).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from .rule_protocols import FloatArray, NoiseDistribution

_LARGEST_STEP = 3.2
_STEP_RATIO = 1.6
"""Bets suit classes whose log-odds lie these steps above the null: in geometric progression, a p halfway between two steps
loses at most 5 % of the evidence."""
_STEP_CENTRE, _STEP_WIDTH, _STEP_FLOOR = 0.5, 1.1, 0.2
"""Weights of the steps: a bell over their logarithms, and a floor. Images that a middle step suits take the most draws."""
_LARGEST_BOOST = 3.5
"""Extra weight of the largest step: easy images are the most frequent."""
_TANGENT_FIRST, _TANGENT_SPACING, _TANGENT_LAST, _TANGENT_DECAY = 0.03, 0.45, 0.55, 0.6
"""Tangents touch g at these distances, in standard deviations, from the vertex where `p_c + p_j = 1`: from .03, every
`.45 sqrt(step)`, up to .55. Their weights fall by .6 from one to the next."""
_INTERCEPT_MARGIN = 1e-10
"""Added to each m, for the rounding of slopes."""
_HEAD_FLOOR = 0.5
"""The share of the weights that a count head cannot move: a wrong head costs at most log(1/0.5) of evidence."""
_HEAD_SPREAD = 0.9
"""Assumed standard deviation of the error of the log-odds that a count head predicts."""


@dataclass(frozen=True)
class BetGrid:
    """
    A mixture of bets against "class c holds to no more than this radius".

    Attributes:
        log_payoffs: `(3, bets)`, logarithms of the payoffs of a draw that hits c, the rival, or another class.
        log_weights: `(bets,)`, logarithms of weights of sum 1.
    """

    log_payoffs: FloatArray
    log_weights: FloatArray

    @classmethod
    def for_radius(cls, noise: NoiseDistribution, radius: float, max_draws: int, alpha: float) -> "BetGrid":
        """The bets for a radius, and a budget whose quarter must suffice to tell the smallest step from the null."""
        p0 = float(noise.probability_needed(radius))
        smallest = math.sqrt(8 * -math.log(alpha) / (max_draws / 4)) / math.sqrt(4 * p0 * (1 - p0))
        count = max(0, math.floor(math.log(max(1.0, _LARGEST_STEP / smallest)) / math.log(_STEP_RATIO)))
        bets: dict[tuple[float, float], tuple[float, ...]] = {}
        for step in (_LARGEST_STEP / _STEP_RATIO**k for k in range(count + 1)):
            distances = np.arange(_TANGENT_FIRST, _TANGENT_LAST, _TANGENT_SPACING * math.sqrt(step))
            if radius == 0:
                distances = np.zeros(1)
            shares = _TANGENT_DECAY ** np.arange(len(distances))
            bell = math.exp(-0.5 * (math.log(step / _STEP_CENTRE) / _STEP_WIDTH) ** 2) + _STEP_FLOOR
            shares *= bell * (_LARGEST_BOOST if step == _LARGEST_STEP else 1) / shares.sum()
            for distance, share in zip(distances, shares):
                s, m = tangent(noise, radius, float(special.ndtr(special.ndtri(1 - p0) - distance)))
                key = (step, round(s, 6))  # a line has one tangent
                bets[key] = (step, s, m, share) if key not in bets else (*bets[key][:3], bets[key][3] + share)
        step, s, m, weight = np.array(list(bets.values())).T
        lam = np.expm1(step) / ((1 - m) + np.exp(step) * (m + s))
        payoffs = np.stack([np.log1p(lam * (1 - m)), np.log1p(-lam * (m + s)), np.log1p(-lam * m)])
        return cls(payoffs, np.log(weight / weight.sum()))

    @cached_property
    def _per_count(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """What each draw of c, each draw of the rival and each draw adds to the logarithms of the payoffs, `(bets,)`."""
        c, rival, other = self.log_payoffs
        return c - other, rival - other, other

    @property
    def largest_gain(self) -> float:
        """The most that one draw adds to a log e-value."""
        return float(self.log_payoffs[0].max())

    def log_e_value(
        self, hits: NDArray[Any], rival: NDArray[Any], draws: NDArray[Any], log_weights: FloatArray | None = None
    ) -> FloatArray:
        """
        Log e-values, `(images,)`.

        Args:
            hits: `(images,)`, draws of class c.
            rival: draws of the rival.
            draws: all draws.
            log_weights: `(images, bets)`, in place of the grid's own.
        """
        c, rivals, others = self._per_count
        # no matrix product: its last bits depend on the number of images
        gains = np.multiply.outer(hits, c)
        gains += np.multiply.outer(rival, rivals)
        gains += np.multiply.outer(draws, others)
        gains += self.log_weights if log_weights is None else log_weights
        largest = gains.max(-1)
        gains -= largest[..., None]
        return largest + np.log(np.exp(gains, out=gains).sum(-1))

    def reweight(self, p_c: FloatArray, p_j: FloatArray) -> FloatArray:
        """
        Log weights `(images, bets)` that follow a count head's predictions of the first two classes, each `(images,)`.

        Half of the weight is that after as many imaginary draws with the predicted frequencies as determine log-odds to
        within the head's error.
        """
        p_c = np.clip(p_c, 1e-4, 1 - 1e-4)
        p_j = np.clip(p_j, 0.0, 1 - p_c)
        draws = np.minimum(1 / (_HEAD_SPREAD**2 * p_c * (1 - p_c)), 1000.0)
        c, rivals, others = self._per_count
        gains = np.multiply.outer(draws * p_c, c) + np.multiply.outer(draws * p_j, rivals)
        gains += np.multiply.outer(draws, others) + self.log_weights
        gains -= np.logaddexp.reduce(gains, axis=1, keepdims=True)
        return np.logaddexp(gains + math.log(1 - _HEAD_FLOOR), self.log_weights + math.log(_HEAD_FLOOR))


def tangent(noise: NoiseDistribution, radius: float, p_b: float) -> tuple[float, float]:
    """Slope and intercept of a line above `probability_needed(radius, .)`, which it touches at `p_b`."""
    if radius == 0:  # p_c > p_j, and the error of the sampler: g(b) - b is largest where the two have sum 1
        p_b = 1 - float(noise.probability_needed(0.0))
        return 1.0, max(0.0, float(noise.probability_needed(0.0, p_b)) - p_b) + _INTERCEPT_MARGIN
    s = float(slope(noise, radius, np.array(p_b)))
    return s, float(noise.probability_needed(radius, p_b)) - s * p_b + _INTERCEPT_MARGIN


def slope(noise: NoiseDistribution, radius: float, p_b: FloatArray) -> FloatArray:
    """How much more the top class needs per probability of the runner-up."""
    if radius == 0:
        return np.ones_like(p_b)
    step = 1e-5 * p_b
    return (noise.probability_needed(radius, p_b + step) - noise.probability_needed(radius, p_b - step)) / (2 * step)
