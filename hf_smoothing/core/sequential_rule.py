"""The sequential rule: draw until radii are decided; the guarantee holds whenever that is."""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .bets import BetGrid, slope
from .certificates import ABSTAIN, Guarantee
from .rule_protocols import (
    CleanPass,
    Counts,
    FloatArray,
    NoiseDistribution,
    Outcomes,
    Rows,
    first_true,
    probability_in_reach,
    too_few,
)
from .validation import check_count, check_radii, check_share

_FIRST_DRAWS = 8
_LOOK_SHARE = 128
"""At least this share of the draws is added between looks; half of it is wasted on average."""
_FUTILITY_LATE, _FUTILITY_DECADE, _FUTILITY_MOST = 1.2, 0.3, 2.0
"""Standard deviations of optimism when a radius is given up: 1.2 at the end of the budget, .3 more for each factor of ten
before it, at most 2. It costs some claims at worst, never validity."""


@dataclass(frozen=True)
class SequentialRule:
    """
    Draw until every radius is claimed or the next one is out of reach. The certificate holds whenever that is.

    **Which class.** For each class t there is an e-process against "t is the most probable class". Every draw bets on the
    class c that led *before* it was asked for (at first: on the clean image) against t, with the bets of [`BetGrid`] at
    radius 0. Their mean payoff is at most 1 if t is the most probable class, whatever class was leading. Class t is excluded
    once its e-value reaches 1 over the level, and c is the answer once all other classes are excluded. A wrong answer has
    excluded the most probable class, so by Ville's inequality its probability is at most the level. Neither the number of
    rivals nor that of possible answers costs anything. (Classes that are equally probable are all right answers.)

    **Which radius.** A share of alpha is the level of the class. A radius is claimed for the answer c once the e-values of
    [`BetGrid`] against "the radius of c is no larger" reach 1 over the rest of alpha for every rival. A wrong class has
    probability at most the first part; if c is right, a wrong radius has probability at most the second.

    **Several radii** are claimed in ascending order, all for the same class. A wrong claim includes one of the smallest
    radius that is too large, so they share one level.

    When to look is chosen from counts of the past, so looks are stopping times. Giving a radius up claims nothing.

    Args:
        radii: radii to decide. Radius 0 asks for the answer alone.
        alpha: probability of a wrong certificate, in (0, 1).
        max_draws: the most draws per image, besides its clean pass.

    Source: see [`bets`]; the radius is theorem 1 of Cohen et al. 2019 (arXiv 1902.02918) for Gaussian noise.
    """

    radii: tuple[float, ...]
    alpha: float = 0.001
    max_draws: int = 10_000

    method: ClassVar[str] = "sequential"
    takes: ClassVar[tuple[str, ...]] = ("alpha", "radius", "radii", "max_draws")
    guarantee: ClassVar[Guarantee] = "per_input"
    uses_clean_pass: ClassVar[bool] = True
    uses_count_head: ClassVar[bool] = True
    uses_base_classifier: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("alpha", self.alpha)
        check_count("max_draws", self.max_draws)
        check_radii(self.radii)

    @classmethod
    def from_settings(cls, *, radii: tuple[float, ...] | None = None, **settings: Any) -> "SequentialRule":
        if radii is None:
            raise ValueError("method='sequential' decides radii: give radius or radii, or leave method out.")
        return cls(radii, **settings)

    @property
    def budget(self) -> int:
        return self.max_draws

    def check(self, noise: NoiseDistribution) -> None:
        radius = max(self.radii)
        probability_in_reach(noise, radius)
        if self._suffices(noise):
            return
        needed = first_true(lambda draws: replace(self, max_draws=draws)._suffices(noise), self.max_draws)
        below = [share / 1000 * radius for share in range(1000)]
        out_of_reach = bisect_left(below, True, key=lambda value: not replace(self, radii=(value,))._suffices(noise))
        raise too_few("max_draws", self.max_draws, radius, below[max(out_of_reach - 1, 0)], needed)

    def largest_radius(self, noise: NoiseDistribution) -> float:
        return max((radius for radius in self.radii if replace(self, radii=(radius,))._suffices(noise)), default=0.0)

    def _suffices(self, noise: NoiseDistribution) -> bool:
        """Whether the draws prove the largest radius if all of them hit the class that leads on the clean image."""
        tests = _Tests(self, noise)
        hits, none = np.array([float(self.max_draws)]), np.zeros(1)
        class_proved = tests.class_grid.log_e_value(hits, none, hits) >= tests.needed_for_class
        needed = tests.needed_for_radius if max(self.radii) else tests.needed_for_class
        return bool(class_proved & (tests.grids[-1].log_e_value(hits, none, hits) >= needed))

    def start(self, noise: NoiseDistribution, num_rows: int, num_classes: int) -> "_SequentialRuns":
        return _SequentialRuns(self, noise, num_rows, num_classes)


class _Tests:
    """The bets of a rule, and the evidence (log e-values) that its claims take."""

    def __init__(self, rule: SequentialRule, noise: NoiseDistribution):
        radii = sorted(rule.radii)
        share = _class_share(noise, radii, rule.alpha)
        self.needed_for_class = -math.log(rule.alpha * share)
        self.needed_for_radius = -math.log(rule.alpha * (1 - share)) if share < 1 else math.inf
        self.class_grid = BetGrid.for_radius(noise, 0.0, rule.max_draws, rule.alpha)
        self.grids = [
            BetGrid.for_radius(noise, radius, rule.max_draws, rule.alpha) if radius else self.class_grid
            for radius in radii
        ]


def _class_share(noise: NoiseDistribution, radii: list[float], alpha: float) -> float:
    """The part of alpha for the class: such that both claims take as many draws where every draw hits, .01 to .5."""
    if radii[0] == 0:
        return 0.5 if len(radii) > 1 else 1.0
    p0 = float(noise.probability_needed(radii[0]))
    for share in np.geomspace(0.01, 0.5, 40):
        if -math.log(alpha * share) / math.log(2) <= -math.log(alpha * (1 - share)) / -math.log(p0):
            return float(share)
    return 0.5


class _SequentialRuns:
    def __init__(self, rule: SequentialRule, noise: NoiseDistribution, num_rows: int, num_classes: int):
        self.rule = rule
        self.noise = noise
        self.radii = np.array(sorted(rule.radii))
        self.tests = _Tests(rule, noise)
        shape = (num_rows, num_classes)
        self.counts = np.zeros(shape, np.int64)
        self.draws = np.zeros(num_rows, np.int64)
        self.leader, self.next = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
        """The class that the next draws bet on, and the one that they bet on against the leader."""
        self.bet_hits = np.zeros(shape, np.int64)
        """For each class t, how many draws hit the class that was bet on against t."""
        self.excluded = np.zeros(shape, bool)
        """Classes that are not the answer."""
        self.answer = np.zeros(num_rows, np.int64)
        self.claimed = np.zeros(num_rows, np.int64)
        """How many of the radii are claimed."""
        self.log_weights = [np.zeros((num_rows, len(grid.log_weights))) for grid in self.tests.grids]

    def start(self, rows: Rows, clean: CleanPass | None) -> NDArray[np.int64]:
        assert clean is not None
        self.counts[rows] = self.bet_hits[rows] = self.draws[rows] = self.claimed[rows] = 0
        self.excluded[rows], self.answer[rows] = False, ABSTAIN
        # only the ranking: values differ in the last bit between batch sizes, certificates must not
        order = np.argsort(-clean.scores, axis=1, kind="stable")
        self.leader[rows], self.next[rows] = order[:, 0], order[:, min(1, order.shape[1] - 1)]
        for grid, log_weights in zip(self.tests.grids, self.log_weights):
            log_weights[rows] = grid.reweight(*_first_two(clean.scores)) if clean.frequencies else grid.log_weights
        return np.full(len(rows), min(_FIRST_DRAWS, self.rule.max_draws))

    def update(self, rows: Rows, counts: Counts) -> NDArray[np.int64]:
        images, leader = np.arange(len(rows)), self.leader[rows]
        hits = np.repeat(counts[images, leader][:, None], counts.shape[1], axis=1)
        hits[images, leader] = counts[images, self.next[rows]] if counts.shape[1] > 1 else 0
        self.bet_hits[rows] += hits
        self.counts[rows] += counts
        self.draws[rows] += counts.sum(1)
        wanted = np.zeros(len(rows), np.int64)
        while len(images):  # once more for images that claim a radius and have another
            wanted[images], claims = self._look(rows[images])
            images = images[claims]
            images = images[self.claimed[rows[images]] < len(self.radii)]
        return wanted

    def is_planned(self, rows: Rows) -> NDArray[np.bool_]:
        return np.zeros(len(rows), bool)

    def outcomes(self, rows: Rows, pending: Counts | None = None) -> Outcomes:
        """
        The radii claimed, with a pair of probabilities on their boundary. What is proved is that the answer's probability
        exceeds `probability_needed(radius, p_b)` for the probability `p_b` of every rival; `p_upper` is the runner-up's
        share.
        """
        top, _, _, rival = _tally(self.counts[rows], self.answer[rows])
        claimed = self.claimed[rows]
        radii = np.where(claimed > 0, self.radii[np.maximum(claimed, 1) - 1], 0.0)
        most = 1 - self.noise.probability_needed(radii)
        p_upper = np.minimum(np.maximum(rival, 0.5) / np.maximum(self.draws[rows], 1), most)
        p_lower = self.noise.probability_needed(radii, p_upper)
        proved = claimed > 0
        predictions = np.where(proved, top, ABSTAIN)
        return Outcomes(predictions, radii, np.where(proved, p_lower, 0.0), np.where(proved, p_upper, 1.0))

    def _look(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Claim the next radius where it is proved; returns the draws that the images want, and which have claimed."""
        tests = self.tests
        draws = self.draws[rows]
        top, hits, second, rival = _tally(self.counts[rows], self.answer[rows])
        missing = self._exclude_rivals(rows, top, second)
        leader = self.counts[rows].argmax(1)
        self.leader[rows], self.next[rows] = leader, np.where(leader == top, second, top)
        # no draw adds more evidence than this: a claim takes at least so many
        wait = missing / tests.class_grid.largest_gain
        left = self.rule.max_draws - draws
        hopeless = np.zeros(len(rows), bool)
        level = self.claimed[rows]
        for number in np.unique(level):
            images, grid, radius = np.flatnonzero(level == number), tests.grids[number], self.radii[number]
            part = hits[images], rival[images], draws[images]
            log_weights, needed, bets = self.log_weights[number][rows[images]], tests.needed_for_radius, hits[images]
            if radius == 0:
                needed, bets = tests.needed_for_class, self.bet_hits[rows[images], second[images]]
            else:
                gap = needed - grid.log_e_value(*part, log_weights)
                missing[images] = np.maximum(missing[images], gap)
                wait[images] = np.maximum(wait[images], gap / grid.largest_gain)
            p_a, p_b = self._expect(*part, radius)
            end = bets + left[images] * p_a, rival[images] + left[images] * p_b, draws[images] + left[images]
            hopeless[images] = grid.log_e_value(*end, log_weights) < needed
        claims = missing <= 0
        self.answer[rows[claims]] = top[claims]
        self.claimed[rows[claims]] += 1
        latest = np.maximum(_FIRST_DRAWS, draws // 8)  # early enough to notice soon that the radius is out of reach
        look = np.ceil(np.minimum(np.maximum(wait, 0.0), latest)).astype(np.int64)
        wanted = np.minimum(np.maximum(np.maximum(2, draws // _LOOK_SHARE), look), left)
        return np.where(claims | hopeless, 0, wanted), claims

    def _exclude_rivals(self, rows: Rows, top: NDArray[np.int64], second: NDArray[np.int64]) -> FloatArray:
        """Exclude classes where the evidence suffices; returns what is missing until all but the top class are."""
        missing = np.full(len(rows), -np.inf)
        if self.counts.shape[1] == 1:
            return missing
        unsure = self.answer[rows] == ABSTAIN
        # the strongest rival first: mostly it decides
        images = np.flatnonzero(unsure & ~self.excluded[rows, second])
        missing[images] = self._exclude(rows[images], second[images])
        others = ~self.excluded[rows] & (unsure & (missing <= 0))[:, None]
        others[np.arange(len(rows)), top] = False
        images, classes = np.nonzero(others)
        np.maximum.at(missing, images, self._exclude(rows[images], classes))
        missing[unsure & self.excluded[rows, top]] = np.inf  # an excluded class leads: claim nothing
        return missing

    def _exclude(self, rows: Rows, classes: NDArray[np.int64]) -> FloatArray:
        """Exclude these classes where the evidence suffices; returns what is missing."""
        hits, rival = self.bet_hits[rows, classes], self.counts[rows, classes]
        log_e = self.tests.class_grid.log_e_value(hits, rival, self.draws[rows])
        missing = self.tests.needed_for_class - log_e
        self.excluded[rows, classes] |= missing <= 0
        return missing

    def _expect(
        self, hits: NDArray[np.int64], rival: NDArray[np.int64], draws: NDArray[np.int64], radius: float
    ) -> tuple[FloatArray, FloatArray]:
        """
        Optimistic probabilities of the top class and its rival: their shares, moved towards the claim by some standard
        deviations of the margin `p_c - s p_j`. They move on the sphere of the square roots of the shares, which has the same
        variance everywhere (for two classes: the arcsine interval).
        """
        largest = 1 - self.noise.probability_needed(radius)
        s = slope(self.noise, radius, np.minimum((rival + 0.5) / (draws + 1), largest))
        shares = np.stack([hits, rival, draws - hits - rival]) / draws
        score = np.stack([np.ones(len(draws)), -s, np.zeros(len(draws))])
        roots = np.sqrt(shares)
        direction = roots * (score - (shares * score).sum(0))
        direction /= np.maximum(np.sqrt((direction * direction).sum(0)), 1e-300)
        deviations = _FUTILITY_LATE + _FUTILITY_DECADE * np.log10(self.rule.max_draws / draws)
        angle = np.minimum(np.minimum(_FUTILITY_MOST, deviations) / (2 * np.sqrt(draws)), math.pi / 2)
        moved = np.maximum(np.cos(angle) * roots + np.sin(angle) * direction, 0) ** 2
        moved /= moved.sum(0)
        return moved[0], moved[1]


def _tally(counts: Counts, answer: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """The answer, or else the class drawn most often, and its draws; the runner-up, and its draws."""
    images = np.arange(len(counts))
    top = np.where(answer >= 0, answer, counts.argmax(1))
    others = counts.copy()
    others[images, top] = -1
    second = others.argmax(1)
    return top, counts[images, top], second, np.maximum(others[images, second], 0)


def _first_two(frequencies: FloatArray) -> tuple[FloatArray, FloatArray]:
    second, first = np.sort(np.pad(frequencies, ((0, 0), (1, 0))), axis=1)[:, -2:].T
    return first, second
