"""The sequential rule: draw until the question is settled; the guarantee holds whenever that is."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import special

from .bounds import OddsPrior, clopper_pearson_lower, confidence_sequence_lower, draws_to_reject, log_e_value
from .certificates import Guarantee
from .rule_protocols import ABSTENTION, CleanPass, Counts, NoiseDistribution, Outcome, probability_in_reach, too_few
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
            best = noise.radius(_lower_bound(self.max_draws, self.max_draws, alpha, self._prior))
            raise too_few("max_draws", self.max_draws, radius, best, needed)

    @property
    def _prior(self) -> OddsPrior:
        return self.prior or OddsPrior.for_budget(self.max_draws, self.alpha)

    @property
    def _largest_alpha(self) -> float:
        """The share of alpha for a claim of the class ranked first, without the little that the floor adds."""
        return (1 - _UPPER_SHARE) * (1 - self.weight_floor) * (1 - _RANK_DECAY) * self.alpha

    def start(self, noise: NoiseDistribution, clean: CleanPass) -> "_SequentialRun":
        return _SequentialRun(
            self, noise, class_weights(clean.scores, self.weight_floor), self._prior_for(noise, clean)
        )

    def _prior_for(self, noise: NoiseDistribution, clean: CleanPass) -> OddsPrior:
        """The prior of the lower bounds, moved by a count head's prediction if there is one."""
        prior = self._prior
        if not clean.frequencies:
            return prior
        # rounded: the last bits of the prediction differ between batch sizes and must decide nothing
        log_odds = round(_ROUNDING * float(special.logit(np.clip(clean.scores.max(), 1e-6, 1 - 1e-6)))) / _ROUNDING
        radii = self.radii
        if radii is None:  # the radius that will probably be claimed
            most = _lower_bound(self.max_draws, self.max_draws, self._largest_alpha, prior)
            radii = ((1 - self.tolerance) * noise.radius(min(float(special.expit(log_odds)), most)),)
        distances = [log_odds - float(special.logit(noise.probability_needed(radius))) for radius in radii]
        return prior.reweight(distances, _PRIOR_SPREAD, _PRIOR_FLOOR)


def class_weights(scores: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """
    Shares of alpha from scores known before the first draw: `(classes,)`, positive, of sum 1.

    Only the ranking of the scores counts: their values differ in the last bit between batch sizes, certificates must not.
    The part `floor` is split equally.
    """
    ranks = np.empty(len(scores), np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    falling = (1 - _RANK_DECAY) * _RANK_DECAY**ranks
    return (1 - floor) * falling / falling.sum() + floor / len(scores)


@dataclass(frozen=True)
class Tally:
    """Class counts of an image: the class drawn most often, its draws, those of the class in second place, all draws."""

    top: int
    hits: float
    runner_up: float
    draws: int

    @classmethod
    def from_counts(cls, counts: Counts) -> "Tally":
        top = int(counts.argmax())
        return cls(top, int(counts[top]), int(np.delete(counts, top).max(initial=0)), int(counts.sum()))

    def optimistic_probabilities(self, alpha: float) -> tuple[float, float]:
        """An upper bound of the top class's probability and a lower bound of the runner-up's, each at level `alpha`."""
        lower = clopper_pearson_lower([self.draws - self.hits, self.runner_up], self.draws, alpha)
        return 1 - float(lower[0]), float(lower[1])

    def extrapolate(self, draws: int, p_a: float, p_b: float) -> "Tally":
        """The expected tally after so many further draws, if the top classes have these probabilities."""
        return Tally(self.top, self.hits + draws * p_a, self.runner_up + draws * p_b, self.draws + draws)


class _SequentialRun:
    def __init__(self, rule: SequentialRule, noise: NoiseDistribution, weights: NDArray[np.float64], prior: OddsPrior):
        self.rule = rule
        self.noise = noise
        self.prior = prior
        self.prior_upper = rule._prior  # a count head predicts the top class, not the others
        self.alphas_lower = (1 - _UPPER_SHARE) * rule.alpha * weights
        self.alpha_upper = _UPPER_SHARE * rule.alpha / len(weights)
        self.counts = np.zeros(len(weights), np.int64)
        self.best = ABSTENTION
        self._best_radius = 0.0
        self.wanted = min(8, rule.max_draws)
        self.unclaimed = sorted(rule.radii or ())
        if rule.radii is None:
            p_largest = _lower_bound(rule.max_draws, rule.max_draws, rule._largest_alpha, self.prior)
            self.largest_radius = noise.radius(p_largest)

    def next_draws(self) -> int:
        return self.wanted

    def update(self, counts: Counts) -> None:
        self.counts += counts
        tally = Tally.from_counts(self.counts)
        claims = False
        while self.unclaimed and self._proves(self.unclaimed[0], tally):
            self.unclaimed.pop(0)
            claims = True
        decides = self.rule.radii is not None
        wanted = self._draws_to_decide_radii(tally) if decides else self._draws_to_find_radius(tally)
        self.wanted = min(wanted, self.rule.max_draws - tally.draws)
        # at every claim too: later draws may prove less, and the claim stands
        if claims or not self.wanted:
            self._keep_better(tally)

    def outcome(self) -> Outcome:
        return self.best

    def _draws_to_decide_radii(self, tally: Tally) -> int:
        """Draws until the next look; 0 once every radius is claimed or the next one is out of reach."""
        if not self.unclaimed or self._is_hopeless(self.unclaimed[0], tally):
            return 0
        # No draw multiplies the e-value by more than 1/p0: a claim from the lower bound alone takes at least this many
        p0 = self.noise.probability_needed(self.unclaimed[0])
        log_e = float(log_e_value(tally.hits, tally.draws, p0, self.prior))
        missing = -math.log(self.alphas_lower[tally.top]) - log_e
        # so look again after that many draws, but early enough to notice soon that the radius is out of reach
        latest = max(8, tally.draws // 8)
        return max(2, tally.draws // 64, math.ceil(min(missing / -math.log(p0), latest)))

    def _draws_to_find_radius(self, tally: Tally) -> int:
        """Draws until the next look; 0 once the radius is known to the tolerance, or the budget cannot prove any."""
        if self._is_hopeless(0.0, tally):
            return 0
        reachable = min(self.noise.radius(*tally.optimistic_probabilities(_ALPHA_KNOWN)), self.largest_radius)
        enough = (1 - self.rule.tolerance) * reachable
        return 0 if enough > 0 and self._proves(enough, tally) else max(8, tally.draws // 8)

    def _is_hopeless(self, radius: float, tally: Tally) -> bool:
        """Whether the rest of the budget would not prove `radius` even if it went well; no guarantee rests on this."""
        left = self.rule.max_draws - tally.draws
        return not self._proves(radius, tally.extrapolate(left, *tally.optimistic_probabilities(_ALPHA_STOP)))

    def _proves(self, radius: float, tally: Tally) -> bool:
        hits, runner_up, draws = tally.hits, tally.runner_up, tally.draws
        alpha_lower = self.alphas_lower[tally.top]
        if self.noise.radius(hits / draws, runner_up / draws) <= radius:
            return False
        if _exceeds(hits, draws, self.noise.probability_needed(radius), alpha_lower, self.prior):
            return True
        # If every other class has at most p_b, the top class needs less. This does not help where only two classes were
        # seen, whose bounds agree, nor from 1/2 on. A larger p_b is easier to prove and asks for more of the top class.
        low, high = runner_up / draws, 0.5
        for _ in range(_BISECTIONS if runner_up < draws - hits and low < high else 0):
            p_b = (low + high) / 2
            needed = self.noise.probability_needed(radius, p_b)
            others_bounded = _exceeds(draws - runner_up, draws, 1 - p_b, self.alpha_upper, self.prior_upper)
            top_proved = _exceeds(hits, draws, needed, alpha_lower, self.prior)
            if others_bounded == top_proved:
                return others_bounded
            low, high = (low, p_b) if others_bounded else (p_b, high)
        return False

    def _keep_better(self, tally: Tally) -> None:
        """Keep the bounds that the tally proves, if they give a larger radius than those of earlier looks."""
        p_lower = _lower_bound(tally.hits, tally.draws, self.alphas_lower[tally.top], self.prior)
        others = _lower_bound(tally.draws - tally.runner_up, tally.draws, self.alpha_upper, self.prior_upper)
        p_upper = min(1 - others, 1 - p_lower)
        radius = self.noise.radius(p_lower, p_upper)
        if radius > self._best_radius:
            self.best, self._best_radius = Outcome(tally.top, p_lower, p_upper), radius


def _exceeds(hits: float, draws: int, p0: float, alpha: float, prior: OddsPrior) -> bool:
    """Whether these hits prove at level `alpha` that the probability of a hit exceeds `p0`."""
    return hits > p0 * draws and bool(log_e_value(hits, draws, p0, prior) >= -math.log(alpha))


def _lower_bound(hits: float, draws: int, alpha: float, prior: OddsPrior) -> float:
    return float(confidence_sequence_lower(hits, draws, alpha, prior))
