"""The sequential rule: draw until the question is settled, with a guarantee that holds whenever that is."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import special

from .bounds import (
    OddsPrior,
    clopper_pearson_lower,
    confidence_sequence_lower,
    draws_to_reject,
    log_e_value,
)
from .certificates import (
    ABSTENTION,
    CleanPass,
    Counts,
    Guarantee,
    NoiseDistribution,
    Outcome,
    probability_in_reach,
    too_few,
)
from .validation import check_count, check_radii, check_share


@dataclass(frozen=True)
class SequentialRule:
    """
    Draw until the question is settled; the certificate holds whenever that is.

    For each class, e-processes bound its probability from below and from above at all times at once ([`log_e_value`]). Most
    of alpha is for the lower bounds, shared out over the classes by weights fixed before the first counted draw; a twentieth
    is for the upper bounds, in equal shares. The certificate rests on the lower bound of one class and the largest
    upper bound of the others, or on the lower bound alone where that shows more. What is asked only decides when to stop:

    - `radii`: until each radius is claimed, or the next one has become hopeless.
    - otherwise: until the radius is known to the relative `tolerance`, or the budget can no longer show any.

    In both cases the certificate carries the largest radius that was proved, which may exceed those asked; all bounds hold
    together at alpha, so every smaller radius holds with it.

    Args:
        radii: radii to decide; `None` finds the radius.
        alpha: probability of a wrong certificate, in (0, 1).
        max_draws: the most draws for one image, besides its clean pass.
        tolerance: without `radii`, stop once the proved radius is at least `1 - tolerance` of what it can still
            become (the upper end of a 95 % confidence interval, or what the budget can show if that is less).
        weight_floor: the part of alpha shared equally over all classes; the rest follows their rank on the clean image, or
            that which a count head predicts.
        prior: prior of the e-processes; by default an [`OddsPrior`] for as many draws as there may be. A count head moves
            half of its weight to where it expects p; a wrong head costs draws, never validity.

    Raises:
        ValueError: for a setting out of range.

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
    guarantee: ClassVar[Guarantee] = "per_input"
    uses_clean_pass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("alpha", self.alpha)
        check_share("tolerance", self.tolerance)
        check_share("weight_floor", self.weight_floor)
        check_count("max_draws", self.max_draws)
        if self.radii is not None:
            check_radii(self.radii)

    @property
    def budget(self) -> int:
        return self.max_draws

    def check(self, noise: NoiseDistribution) -> None:
        radius = max(self.radii or (0.0,))
        alpha = self._largest_alpha
        p0 = probability_in_reach(noise, radius)
        needed, short = draws_to_reject(p0, alpha, self._prior), 0
        if needed > self.max_draws:
            while short < needed:  # the prior for a larger budget may take more still
                short, needed = needed, draws_to_reject(p0, alpha, replace(self, max_draws=needed)._prior)
            best = noise.radius(_lower(self.max_draws, self.max_draws, alpha, self._prior))
            raise too_few("max_draws", self.max_draws, radius, best, needed)

    @property
    def _prior(self) -> OddsPrior:
        return self.prior or OddsPrior.for_budget(self.max_draws, self.alpha)

    @property
    def _largest_alpha(self) -> float:
        """What a single claim can have of alpha: the share of the class ranked first, bar the little that the floor adds."""
        return (1 - _UPPER_SHARE) * (1 - self.weight_floor) * (1 - _RANK_DECAY) * self.alpha

    def start(self, noise: NoiseDistribution, clean: CleanPass) -> "_SequentialRun":
        weights = class_weights(clean.scores, self.weight_floor)
        return _SequentialRun(self, noise, weights, self._prior_for(noise, clean))

    def _prior_for(self, noise: NoiseDistribution, clean: CleanPass) -> OddsPrior:
        """The prior of the lower bounds, with a count head's help where there is one."""
        prior = self._prior
        if not clean.frequencies:
            return prior
        # rounded, so that the last bits of the head, which differ between batch sizes, decide nothing
        log_odds = round(_ROUNDING * float(special.logit(np.clip(clean.scores.max(), 1e-6, 1 - 1e-6)))) / _ROUNDING
        radii = self.radii
        if radii is None:  # what will be claimed in the end
            most = _lower(self.max_draws, self.max_draws, self._largest_alpha, prior)
            radii = ((1 - self.tolerance) * noise.radius(min(float(special.expit(log_odds)), most)),)
        nulls = [noise.probability_needed(radius) for radius in radii]
        distances = [log_odds - float(special.logit(null)) for null in nulls]
        return prior.expecting(distances, _PRIOR_SPREAD, _PRIOR_FLOOR)


def class_weights(scores: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """
    Shares of alpha from scores known before the first draw: `(classes,)`, positive, of sum 1.

    Only the ranking of the scores counts. Their values differ in the last bit between batch sizes; with them the
    certificate would.

    Args:
        scores: `(classes,)`, such as the logits of the clean image.
        floor: the part that is shared equally.
    """
    ranks = np.empty(len(scores), np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    falling = (1 - _RANK_DECAY) * _RANK_DECAY**ranks
    return (1 - floor) * falling / falling.sum() + floor / len(scores)


_PRIOR_FLOOR = 0.5
"""The share of the prior's weight that a count head has no say in: a wrong head costs log(1/0.5) of evidence at most. With
more to say, a head costs about as many draws where it is off as it saves where it is right."""

_PRIOR_SPREAD = 0.9
"""By how much the log-odds that a count head predicts are taken to be off. A smaller one costs more draws where a head is
wrong than it saves where it is right."""

_ROUNDING = 16
"""Parts of a unit that predicted log-odds are rounded to."""

_RANK_DECAY = 0.1
"""About how often the answer under noise is not the class ranked next on the clean image."""

_UPPER_SHARE = 0.05
"""The part of alpha for the upper bounds. It adds less than 1 % to the draws of a claim that could do without them."""

_ALPHA_STOP = 0.03
"""Level of the intervals that show a radius to be out of reach: it costs some claims at worst, never validity."""

_BISECTIONS = 20
"""A radius so near to what the counts show that it takes more is left to the next look."""

_ALPHA_KNOWN = 0.05
"""Level of the upper end of the radius that `tolerance` is measured against; informative only."""


class _SequentialRun:
    def __init__(self, rule: SequentialRule, noise: NoiseDistribution, weights: NDArray[np.float64], prior: OddsPrior):
        self.rule = rule
        self.noise = noise
        self.prior = prior
        self.prior_upper = rule._prior  # heads say where the top class is, not the others
        self.alphas_lower = (1 - _UPPER_SHARE) * rule.alpha * weights
        self.alpha_upper = _UPPER_SHARE * rule.alpha / len(weights)
        self.counts = np.zeros(len(weights), np.int64)
        self.best = ABSTENTION
        self._best_radius = 0.0
        self.wanted = min(8, rule.max_draws)
        self.radii = sorted(rule.radii or ())  # those not yet claimed
        if rule.radii is None:
            most = _lower(rule.max_draws, rule.max_draws, rule._largest_alpha, self.prior)
            self.largest_radius = noise.radius(most)

    def next_draws(self) -> int:
        return self.wanted

    def update(self, counts: Counts) -> None:
        self.counts += counts
        draws = int(self.counts.sum())
        top = int(self.counts.argmax())
        hits = int(self.counts[top])
        runner_up = int(np.delete(self.counts, top).max(initial=0))
        unclaimed = len(self.radii)
        wanted = (self._decide if self.rule.radii is not None else self._find)(top, hits, runner_up, draws)
        self.wanted = min(wanted, self.rule.max_draws - draws)
        # at a claim too: later draws may speak less clearly, and the claim stands
        if not self.wanted or len(self.radii) < unclaimed:
            self._keep_better(top, hits, runner_up, draws)

    def outcome(self) -> Outcome:
        return self.best

    def _decide(self, top: int, hits: int, runner_up: int, draws: int) -> int:
        """Draws wanted next; 0 once every radius asked for is claimed or the next one is out of reach."""
        while self.radii and self._shows(self.radii[0], top, hits, runner_up, draws):
            self.radii.pop(0)
        if not self.radii or self._hopeless(self.radii[0], top, hits, runner_up, draws):
            return 0
        # No draw multiplies the e-value by more than 1/p0: a claim from the lower bound alone takes at least this many
        p0 = self.noise.probability_needed(self.radii[0])
        missing = -math.log(self.alphas_lower[top]) - float(log_e_value(hits, draws, p0, self.prior))
        # so look again after that many, though not so late that another end would be noticed long after the fact
        return max(2, draws // 64, math.ceil(min(missing / -math.log(p0), max(8, draws // 8))))

    def _find(self, top: int, hits: int, runner_up: int, draws: int) -> int:
        """Draws wanted next; 0 once the radius is known to the tolerance, or the budget cannot show any."""
        if self._hopeless(0.0, top, hits, runner_up, draws):
            return 0
        reachable = min(self.noise.radius(*_interval(hits, runner_up, draws, _ALPHA_KNOWN)), self.largest_radius)
        enough = (1 - self.rule.tolerance) * reachable
        return 0 if enough > 0 and self._shows(enough, top, hits, runner_up, draws) else max(8, draws // 8)

    def _hopeless(self, radius: float, top: int, hits: int, runner_up: int, draws: int) -> bool:
        """Whether the rest of the budget would not show `radius` even if it went well; no guarantee rests on this."""
        left = self.rule.max_draws - draws
        p_a, p_b = _interval(hits, runner_up, draws, _ALPHA_STOP)
        return not self._shows(radius, top, hits + left * p_a, runner_up + left * p_b, draws + left)

    def _shows(self, radius: float, top: int, hits: float, runner_up: float, draws: int) -> bool:
        """Whether these counts prove `radius`."""
        if self.noise.radius(hits / draws, runner_up / draws) <= radius:
            return False
        if _exceeds(hits, draws, self.noise.probability_needed(radius), self.alphas_lower[top], self.prior):
            return True
        # With the others bounded by p_b, the top class needs less: not where only two classes were seen, whose bounds say
        # the same, nor from 1/2 on. A larger p_b is sooner shown, and leaves more to show for the top class.
        low, high = runner_up / draws, 0.5
        for _ in range(_BISECTIONS if runner_up < draws - hits and low < high else 0):
            p_b = (low + high) / 2
            needed = self.noise.probability_needed(radius, p_b)
            bounded = _exceeds(draws - runner_up, draws, 1 - p_b, self.alpha_upper, self.prior_upper)
            enough = _exceeds(hits, draws, needed, self.alphas_lower[top], self.prior)
            if bounded == enough:
                return bounded
            low, high = (low, p_b) if bounded else (p_b, high)
        return False

    def _keep_better(self, top: int, hits: int, runner_up: int, draws: int) -> None:
        """Take the bounds that these counts prove, if they show a larger radius than those of earlier looks."""
        p_lower = _lower(hits, draws, self.alphas_lower[top], self.prior)
        others = _lower(draws - runner_up, draws, self.alpha_upper, self.prior_upper)
        p_upper = min(1 - others, 1 - p_lower)
        shown = self.noise.radius(p_lower, p_upper)
        if shown > self._best_radius:
            self.best, self._best_radius = Outcome(top, p_lower, p_upper), shown


def _exceeds(hits: float, draws: int, p0: float, alpha: float, prior: OddsPrior) -> bool:
    return hits > p0 * draws and bool(log_e_value(hits, draws, p0, prior) >= -math.log(alpha))


def _interval(hits: int, runner_up: int, draws: int, alpha: float) -> tuple[float, float]:
    """Optimistic probabilities: an upper bound for the top class, a lower one for the runner-up."""
    lower = clopper_pearson_lower([draws - hits, runner_up], draws, alpha)
    return 1 - float(lower[0]), float(lower[1])


def _lower(hits: int, draws: int, alpha: float, prior: OddsPrior) -> float:
    return float(confidence_sequence_lower(hits, draws, alpha, prior))
