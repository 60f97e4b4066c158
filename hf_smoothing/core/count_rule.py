"""The rule that only counts."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .certificates import Guarantee
from .rule_protocols import CleanPass, Counts, NoiseDistribution, Outcomes, Rows
from .validation import check_count


@dataclass(frozen=True)
class CountRule:
    """Count the classes of `n` draws and claim nothing: the training data of a count head (arXiv 2402.07498)."""

    n: int = 64

    method: ClassVar[str] = "counts"
    takes: ClassVar[tuple[str, ...]] = ("alpha", "max_draws", "n")
    guarantee: ClassVar[Guarantee] = "none"
    uses_clean_pass: ClassVar[bool] = False
    uses_count_head: ClassVar[bool] = False
    uses_base_classifier: ClassVar[bool] = True
    alpha: ClassVar[float] = 1.0  # nothing is claimed

    def __post_init__(self) -> None:
        check_count("n", self.n)

    @classmethod
    def from_settings(cls, *, alpha: float, max_draws: int | None = None, **settings: Any) -> "CountRule":
        if max_draws is not None:
            settings.setdefault("n", max_draws)
        return cls(**settings)

    @property
    def budget(self) -> int:
        return self.n

    def check(self, noise: NoiseDistribution) -> None:
        """Counting is always possible."""

    def largest_radius(self, noise: NoiseDistribution) -> float:
        return 0.0

    def start(self, noise: NoiseDistribution, num_rows: int, num_classes: int) -> "CountRuns":
        return CountRuns(self.n, num_rows, num_classes)


class CountRuns:
    """Counts `n` draws per image."""

    def __init__(self, n: int, num_rows: int, num_classes: int):
        self.n = n
        self.counts = np.zeros((num_rows, num_classes), np.int64)

    def start(self, rows: Rows, clean: CleanPass | None) -> NDArray[np.int64]:
        self.counts[rows] = 0
        return np.full(len(rows), self.n)

    def update(self, rows: Rows, counts: Counts) -> NDArray[np.int64]:
        self.counts[rows] += counts
        return np.zeros(len(rows), np.int64)

    def is_planned(self, rows: Rows) -> NDArray[np.bool_]:
        return np.ones(len(rows), bool)

    def outcomes(self, rows: Rows, pending: Counts | None = None) -> Outcomes:
        zeros = np.zeros(len(rows))
        return Outcomes(self.counts[rows].argmax(1), zeros, zeros, zeros + 1)
