"""The rule that finds radii: a few draws plan how many further ones an image is worth."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import special

from .certificates import Guarantee
from .count_rule import CountRuns
from .rule_protocols import (
    CleanPass,
    Counts,
    NoiseDistribution,
    Outcomes,
    Rows,
    first_true,
    probability_in_reach,
    too_few,
)
from .two_stage_plan import STAGES, make_planner, prove, runner_up_level
from .validation import check_count, check_share

_GUESS_ROUNDING = 2
"""A count head's log-odds are rounded to this fraction of a unit: one plan for each."""
_NO_GUESS = -1000


@dataclass(frozen=True)
class TwoStageRule:
    """
    Find the radius: selection draws choose the class and plan `n` further draws, which bound its probability from below and
    that of every other class from above (Clopper-Pearson, see [`prove`]).

    All images pay the same price per draw: `n` is where a further draw is expected to add less to the radius than it costs.
    So images that cannot be certified end after a few selection draws, and draws go where they enlarge radii. A count head's
    guess moves the prior of the plan.

    The class and `n` depend on the selection draws and the guess only, which are independent of the counted draws. Given
    them, counts are binomial, and the bounds are wrong with probability at most alpha, whatever the plan.

    Args:
        draws: the mean number of draws per image to plan for. It sets the price, for images as the plan expects them.
        alpha: probability of a wrong certificate, in (0, 1).
        max_draws: the most draws per image, selection included.

    Source: the bound is that of algorithm CERTIFY, Cohen et al. 2019 (arXiv 1902.02918).
    """

    draws: int = 600
    alpha: float = 0.001
    max_draws: int = 100_000

    method: ClassVar[str] = "two-stage"
    takes: ClassVar[tuple[str, ...]] = ("alpha", "draws", "max_draws")
    guarantee: ClassVar[Guarantee] = "per_input"
    uses_clean_pass: ClassVar[bool] = False
    uses_count_head: ClassVar[bool] = True
    uses_base_classifier: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("draws", self.draws)
        check_count("max_draws", self.max_draws)
        check_share("alpha", self.alpha)
        if self.draws <= STAGES[0]:
            raise ValueError(
                f"draws={self.draws} must be above {STAGES[0]}: the first {STAGES[0]} only choose the class."
            )
        if self.max_draws < 2 * STAGES[0]:
            raise ValueError(f"max_draws={self.max_draws} must be {2 * STAGES[0]} or more to find a radius.")

    @classmethod
    def from_settings(cls, **settings: Any) -> "TwoStageRule":
        return cls(**settings)

    @property
    def budget(self) -> int:
        return self.max_draws

    def check(self, noise: NoiseDistribution) -> None:
        probability_in_reach(noise, 0.0)

        def proves(max_draws: int) -> bool:
            return replace(self, max_draws=max_draws).largest_radius(noise) > 0

        if not proves(self.max_draws):
            raise too_few("max_draws", self.max_draws, 0.0, 0.0, first_true(proves, self.max_draws))

    def largest_radius(self, noise: NoiseDistribution) -> float:
        n = self.max_draws - STAGES[0]  # counted draws, if all of them hit
        return float(noise.radius(*prove(n, 0, n, self.alpha)))

    def start(self, noise: NoiseDistribution, num_rows: int, num_classes: int) -> "_TwoStageRuns":
        return _TwoStageRuns(self, noise, num_rows, num_classes)


class _TwoStageRuns(CountRuns):
    def __init__(self, rule: TwoStageRule, noise: NoiseDistribution, num_rows: int, num_classes: int):
        super().__init__(0, num_rows, num_classes)
        self.rule = rule
        self.noise = noise
        self.planner = make_planner(noise, rule.alpha, rule.max_draws)
        self.price = self.planner.price_for(rule.draws)
        self.selection_counts = np.zeros_like(self.counts)
        self.stage = np.zeros(num_rows, np.int64)
        """How many stages of selection are done; -1 once it has ended."""
        self.guess = np.full(num_rows, _NO_GUESS)
        """A count head's log-odds of the first class, in units of `1/_GUESS_ROUNDING`."""
        self.selected = np.zeros(num_rows, np.int64)

    def start(self, rows: Rows, clean: CleanPass | None) -> NDArray[np.int64]:
        self.counts[rows] = self.selection_counts[rows] = self.stage[rows] = 0
        self.guess[rows] = _NO_GUESS
        if clean is not None and clean.frequencies:
            log_odds = special.logit(np.clip(clean.scores.max(1), 1e-6, 1 - 1e-6))
            self.guess[rows] = np.rint(_GUESS_ROUNDING * log_odds)
        return np.full(len(rows), self.planner.stages[0])

    def update(self, rows: Rows, counts: Counts) -> NDArray[np.int64]:
        wanted = np.zeros(len(rows), np.int64)
        selecting = self.stage[rows] >= 0
        counted = rows[~selecting]
        self.counts[counted] += counts[~selecting]
        images = np.flatnonzero(selecting)
        self.selection_counts[rows[images]] += counts[images]
        situations = np.stack([self.stage[rows], self.guess[rows]], axis=1)
        for stage, guess in np.unique(situations[images], axis=0).tolist():
            part = np.flatnonzero(selecting & (situations == (stage, guess)).all(1))
            log_odds = None if guess == _NO_GUESS else guess / _GUESS_ROUNDING
            wanted[part] = self._plan(rows[part], stage, log_odds)
        return wanted

    def _plan(self, rows: Rows, stage: int, log_odds: float | None) -> NDArray[np.int64]:
        """The draws that images want after a stage of selection."""
        plan, stages = self.planner.plan_for_guess(self.price, log_odds), self.planner.stages
        selection = self.selection_counts[rows]
        self.selected[rows] = selection.argmax(1)
        second, first = np.sort(np.pad(selection, ((0, 0), (1, 0))), axis=1)[:, -2:].T
        action = plan.actions[stage][runner_up_level(second, stages[stage] - first), first]
        more = action < 0
        self.stage[rows] = np.where(more, stage + 1, -1)
        following = stages[stage + 1] - stages[stage] if stage + 1 < len(stages) else 0
        return np.where(more, following, action)

    def is_planned(self, rows: Rows) -> NDArray[np.bool_]:
        return np.asarray(self.stage[rows] < 0)

    def outcomes(self, rows: Rows, pending: Counts | None = None) -> Outcomes:
        selected, counts = self.selected[rows], self.counts[rows]
        if pending is not None:
            counts += np.where(self.is_planned(rows)[:, None], pending, 0)
        images, draws = np.arange(len(rows)), counts.sum(1)
        hits = counts[images, selected]
        counts[images, selected] = 0
        p_lower, p_upper = prove(hits, counts.max(1), draws, self.rule.alpha)
        return Outcomes.from_bounds(self.noise, selected, p_lower, p_upper)
