"""The rule that draws nothing and relies on a count head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .calibration import Calibration, estimate_lower_bound
from .certificates import ABSTAIN, Guarantee
from .count_rule import CountRuns
from .rule_protocols import (
    CleanPass,
    Counts,
    NoiseDistribution,
    Outcomes,
    Rows,
    check_reach,
    probabilities_proving,
)
from .selection import count_selected_radii
from .validation import check_count, check_radii, check_share


@dataclass(frozen=True)
class SurrogateRule:
    """
    Draw nothing: use a count head's prediction in place of draws.

    Args:
        n: the number of draws that the prediction stands for.
        alpha: level of the bound that these draws would give.
        delta: the share of images about which the claim may be wrong, in (0, 1), see [`Calibration`]. Without it and
            `false_claims` the radius is an estimate that guarantees nothing.
        false_claims: the share of the claims at a radius that may be wrong, in (0, 1), see [`count_selected_radii`]. It
            depends on the estimates of all images, so [`select`] makes the claims once they are there.
        calibration: of the head, with the same `n` and `alpha`.
        radii: with `delta` or `false_claims`, the radii to decide: the certificate carries the largest of them that can be
            claimed. A radius of 0 asks for the prediction alone. Choose the radii before you see results.

    Raises:
        ValueError: for a setting out of range, a calibration with other draws, or radii of an estimate.

    Source: Accelerated Smoothing (arXiv 2402.07498); split conformal prediction for `delta`, see [`Calibration`].
    """

    n: int = 100_000
    alpha: float = 0.001
    delta: float | None = None
    calibration: Calibration | None = None
    radii: tuple[float, ...] | None = None
    false_claims: float | None = None

    method: ClassVar[str] = "surrogate"
    takes: ClassVar[tuple[str, ...]] = ("alpha", "radius", "radii", "n", "delta", "false_claims", "calibration")
    uses_clean_pass: ClassVar[bool] = False
    uses_count_head: ClassVar[bool] = True
    uses_base_classifier: ClassVar[bool] = False
    budget: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_share("alpha", self.alpha)
        if self.delta is None and self.false_claims is None:
            if self.radii is not None:
                raise ValueError(
                    f"radii={self.radii} have no meaning for method 'surrogate' without delta, which estimates each "
                    "image's radius: leave them out, or give delta or false_claims."
                )
            return
        if self.radii is not None:
            check_radii(self.radii)
        if self.delta is not None and self.false_claims is not None:
            raise ValueError("Give delta or false_claims, not both: they are different guarantees.")
        if self.false_claims is not None and self.radii is None:
            raise ValueError(
                f"false_claims={self.false_claims:g} is a share of the claims at each radius: give radii."
            )
        name, share = ("false_claims", self.false_claims) if self.delta is None else ("delta", self.delta)
        assert share is not None
        check_share(name, share)
        if self.calibration is None:
            raise ValueError(f"{name}={share:g} takes a calibrated count head: run hf-smoothing calibrate.")
        for name in ("n", "alpha"):
            value, calibrated = getattr(self, name), getattr(self.calibration, name)
            if value != calibrated:
                raise ValueError(f"{name}={value} is not that of the calibration, {calibrated}.")

    @classmethod
    def from_settings(cls, **settings: Any) -> "SurrogateRule":
        if "calibration" in settings:
            settings.setdefault("n", settings["calibration"].n)
        return cls(**settings)

    @property
    def guarantee(self) -> Guarantee:
        """Of what it says of one image: with `false_claims` an estimate, until [`select`] has seen all of them."""
        return "none" if self.delta is None else "marginal"

    def check(self, noise: NoiseDistribution) -> None:
        if self.calibration is not None:
            if self.delta is not None:
                self.calibration.shift(noise.sigma, self.delta)
            self.calibration.at(noise.sigma)
        for radius in self.radii or ():
            check_reach(self.n, self.alpha, noise, radius)

    def largest_radius(self, noise: NoiseDistribution) -> float:
        return float(noise.radius(self.alpha ** (1 / self.n)))

    def shift(self, noise: NoiseDistribution) -> float:
        """How far the predicted log-odds of p_A are lowered (below 0: raised), see [`Calibration.shift`]; needs `delta`."""
        assert self.calibration is not None
        assert self.delta is not None
        needed = None if self.radii is None else probabilities_proving(self.radii, noise)
        return self.calibration.shift(noise.sigma, self.delta, needed)

    def claim(self, noise: NoiseDistribution, p_a: float) -> float | None:
        """The lower bound of the top class's probability that is claimed if the head predicts `p_a`; `None` to abstain."""
        if self.delta is None or self.calibration is None:
            p_lower = float(estimate_lower_bound(p_a, self.n, self.alpha))
        elif self.radii is None:
            p_lower = float(self.calibration.shifted_lower_bound(p_a, self.shift(noise)))
        else:
            needed = probabilities_proving(self.radii, noise)
            claimed = int(self.calibration.count_claimed_radii(p_a, self.shift(noise), needed))
            return needed[claimed - 1] if claimed else None  # a radius of 0, if asked for, is a claim too
        return p_lower if noise.radius(p_lower) > 0 else None

    def select(self, noise: NoiseDistribution, estimates: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
        """
        Make the claims, with `false_claims`.

        Args:
            noise: the smoothing distribution of the estimates.
            estimates: prediction and `p_lower` of all images, as the rule estimates them.

        Returns:
            For each image, what its certificate says in place of the estimate.
        """
        assert self.calibration is not None
        assert self.false_claims is not None
        p_lower = np.array([0.0 if prediction == ABSTAIN else bound for prediction, bound in estimates])
        needed = probabilities_proving(self.radii or (), noise)
        selected = count_selected_radii(self.calibration, noise.sigma, p_lower, needed, self.false_claims)
        shared = {
            "guarantee": "selected",
            "false_claims": self.false_claims,
            "calibration": self.calibration.description,
        }
        claims: list[dict[str, Any]] = []
        for (prediction, _), number in zip(estimates, selected):
            bound = needed[number - 1] if number else 0.0
            radius = float(noise.radius(bound)) if number else 0.0
            claim = {"prediction": prediction if number else ABSTAIN, "radius": radius}
            claims.append({**shared, **claim, "p_lower": bound, "p_upper": 1 - bound})
        return claims

    def start(self, noise: NoiseDistribution, num_rows: int, num_classes: int) -> "_SurrogateRuns":
        return _SurrogateRuns(self, noise, num_rows, num_classes)


class _SurrogateRuns(CountRuns):
    def __init__(self, rule: SurrogateRule, noise: NoiseDistribution, num_rows: int, num_classes: int):
        super().__init__(0, num_rows, num_classes)
        self.rule = rule
        self.noise = noise
        self.frequencies = np.zeros((num_rows, num_classes))

    def start(self, rows: Rows, clean: CleanPass | None) -> NDArray[np.int64]:
        if clean is None or not clean.frequencies:
            raise ValueError("method='surrogate' takes a count head: pass count_head.")
        self.frequencies[rows] = clean.scores
        return super().start(rows, clean)

    def outcomes(self, rows: Rows, pending: Counts | None = None) -> Outcomes:
        tops, p_a = self.frequencies[rows].argmax(1), self.frequencies[rows].max(1)
        bounds = [self.rule.claim(self.noise, p) for row, p in zip(rows, p_a)]
        claims = np.array([bound is not None for bound in bounds], bool)
        p_lower = np.array([bound or 0.0 for bound in bounds])
        calibration = self.rule.calibration
        source = None if self.rule.delta is None or calibration is None else calibration.description
        radii = np.where(claims, self.noise.radius(p_lower), 0.0)
        predictions = np.where(claims, tops, ABSTAIN)
        return Outcomes(predictions, radii, p_lower, np.where(claims, 1 - p_lower, 1.0), self.rule.delta, source)
