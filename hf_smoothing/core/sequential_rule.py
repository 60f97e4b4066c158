"""The sequential rule: draw until the question is settled; the guarantee holds whenever that is."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import special

from .bounds import OddsPrior, clopper_pearson_lower, confidence_sequence_lower, draws_to_reject, log_odds_mixture
from .certificates import ABSTAIN, Guarantee
from .rule_protocols import (
    CleanPass,
    Counts,
    FloatArray,
    NoiseDistribution,
    Outcomes,
    Rows,
    probability_in_reach,
    too_few,
)
from .validation import check_count, check_radii, check_share

_PRIOR_FLOOR = 0.5
"""The share of the prior's weight that a count head cannot move: a wrong head costs at most log(1/0.5) of evidence. If it
moved more, a head would cost about as many draws where it is wrong as it saves where it is right."""
_PRIOR_SPREAD = 0.9
"""Assumed standard deviation of the error of the log-odds that a count head predicts. A smaller one costs more draws where a
head is wrong than it saves where it is right."""
_ROUNDING = 16
"""Predicted log-odds are rounded to this fraction of a unit."""
_RANK_DECAY = 0.1
"""About how often the prediction under noise is not the class ranked next on the clean image."""
_UPPER_SHARE = 0.05
"""The part of alpha for the upper bounds. It adds less than 1 % to the draws of a claim that does not need them."""
_ALPHA_STOP = 0.03
"""Level of the intervals that show a radius to be out of reach: it costs some claims at worst, never validity."""
_BISECTIONS = 20
"""Steps of the search for a bound of the runner-up; a radius that needs more steps is left to the next look."""
_ALPHA_KNOWN = 0.05
"""Level of the upper end of the radius that `tolerance` is measured against; informative only."""


@dataclass(frozen=True)
class SequentialRule:
    """
    Draw until the question is settled; the certificate holds whenever that is.

    E-processes bound the probability of each class from below and from above at all times at once ([`log_e_value`]). Most of
    alpha goes to the lower bounds, split over the classes by weights fixed before the first counted draw. A twentieth goes
    to the upper bounds, in equal shares. The certificate rests on the lower bound of one class and the largest upper bound
    of the others, or on the lower bound alone where that proves more. The question only decides when to stop:

    - with `radii`: once every radius is claimed, or the next one is out of reach.
    - without: once the radius is known to the relative `tolerance`, or the budget can no longer prove any.

    The certificate carries the largest radius that was proved, which may exceed those asked for.

    Args:
        radii: radii to decide; `None` finds the radius.
        alpha: probability of a wrong certificate, in (0, 1).
        max_draws: the most draws per image, besides its clean pass.
        tolerance: without `radii`, stop once the proved radius is at least `1 - tolerance` of what it can still
            become (the upper end of a 95 % confidence interval, or what the budget can prove if that is less).
        weight_floor: the part of alpha split equally over all classes; the rest follows their rank on the clean image, or
            the rank that a count head predicts.
        prior: prior of the e-processes; by default the [`OddsPrior`] for `max_draws`. A count head moves half of its weight
            to where it expects p; a wrong head costs draws, never validity.

    Source: Ville's inequality for the mixture e-process of [`log_e_value`]; the radius is theorem 1 of Cohen et al. 2019
    (arXiv 1902.02918) for Gaussian noise.
    """

    radii: tuple[float, ...] | None = None
    alpha: float = 0.001
    max_draws: int = 10_000
    tolerance: float = 0.1
    weight_floor: float = 0.05
    prior: OddsPrior | None = None

    method: ClassVar[str] = "sequential"
    takes: ClassVar[tuple[str, ...]] = ("alpha", "radius", "radii", "max_draws", "tolerance")
    guarantee: ClassVar[Guarantee] = "per_input"
    uses_clean_pass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("alpha", self.alpha)
        check_share("tolerance", self.tolerance)
        check_share("weight_floor", self.weight_floor)
        check_count("max_draws", self.max_draws)
        if self.radii is not None:
            check_radii(self.radii)

    @classmethod
    def from_settings(cls, **settings: Any) -> "SequentialRule":
        if "radii" in settings and "tolerance" in settings:
            raise ValueError(f"tolerance={settings['tolerance']} has no meaning when radii are given: leave it out.")
        return cls(**settings)

    @property
    def budget(self) -> int:
        return self.max_draws

    def check(self, noise: NoiseDistribution) -> None:
        radius = max(self.radii or (0.0,))
        alpha = self._largest_alpha
        p0 = probability_in_reach(noise, radius)
        needed, short = draws_to_reject(p0, alpha, self._prior), 0
        if needed > self.max_draws:
            while short < needed:  # the prior for a larger budget may need even more draws
                short, needed = needed, draws_to_reject(p0, alpha, replace(self, max_draws=needed)._prior)
            best = float(noise.radius(confidence_sequence_lower(self.max_draws, self.max_draws, alpha, self._prior)))
            raise too_few("max_draws", self.max_draws, radius, best, needed)

    @property
    def _prior(self) -> OddsPrior:
        return self.prior or OddsPrior.for_budget(self.max_draws, self.alpha)

    @property
    def _largest_alpha(self) -> float:
        """The share of alpha for a claim of the class ranked first, without the little that the floor adds."""
        return (1 - _UPPER_SHARE) * (1 - self.weight_floor) * (1 - _RANK_DECAY) * self.alpha

    def start(self, noise: NoiseDistribution, num_rows: int, num_classes: int) -> "_SequentialRuns":
        return _SequentialRuns(self, noise, num_rows, num_classes)

    def _prior_for(self, noise: NoiseDistribution, clean: CleanPass) -> OddsPrior:
        """The prior of the lower bounds, moved by a count head's predictions if there are any."""
        prior = self._prior
        if not clean.frequencies:
            return prior
        # rounded: the last bits of the prediction differ between batch sizes and must decide nothing
        log_odds = np.rint(_ROUNDING * special.logit(np.clip(clean.scores.max(1), 1e-6, 1 - 1e-6))) / _ROUNDING
        if self.radii is None:  # the radius that will probably be claimed
            most = confidence_sequence_lower(self.max_draws, self.max_draws, self._largest_alpha, prior)
            radii = [(1 - self.tolerance) * noise.radius(np.minimum(special.expit(log_odds), most))]
        else:
            radii = [np.full(len(log_odds), radius) for radius in self.radii]
        nulls = np.stack([noise.probability_needed(radius) for radius in radii], axis=1)
        return prior.reweight(log_odds[:, None] - special.logit(nulls), _PRIOR_SPREAD, _PRIOR_FLOOR)


def class_weights(scores: FloatArray, floor: float) -> FloatArray:
    """
    Shares of alpha from scores `(images, classes)` known before the first draw: of the same shape, positive, of sum 1.

    Only the ranking of the scores counts: their values differ in the last bit between batch sizes, certificates must not.
    The part `floor` is split equally.
    """
    falling = (1 - _RANK_DECAY) * _RANK_DECAY ** np.arange(scores.shape[1])
    weights = np.empty_like(scores)
    np.put_along_axis(weights, np.argsort(-scores, axis=1, kind="stable"), falling[None] / falling.sum(), axis=1)
    return (1 - floor) * weights + floor / scores.shape[1]


@dataclass(frozen=True)
class Tally:
    """Class counts of images: the class drawn most often, its draws, those of the class in second place, all draws."""

    top: NDArray[np.int64]
    hits: FloatArray
    runner_up: FloatArray
    draws: FloatArray

    @classmethod
    def from_counts(cls, counts: Counts) -> "Tally":
        top = counts.argmax(1)[:, None]
        others = counts.copy()
        np.put_along_axis(others, top, 0, axis=1)
        hits = np.take_along_axis(counts, top, axis=1)[:, 0]
        return cls(top[:, 0], hits * 1.0, others.max(1) * 1.0, counts.sum(1) * 1.0)

    def at(self, images: NDArray[Any]) -> "Tally":
        """The tally of some of the images, by mask or index."""
        return Tally(self.top[images], self.hits[images], self.runner_up[images], self.draws[images])

    def optimistic_probabilities(self, alpha: float) -> tuple[FloatArray, FloatArray]:
        """An upper bound of the top class's probability and a lower bound of the runner-up's, each at level `alpha`."""
        misses = clopper_pearson_lower(self.draws - self.hits, self.draws, alpha)
        return 1 - misses, clopper_pearson_lower(self.runner_up, self.draws, alpha)

    def extrapolate(self, draws: FloatArray, p_a: FloatArray, p_b: FloatArray) -> "Tally":
        """The expected tally after so many further draws, if the top classes have these probabilities."""
        return Tally(self.top, self.hits + draws * p_a, self.runner_up + draws * p_b, self.draws + draws)


class _SequentialRuns:
    def __init__(self, rule: SequentialRule, noise: NoiseDistribution, num_rows: int, num_classes: int):
        self.rule = rule
        self.noise = noise
        self.radii = np.array(sorted(rule.radii or ()))
        prior = rule._prior
        self.steps = np.array(prior.steps)
        self.log_weights = np.zeros((num_rows, len(self.steps)))
        self.log_weights_upper = prior.log_weights  # a count head predicts the top class, not the others
        self.log_needed = np.zeros((num_rows, num_classes))
        """Evidence that a lower bound takes: minus the logarithm of its share of alpha."""
        self.log_needed_upper = -math.log(_UPPER_SHARE * rule.alpha / num_classes)
        self.counts = np.zeros((num_rows, num_classes), np.int64)
        self.claimed = np.zeros(num_rows, np.int64)
        """How many of the radii are claimed."""
        self.largest_radius = np.zeros(num_rows)
        """What the budget can prove; used without radii only."""
        self.best = Outcomes(*(np.zeros(num_rows, kind) for kind in (np.int64, np.float64, np.float64, np.float64)))

    def start(self, rows: Rows, clean: CleanPass | None) -> NDArray[np.int64]:
        assert clean is not None
        rule, noise = self.rule, self.noise.at(rows)
        prior = rule._prior_for(noise, clean)
        self.log_weights[rows] = prior.log_weights
        self.log_needed[rows] = -np.log(
            (1 - _UPPER_SHARE) * rule.alpha * class_weights(clean.scores, rule.weight_floor)
        )
        self.counts[rows] = self.claimed[rows] = 0
        if rule.radii is None:
            largest = confidence_sequence_lower(rule.max_draws, rule.max_draws, rule._largest_alpha, prior)
            self.largest_radius[rows] = noise.radius(largest)
        best = self.best
        best.predictions[rows], best.radii[rows], best.p_lower[rows], best.p_upper[rows] = ABSTAIN, 0.0, 0.0, 1.0
        return np.full(len(rows), min(8, rule.max_draws))

    def update(self, rows: Rows, counts: Counts) -> NDArray[np.int64]:
        self.counts[rows] += counts
        tally = Tally.from_counts(self.counts[rows])
        if self.rule.radii is None:
            claims, wanted = np.zeros(len(rows), bool), self._draws_to_find_radius(rows, tally)
        else:
            claims = self._claim_radii(rows, tally)
            wanted = self._draws_to_decide_radii(rows, tally)
        wanted = np.minimum(wanted, self.rule.max_draws - tally.draws).astype(np.int64)
        # at every claim too: later draws may prove less, and the claim stands
        keep = claims | (wanted == 0)
        self._keep_better(rows[keep], tally.at(keep))
        return wanted

    def outcomes(self, rows: Rows) -> Outcomes:
        best = self.best
        return Outcomes(best.predictions[rows], best.radii[rows], best.p_lower[rows], best.p_upper[rows])

    def _claim_radii(self, rows: Rows, tally: Tally) -> NDArray[np.bool_]:
        """Claim the radii that are proved, in ascending order; returns which images claim one."""
        claims = np.zeros(len(rows), bool)
        images = np.arange(len(rows))
        while len(images := images[self.claimed[rows[images]] < len(self.radii)]):
            radii = self.radii[self.claimed[rows[images]]]
            images = images[self._proves(rows[images], radii, tally.at(images))]
            self.claimed[rows[images]] += 1
            claims[images] = True
        return claims

    def _draws_to_decide_radii(self, rows: Rows, tally: Tally) -> FloatArray:
        """Draws until the next look; 0 once every radius is claimed or the next one is out of reach."""
        wanted = np.zeros(len(rows))
        images = np.flatnonzero(self.claimed[rows] < len(self.radii))
        radii = self.radii[self.claimed[rows[images]]]
        undecided = ~self._is_hopeless(rows[images], radii, tally.at(images))
        images, radii = images[undecided], radii[undecided]
        tally, rows = tally.at(images), rows[images]
        # No draw multiplies the e-value by more than 1/p0: a claim from the lower bound alone takes at least this many
        p0 = self.noise.at(rows).probability_needed(radii)
        log_e = log_odds_mixture(tally.hits, tally.draws, p0, self.steps, self.log_weights[rows])
        missing = self.log_needed[rows, tally.top] - log_e
        # so look again after that many draws, but early enough to notice soon that the radius is out of reach
        latest = np.maximum(8, tally.draws // 8)
        look = np.ceil(np.minimum(missing / -np.log(p0), latest))
        wanted[images] = np.maximum(np.maximum(2, tally.draws // 64), look)
        return wanted

    def _draws_to_find_radius(self, rows: Rows, tally: Tally) -> FloatArray:
        """Draws until the next look; 0 once the radius is known to the tolerance, or the budget cannot prove any."""
        wanted = np.zeros(len(rows))
        images = np.flatnonzero(~self._is_hopeless(rows, np.zeros(len(rows)), tally))
        tally, rows = tally.at(images), rows[images]
        reachable = np.minimum(
            self.noise.at(rows).radius(*tally.optimistic_probabilities(_ALPHA_KNOWN)), self.largest_radius[rows]
        )
        enough = (1 - self.rule.tolerance) * reachable
        known = (enough > 0) & self._proves(rows, enough, tally)
        wanted[images] = np.where(known, 0, np.maximum(8, tally.draws // 8))
        return wanted

    def _is_hopeless(self, rows: Rows, radii: FloatArray, tally: Tally) -> NDArray[np.bool_]:
        """Whether the rest of the budget would not prove the radii even if it went well; no guarantee rests on this."""
        left = self.rule.max_draws - tally.draws
        # where draws like those so far would do, better ones would too: spares the quantiles
        likely = tally.extrapolate(left, tally.hits / tally.draws, tally.runner_up / tally.draws)
        hopeless = ~self._proves(rows, radii, likely)
        images = np.flatnonzero(hopeless)
        tally = tally.at(images)
        best = tally.extrapolate(left[images], *tally.optimistic_probabilities(_ALPHA_STOP))
        hopeless[images] = ~self._proves(rows[images], radii[images], best)
        return hopeless

    def _proves(self, rows: Rows, radii: FloatArray, tally: Tally) -> NDArray[np.bool_]:
        """Whether the tallies prove the radii."""
        proved = np.zeros(len(rows), bool)
        noise = self.noise.at(rows)
        images = np.flatnonzero(noise.radius(tally.hits / tally.draws, tally.runner_up / tally.draws) > radii)
        proved[images] = self._top_exceeds(
            rows[images], tally.at(images), noise.at(images).probability_needed(radii[images])
        )
        # If every other class has at most p_b, the top class needs less. This does not help where only two classes were
        # seen, whose bounds agree, nor from 1/2 on. A larger p_b is easier to prove and asks for more of the top class.
        images = images[~proved[images]]
        helps = (tally.runner_up < tally.draws - tally.hits) & (tally.runner_up < tally.draws / 2)
        images = images[helps[images]]
        low, high = tally.runner_up[images] / tally.draws[images], np.full(len(images), 0.5)
        for _ in range(_BISECTIONS):
            if not len(images):
                break
            p_b = (low + high) / 2
            part = tally.at(images)
            needed = noise.at(images).probability_needed(radii[images], p_b)
            others_bounded = self._others_are_below(part, p_b)
            top_proved = self._top_exceeds(rows[images], part, needed)
            agree = others_bounded == top_proved
            proved[images[agree]] = others_bounded[agree]
            low, high = np.where(others_bounded, low, p_b)[~agree], np.where(others_bounded, p_b, high)[~agree]
            images = images[~agree]
        return proved

    def _top_exceeds(self, rows: Rows, tally: Tally, p0: FloatArray) -> NDArray[np.bool_]:
        """Whether the top class is proved to be more probable than `p0`."""
        log_e = log_odds_mixture(tally.hits, tally.draws, p0, self.steps, self.log_weights[rows])
        return (tally.hits > p0 * tally.draws) & (log_e >= self.log_needed[rows, tally.top])

    def _others_are_below(self, tally: Tally, p_b: FloatArray) -> NDArray[np.bool_]:
        """Whether every class but the top one is proved to be less probable than `p_b`."""
        misses = tally.draws - tally.runner_up
        log_e = log_odds_mixture(misses, tally.draws, 1 - p_b, self.steps, self.log_weights_upper)
        return (misses > (1 - p_b) * tally.draws) & (log_e >= self.log_needed_upper)

    def _keep_better(self, rows: Rows, tally: Tally) -> None:
        """Keep the bounds that the tallies prove, where they give a larger radius than those of earlier looks."""
        if not len(rows):
            return
        prior = OddsPrior(self.rule._prior.steps, np.exp(self.log_weights[rows]))
        p_lower = confidence_sequence_lower(tally.hits, tally.draws, np.exp(-self.log_needed[rows, tally.top]), prior)
        alpha_upper = math.exp(-self.log_needed_upper)
        others = confidence_sequence_lower(tally.draws - tally.runner_up, tally.draws, alpha_upper, self.rule._prior)
        p_upper = np.minimum(1 - others, 1 - p_lower)
        radii = np.asarray(self.noise.at(rows).radius(p_lower, p_upper))
        better = radii > self.best.radii[rows]
        rows, best = rows[better], self.best
        best.predictions[rows], best.radii[rows] = tally.top[better], radii[better]
        best.p_lower[rows], best.p_upper[rows] = p_lower[better], p_upper[better]
