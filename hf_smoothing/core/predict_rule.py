"""The rule of the smoothed prediction without a radius."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from scipy import special

from .certificates import ABSTAIN, Guarantee
from .count_rule import CountRuns
from .rule_protocols import NoiseDistribution, Outcomes, Rows
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

    def start(self, noise: NoiseDistribution, num_rows: int, num_classes: int) -> "_PredictRuns":
        return _PredictRuns(self, num_rows, num_classes)


class _PredictRuns(CountRuns):
    def __init__(self, rule: PredictRule, num_rows: int, num_classes: int):
        super().__init__(rule.n, num_rows, num_classes)
        self.alpha = rule.alpha

    def outcomes(self, rows: Rows) -> Outcomes:
        outcomes = super().outcomes(rows)
        counts = np.sort(np.pad(self.counts[rows], ((0, 0), (1, 0))), axis=1)  # a second class where there is only one
        second, first = counts[:, -2], counts[:, -1]
        # the binomial test that both are equally likely, two-sided
        p_value = 2 * special.bdtr(second, first + second, 0.5)
        return replace(outcomes, predictions=np.where(p_value <= self.alpha, outcomes.predictions, ABSTAIN))
