"""The rules with a number of draws fixed in advance, and every rule by its name."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .bounds import clopper_pearson_lower
from .calibration import Calibration, estimated_lower_bound
from .certificates import (
    ABSTENTION,
    CleanPass,
    Counts,
    Guarantee,
    NoiseDistribution,
    Outcome,
    Rule,
    probability_in_reach,
    too_few,
)
from .sequential import SequentialRule
from .validation import check_count, check_radii, check_radius, check_share


@dataclass(frozen=True)
class FixedRule:
    """
    The usual protocol: `n0` draws choose the class, `n` fresh draws bound its probability (Clopper-Pearson).

    Args:
        n0: draws that choose the class.
        n: draws that bound its probability.
        alpha: probability of a wrong certificate, in (0, 1).
        radius: a radius that matters to you; only used to refuse, at once, an `n` that could never show it.

    Raises:
        ValueError: for a setting out of range.

    Source: Cohen et al. 2019 (arXiv 1902.02918), algorithm CERTIFY and theorem 1.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    radius: float | None = None

    method: ClassVar[str] = "fixed"
    guarantee: ClassVar[Guarantee] = "per_input"
    uses_clean_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("n0", self.n0)
        check_count("n", self.n)
        check_share("alpha", self.alpha)
        if self.radius is not None:
            check_radius(self.radius)

    @property
    def budget(self) -> int:
        return self.n0 + self.n

    def check(self, noise: NoiseDistribution) -> None:
        _check_reach(self.n, self.alpha, noise, self.radius or 0.0)

    def start(self, noise: NoiseDistribution, clean: CleanPass) -> "_FixedRun":
        return _FixedRun(self, noise, len(clean.scores))


class _FixedRun:
    def __init__(self, rule: FixedRule, noise: NoiseDistribution, num_classes: int):
        self.rule = rule
        self.noise = noise
        self.selected: int | None = None
        self.counts = np.zeros(num_classes, np.int64)

    def next_draws(self) -> int:
        if self.selected is None:
            return self.rule.n0
        return self.rule.n - int(self.counts.sum())

    def update(self, counts: Counts) -> None:
        if self.selected is None:
            self.selected = int(counts.argmax())  # these draws are not counted again
        else:
            self.counts += counts

    def outcome(self) -> Outcome:
        if self.selected is None:
            return ABSTENTION
        hits, draws = self.counts[self.selected], self.counts.sum()
        p_lower = float(clopper_pearson_lower(hits, draws, self.rule.alpha))
        return Outcome(self.selected, p_lower, 1 - p_lower) if self.noise.radius(p_lower) > 0 else ABSTENTION


@dataclass(frozen=True)
class PredictRule:
    """
    The smoothed prediction without a radius: `n` draws, and abstention unless the top two classes differ clearly.

    Args:
        n: draws.
        alpha: probability of returning another class than the smoothed classifier's, in (0, 1).

    Raises:
        ValueError: for a setting out of range.

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


class _CountRun:
    def __init__(self, rule: "PredictRule | CountRule", num_classes: int):
        self.rule = rule
        self.counts = np.zeros(num_classes, np.int64)

    def next_draws(self) -> int:
        return self.rule.n - int(self.counts.sum())

    def update(self, counts: Counts) -> None:
        self.counts += counts

    def outcome(self) -> Outcome:
        return Outcome(int(self.counts.argmax()), 0.0, 1.0)


class _PredictRun(_CountRun):
    def outcome(self) -> Outcome:
        second, first = np.sort(self.counts)[-2:] if len(self.counts) > 1 else (0, self.counts[0])
        if first == 0 or stats.binomtest(int(first), int(first + second), 0.5).pvalue > self.rule.alpha:
            return ABSTENTION
        return super().outcome()


@dataclass(frozen=True)
class CountRule:
    """
    Count the classes of `n` draws and claim nothing: what a count head is trained on (arXiv 2402.07498).

    Args:
        n: draws.

    Raises:
        ValueError: for a setting out of range.
    """

    n: int = 64

    method: ClassVar[str] = "counts"
    guarantee: ClassVar[Guarantee] = "none"
    uses_clean_pass: ClassVar[bool] = False
    alpha: ClassVar[float] = 1.0  # nothing is claimed

    def __post_init__(self) -> None:
        check_count("n", self.n)

    @property
    def budget(self) -> int:
        return self.n

    def check(self, noise: NoiseDistribution) -> None:
        """Counting is always possible."""

    def start(self, noise: NoiseDistribution, clean: CleanPass) -> "_CountRun":
        return _CountRun(self, len(clean.scores))


@dataclass(frozen=True)
class SurrogateRule:
    """
    Draw nothing: take a count head's word for what draws would have said.

    Args:
        n: the draws that the head is taken to stand for.
        alpha: level of the bound that they would have given.
        delta: the share of images about which the claim may be wrong, in (0, 1): the estimate is lowered as far as
            `calibration` says that takes, or raised where it is too large for fewer. It is a share of all images, not of
            those that get a radius. Without it the radius is an estimate that guarantees nothing.
        calibration: of the head; of the same `n` and `alpha`.
        radii: with `delta`, the radii that matter to you: the largest of them that can be claimed is. That takes less
            lowering than to claim each image's own radius. A radius of 0 asks for the answer alone. Choose them before you
            see what comes of them.

    Raises:
        ValueError: for a setting out of range, a calibration of other draws, or radii of an estimate.

    Source: Accelerated Smoothing (arXiv 2402.07498); split conformal prediction for `delta`, see [`Calibration`].
    """

    n: int = 100_000
    alpha: float = 0.001
    delta: float | None = None
    calibration: Calibration | None = None
    radii: tuple[float, ...] | None = None

    method: ClassVar[str] = "surrogate"
    uses_clean_pass: ClassVar[bool] = True
    budget: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_share("alpha", self.alpha)
        if self.delta is None:
            if self.radii is not None:
                raise ValueError(
                    f"radii={self.radii} have no meaning for an estimate, which says each image's radius: leave them out, "
                    "or give delta."
                )
            return
        if self.radii is not None:
            check_radii(self.radii)
        check_share("delta", self.delta)
        if self.calibration is None:
            raise ValueError(
                f"delta={self.delta:g} takes a calibrated count head: run hf-smoothing calibrate, or leave it out."
            )
        for name in ("n", "alpha"):
            if getattr(self, name) != getattr(self.calibration, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} is not that of the calibration, {getattr(self.calibration, name)}."
                )

    @property
    def guarantee(self) -> Guarantee:
        return "none" if self.delta is None else "marginal"

    def check(self, noise: NoiseDistribution) -> None:
        if self.delta is not None and self.calibration is not None:
            self.calibration.shift(noise.sigma, self.delta)
        for radius in self.radii or ():
            _check_reach(self.n, self.alpha, noise, radius)

    def shift(self, noise: NoiseDistribution) -> float:
        """By how much the predicted log-odds of p_A are lowered (or raised), see [`Calibration.shift`]; takes `delta`."""
        assert self.calibration is not None
        assert self.delta is not None
        needed = None if self.radii is None else probabilities_showing(self.radii, noise)
        return self.calibration.shift(noise.sigma, self.delta, needed)

    def start(self, noise: NoiseDistribution, clean: CleanPass) -> "_SurrogateRun":
        if not clean.frequencies:
            raise ValueError("method='surrogate' takes a count head: pass count_head.")
        return _SurrogateRun(self, noise, clean.scores)


class _SurrogateRun:
    def __init__(self, rule: SurrogateRule, noise: NoiseDistribution, frequencies: NDArray[np.float64]):
        self.counts = np.zeros(len(frequencies), np.int64)
        top = int(frequencies.argmax())
        calibration, claims = rule.calibration, False
        if rule.delta is None or calibration is None:
            p_lower = float(estimated_lower_bound(frequencies[top], rule.n, rule.alpha))
        elif rule.radii is None:
            p_lower = float(calibration.shifted(frequencies[top], rule.shift(noise)))
        else:
            needed = probabilities_showing(rule.radii, noise)
            claimed = int(calibration.claimed(frequencies[top], rule.shift(noise), needed))
            p_lower, claims = [0.0, *needed][claimed], claimed > 0  # if only a radius of 0, which was asked for
        found = Outcome(top, p_lower, 1 - p_lower) if claims or noise.radius(p_lower) > 0 else ABSTENTION
        on = None if rule.delta is None or calibration is None else calibration.words
        self._outcome = replace(found, delta=rule.delta, calibration=on)

    def next_draws(self) -> int:
        return 0

    def update(self, counts: Counts) -> None:
        raise AssertionError("no draws were asked for")

    def outcome(self) -> Outcome:
        return self._outcome


def radii_in_reach(radii: Sequence[float], noise: NoiseDistribution, n: int, alpha: float) -> list[float]:
    """Those of the radii that Clopper-Pearson shows where all of `n` draws hit."""
    return [radius for radius in radii if noise.probability_needed(radius) < alpha ** (1 / n)]


def probabilities_showing(radii: Sequence[float], noise: NoiseDistribution) -> list[float]:
    """The smallest probabilities that show the radii, in floating point too; ascending."""
    found = []
    for radius in sorted(radii):
        probability = noise.probability_needed(radius)
        while noise.radius(probability) < radius and probability < 1:
            probability = math.nextafter(probability, 1.0)
        found.append(probability)
    return found


def _check_reach(n: int, alpha: float, noise: NoiseDistribution, radius: float) -> None:
    p0 = probability_in_reach(noise, radius)
    if not radii_in_reach([radius], noise, n, alpha):
        needed = math.floor(math.log(alpha) / math.log(p0)) + 1
        raise too_few("n", n, radius, noise.radius(alpha ** (1 / n)), needed)


def make_rule(
    method: str,
    *,
    alpha: float = 0.001,
    radius: float | None = None,
    radii: Sequence[float] | None = None,
    max_draws: int | None = None,
    n0: int | None = None,
    n: int | None = None,
    tolerance: float | None = None,
    delta: float | None = None,
    calibration: Calibration | None = None,
) -> Rule:
    """
    A rule by name, from the settings that users give; those left at `None` take the rule's defaults.

    Args:
        method: `"sequential"` or `"fixed"`; `"surrogate"` asks a count head alone; `"counts"` only counts.
        alpha: probability of a wrong certificate, in (0, 1); without meaning for `counts`, which claims nothing.
        radius: one radius to decide; for `surrogate` with `delta` only.
        radii: several radii to decide, instead of `radius`.
        max_draws: the most draws for one image (for `fixed` it is `n`, unless a smaller one is given).
        n0: draws that choose the class, `fixed` only.
        n: draws that bound its probability (`fixed`), are counted (`counts`), or that the head stands for (`surrogate`).
        tolerance: relative tolerance of the radius, `sequential` without a radius only.
        delta: the share of images about which a calibrated count head may be wrong, `surrogate` only.
        calibration: the count head's; used where `delta` is given, and then `n` is by default the calibration's.

    Raises:
        ValueError: for an unknown method, a setting out of range, or one that the method does not take.
    """
    if radius is not None and radii is not None:
        raise ValueError("Give radius or radii, not both.")
    if radii is not None and not isinstance(radii, Sequence):
        raise ValueError(f"radii={radii!r} must be a list of radii; one alone is `radius`.")
    asked = tuple(radii) if radii is not None else None if radius is None else (radius,)
    rule: Callable[..., Rule]
    refused: dict[str, Any]
    for one in asked or ():
        check_radius(one)
    if method == "fixed":
        if n is not None and max_draws is not None and n > max_draws:
            raise ValueError(f"n={n} exceeds max_draws={max_draws}.")
        rule, refused = FixedRule, {"tolerance": tolerance}
        settings: dict[str, Any] = {"n0": n0, "n": n if n is not None else max_draws}
        settings["radius"] = max(asked) if asked else None
    elif method == "sequential":
        rule, refused = SequentialRule, {"n0": n0, "n": n}
        if asked is not None:
            refused["tolerance"] = tolerance
        settings = {"radii": asked, "max_draws": max_draws, "tolerance": tolerance}
    elif method == "surrogate":
        rule, refused = SurrogateRule, {"max_draws": max_draws, "n0": n0, "tolerance": tolerance}
        if delta is None:  # an estimate says each image's radius
            refused |= {"radius": radius, "radii": radii}
        # without delta a calibration that happens to lie beside the head changes nothing
        used = None if delta is None else calibration
        settings = {"n": n if n is not None or used is None else used.n, "delta": delta, "calibration": used}
        settings["radii"] = asked
    elif method == "counts":
        rule = lambda alpha, **chosen: CountRule(**chosen)  # noqa: E731
        refused = {"radius": radius, "radii": radii, "n0": n0, "tolerance": tolerance}
        settings = {"n": n if n is not None else max_draws}
    else:
        raise ValueError(f"method={method!r} is unknown: use 'sequential', 'fixed', 'surrogate' or 'counts'.")
    if method != "surrogate":
        refused["delta"] = delta
    for name, value in refused.items():
        if value is not None:
            why = f"for method {method!r}"
            if name == "tolerance" and method == "sequential":
                why = "when radii are given"
            elif name in ("radius", "radii") and method == "surrogate":
                why += " without delta"
            raise ValueError(f"{name}={value} has no meaning {why}: leave it out.")
    return rule(alpha=alpha, **{name: value for name, value in settings.items() if value is not None})
