"""The rule that only counts."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .certificates import Guarantee
from .rule_protocols import CleanPass, Counts, NoiseDistribution, Outcome
from .validation import check_count


@dataclass(frozen=True)
class CountRule:
    """Count the classes of `n` draws and claim nothing: the training data of a count head (arXiv 2402.07498)."""

    n: int = 64

    method: ClassVar[str] = "counts"
    takes: ClassVar[tuple[str, ...]] = ("alpha", "max_draws", "n")
    guarantee: ClassVar[Guarantee] = "none"
    uses_clean_pass: ClassVar[bool] = False
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

    def start(self, noise: NoiseDistribution, clean: CleanPass) -> "CountRun":
        return CountRun(self.n, len(clean.scores))


class CountRun:
    """Counts `n` draws of one image."""

    def __init__(self, n: int, num_classes: int):
        self.n = n
        self.counts = np.zeros(num_classes, np.int64)

    def next_draws(self) -> int:
        return self.n - int(self.counts.sum())

    def update(self, counts: Counts) -> None:
        self.counts += counts

    def outcome(self) -> Outcome:
        return Outcome(int(self.counts.argmax()), 0.0, 1.0)
