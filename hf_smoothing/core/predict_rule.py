"""The rule of the smoothed prediction without a radius."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import stats

from .certificates import Guarantee
from .count_rule import CountRun
from .rule_protocols import ABSTENTION, CleanPass, NoiseDistribution, Outcome
from .validation import check_count, check_share


@dataclass(frozen=True)
class PredictRule:
    """
    The smoothed prediction without a radius: `n` draws, and abstention unless the top two classes differ clearly.

    Args:
        n: draws.
        alpha: probability of returning another class than the smoothed classifier's, in (0, 1).

    Source: Cohen et al. 2019 (arXiv 1902.02918), algorithm PREDICT and proposition 1.
    """

    n: int = 100
    alpha: float = 0.001

    method: ClassVar[str] = "predict"
    guarantee: ClassVar[Guarantee] = "per_input"
    uses_clean_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_share("alpha", self.alpha)

    @property
    def budget(self) -> int:
        return self.n

    def check(self, noise: NoiseDistribution) -> None:
        if 2 * 0.5**self.n > self.alpha:
            needed = math.ceil(math.log2(2 / self.alpha))
            raise ValueError(f"n={self.n} draws always abstain at alpha={self.alpha:g}: it takes at least {needed}.")

    def start(self, noise: NoiseDistribution, clean: CleanPass) -> "_PredictRun":
        return _PredictRun(self, len(clean.scores))


class _PredictRun(CountRun):
    def __init__(self, rule: PredictRule, num_classes: int):
        super().__init__(rule.n, num_classes)
        self.alpha = rule.alpha

    def outcome(self) -> Outcome:
        second, first = np.sort(self.counts)[-2:] if len(self.counts) > 1 else (0, self.counts[0])
        if first == 0 or stats.binomtest(int(first), int(first + second), 0.5).pvalue > self.alpha:
            return ABSTENTION
        return super().outcome()
