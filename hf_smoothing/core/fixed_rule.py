"""The rule of Cohen et al.: a fixed number of draws, bounded by Clopper-Pearson."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .bounds import clopper_pearson_lower
from .certificates import Guarantee
from .count_rule import CountRuns
from .rule_protocols import CleanPass, Counts, NoiseDistribution, Outcomes, Rows, check_reach
from .validation import check_count, check_radius, check_share


@dataclass(frozen=True)
class FixedRule:
    """
    The usual protocol: `n0` selection draws choose the class, `n` fresh draws bound its probability (Clopper-Pearson).

    Args:
        n0: selection draws.
        n: draws that bound the probability of the selected class.
        alpha: probability of a wrong certificate, in (0, 1).
        radius: a radius that must be in reach; used only to refuse an `n` that can never prove it.

    Source: Cohen et al. 2019 (arXiv 1902.02918), algorithm CERTIFY and theorem 1.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    radius: float | None = None

    method: ClassVar[str] = "fixed"
    takes: ClassVar[tuple[str, ...]] = ("alpha", "radius", "radii", "max_draws", "n0", "n")
    guarantee: ClassVar[Guarantee] = "per_input"
    uses_clean_pass: ClassVar[bool] = False
    uses_count_head: ClassVar[bool] = False
    uses_base_classifier: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("n0", self.n0)
        check_count("n", self.n)
        check_share("alpha", self.alpha)
        if self.radius is not None:
            check_radius(self.radius)

    @classmethod
    def from_settings(
        cls, *, radii: tuple[float, ...] | None = None, max_draws: int | None = None, **settings: Any
    ) -> "FixedRule":
        if max_draws is not None:
            n0 = settings.get("n0", cls.n0)
            if max_draws <= n0:
                raise ValueError(f"max_draws={max_draws} must be above n0={n0}, the draws that only choose the class.")
            if settings.setdefault("n", max_draws - n0) > max_draws - n0:
                raise ValueError(f"n0 + n = {n0 + settings['n']} exceeds max_draws={max_draws}.")
        return cls(radius=max(radii) if radii else None, **settings)

    @property
    def budget(self) -> int:
        return self.n0 + self.n

    def check(self, noise: NoiseDistribution) -> None:
        check_reach(self.n, self.alpha, noise, self.radius or 0.0)

    def largest_radius(self, noise: NoiseDistribution) -> float:
        return float(noise.radius(self.alpha ** (1 / self.n)))

    def start(self, noise: NoiseDistribution, num_rows: int, num_classes: int) -> "_FixedRuns":
        return _FixedRuns(self, noise, num_rows, num_classes)


class _FixedRuns(CountRuns):
    def __init__(self, rule: FixedRule, noise: NoiseDistribution, num_rows: int, num_classes: int):
        super().__init__(rule.n, num_rows, num_classes)
        self.rule = rule
        self.noise = noise
        self.selected = np.full(num_rows, -1)
        """The class that the selection draws chose; -1 before them."""

    def start(self, rows: Rows, clean: CleanPass | None) -> NDArray[np.int64]:
        super().start(rows, clean)
        self.selected[rows] = -1
        return np.full(len(rows), self.rule.n0)

    def update(self, rows: Rows, counts: Counts) -> NDArray[np.int64]:
        selecting = self.selected[rows] < 0
        self.selected[rows[selecting]] = counts[selecting].argmax(1)
        super().update(rows[~selecting], counts[~selecting])  # selection draws are not counted again
        return np.where(selecting, self.rule.n, 0)

    def is_planned(self, rows: Rows) -> NDArray[np.bool_]:
        return np.asarray(self.selected[rows] >= 0)

    def outcomes(self, rows: Rows, pending: Counts | None = None) -> Outcomes:
        selected, counts = self.selected[rows], self.counts[rows]
        if pending is not None:
            counts += np.where(self.is_planned(rows)[:, None], pending, 0)
        hits = counts[np.arange(len(rows)), selected]
        p_lower = clopper_pearson_lower(hits, counts.sum(1), self.rule.alpha)
        return Outcomes.from_bounds(self.noise, selected, p_lower, 1 - p_lower)
