"""Certificates, what they guarantee, and the rules that decide when enough has been drawn.

A rule is a plain description (settings only). For each image it starts a run, which answers how many draws it wants
next (0: finished), takes their class counts, and in the end says what they prove. Rules see class counts and a noise
distribution; they know nothing of models.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_FLOOR, Decimal
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .bounds import check_probability, clopper_pearson_lower, confidence_sequence_lower, draws_to_reject, log_e_value

ABSTAIN = -1
"""The prediction of a certificate that claims nothing."""

Guarantee = Literal["per_input", "marginal", "none"]
Counts = NDArray[np.int64]


class NoiseDistribution(Protocol):
    """What a rule needs to know of a smoothing distribution."""

    def radius(self, p_a: float, p_b: float | None = None) -> float:
        """
        The radius certified where the top class has probability `p_a` or more and every other `p_b` or less (`1 - p_a` if
        None); 0 where that proves nothing.
        """
        ...

    def probability_needed(self, radius: float, p_b: float | None = None) -> float:
        """The probability that the top class must exceed to be certified at `radius`; `p_b` as for `radius`."""
        ...


@dataclass(frozen=True)
class Certificate:
    """
    What was proved about one image.

    Attributes:
        prediction: class index of the smoothed classifier, or `ABSTAIN` (-1).
        radius: no change of the image smaller than this, in the norm `norm` of `[0, 1]` pixels at the resolution at which
            the noise was added, changes the prediction. Full precision; 0 on abstention.
        guarantee: `per_input`: the claim is wrong with probability at most alpha over the draws, whatever the model.
            `marginal`: over exchangeable calibration and test images. `none`: an estimate.
        method: the rule that decided.
        noise: name of the smoothing distribution.
        norm: the norm that the radius is measured in.
        sampling: `lattice` where picture and noise were added exactly; `float` where not, which an adversarial base
            classifier could exploit.
        sigma: scale of the noise, in `[0, 1]` pixels.
        alpha: probability of a wrong claim.
        p_lower: lower bound of the probability of `prediction` under noise, on which the radius rests.
        p_upper: upper bound of the probability of every other class, on which it rests too.
        counts: how often each class was predicted in the counted draws.
        num_samples: forward passes spent on the image, those that only chose the class included.
        seed: seed of the noise.
        dtype: floating-point type of the forward passes.
        compiled: whether they went through `torch.compile`.
    """

    prediction: int
    radius: float
    guarantee: Guarantee
    method: str
    noise: str
    norm: str
    sampling: Literal["lattice", "float"]
    sigma: float
    alpha: float
    p_lower: float
    p_upper: float
    counts: tuple[int, ...]
    num_samples: int
    seed: int
    dtype: str
    compiled: bool = False

    @property
    def abstains(self) -> bool:
        """Whether nothing is claimed."""
        return self.prediction == ABSTAIN

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, ready for JSON."""
        return {**asdict(self), "counts": list(self.counts)}


def format_radius(radius: float, digits: int = 3) -> str:
    """
    Text of a radius, rounded *down* (a certificate shown must be one that was proved).

    >>> format_radius(0.24999), format_radius(0.5)
    ('0.249', '0.500')
    """
    if not math.isfinite(radius):
        return str(radius)
    return str(Decimal(radius).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR))


@dataclass(frozen=True)
class Outcome:
    """What a run proved: a class (or `ABSTAIN`), a lower bound of its probability and an upper bound of the others'."""

    prediction: int
    p_lower: float
    p_upper: float


ABSTENTION = Outcome(ABSTAIN, 0.0, 1.0)


class Run(Protocol):
    """The sampling of one image under a rule."""

    counts: Counts

    def next_draws(self) -> int:
        """Draws wanted next; 0 when finished. The run must be handed the counts of all of them at once."""
        ...

    def update(self, counts: Counts) -> None:
        """Take the class counts, shape `(classes,)`, of the draws asked for."""
        ...

    def outcome(self) -> Outcome:
        """What has been proved so far."""
        ...


class Rule(Protocol):
    """Settings of a sampling rule, checked at construction; `start` begins the sampling of one image."""

    method: ClassVar[str]
    guarantee: ClassVar[Guarantee]
    uses_clean_pass: ClassVar[bool]

    @property
    def alpha(self) -> float: ...

    @property
    def budget(self) -> int:
        """The most draws that one image can take."""
        ...

    def check(self, noise: NoiseDistribution) -> None:
        """Raise a `ValueError` if the rule can never claim what it is asked to."""
        ...

    def start(self, noise: NoiseDistribution, clean_scores: NDArray[np.float64]) -> Run:
        """Begin an image. `clean_scores`, `(classes,)`: the logits of the clean image, all 0 unless `uses_clean_pass`."""
        ...


def check_count(name: str, value: int) -> None:
    """Raise a `ValueError` that names the value unless it is a whole number above 0."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, 1 or more.")


def _check_share(name: str, value: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a number strictly between 0 and 1.")
    check_probability(name, value)


def _check_radius(radius: float) -> None:
    if not isinstance(radius, Real) or isinstance(radius, bool) or not 0 <= radius < math.inf:
        raise ValueError(f"radius={radius!r} must be a finite number, 0 or above.")


def _reachable(noise: NoiseDistribution, radius: float) -> float:
    """The probability that `radius` needs, where there is one."""
    p0 = noise.probability_needed(radius)
    if p0 >= 1:
        raise ValueError(
            f"radius={radius:g} can never be certified with this noise: it takes more of it (a larger sigma)."
        )
    return p0


def _too_few(name: str, value: int, radius: float, reachable: float, needed: int) -> ValueError:
    return ValueError(
        f"{name}={value} draws can never certify radius {radius:g}: all of one class, they show "
        f"{format_radius(reachable)}. Radius {radius:g} takes at least {needed:,} draws."
    )


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
        _check_share("alpha", self.alpha)
        if self.radius is not None:
            _check_radius(self.radius)

    @property
    def budget(self) -> int:
        return self.n0 + self.n

    def check(self, noise: NoiseDistribution) -> None:
        radius = self.radius or 0.0
        p0 = _reachable(noise, radius)
        if self.alpha ** (1 / self.n) <= p0:  # Clopper-Pearson for n of n
            needed = math.floor(math.log(self.alpha) / math.log(p0)) + 1
            raise _too_few("n", self.n, radius, noise.radius(self.alpha ** (1 / self.n)), needed)

    def start(self, noise: NoiseDistribution, clean_scores: NDArray[np.float64]) -> "_FixedRun":
        return _FixedRun(self, noise, len(clean_scores))


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
class SequentialRule:
    """
    Draw until the question is settled; the certificate holds whenever that is.

    For each class, e-processes bound its probability from below and from above at all times at once ([`log_e_value`]). Nine
    tenths of alpha are for the lower bounds, shared out over the classes by weights fixed before the first counted draw; one
    tenth is for the upper bounds, in equal shares. The certificate rests on the lower bound of one class and the largest
    upper bound of the others, or on the lower bound alone where that shows more. What is asked only decides when to stop:

    - `radii`: until each radius is claimed, or the next one has become hopeless.
    - otherwise: until the radius is known to the relative `tolerance`, or the budget can no longer show any.

    In both cases the certificate carries the largest radius that was proved, which may exceed those asked; all bounds hold
    together at alpha, so every smaller radius holds with it.

    Args:
        radii: radii to decide; `None` finds the radius.
        alpha: probability of a wrong certificate, in (0, 1).
        max_samples: the most draws for one image.
        tolerance: without `radii`, stop once the proved radius is at least `1 - tolerance` of what it can still
            become (the upper end of a 95 % confidence interval, or what the budget can show if that is less).
        weight_floor: the part of alpha shared equally over all classes; the rest follows their rank on the clean image.
        prior: Beta prior of the e-processes.

    Raises:
        ValueError: for a setting out of range.

    Source: Ville's inequality for the mixture e-process of [`log_e_value`]; the radius is theorem 1 of Cohen et al. 2019
    (arXiv 1902.02918) for Gaussian noise.
    """

    radii: tuple[float, ...] | None = None
    alpha: float = 0.001
    max_samples: int = 10_000
    tolerance: float = 0.1
    weight_floor: float = 0.05
    prior: tuple[float, float] = (0.5, 0.5)

    method: ClassVar[str] = "sequential"
    guarantee: ClassVar[Guarantee] = "per_input"
    uses_clean_pass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share("alpha", self.alpha)
        _check_share("tolerance", self.tolerance)
        _check_share("weight_floor", self.weight_floor)
        check_count("max_samples", self.max_samples)
        if self.radii is not None:
            if not self.radii:
                raise ValueError("radii=() asks for nothing: give one or more radii, or None to find the radius.")
            for radius in self.radii:
                _check_radius(radius)

    @property
    def budget(self) -> int:
        return self.max_samples

    def check(self, noise: NoiseDistribution) -> None:
        radius = max(self.radii or (0.0,))
        alpha = self._largest_alpha
        needed = draws_to_reject(_reachable(noise, radius), alpha, self.prior)
        if needed > self.max_samples:
            best = noise.radius(_lower(self.max_samples, self.max_samples, alpha, self.prior))
            raise _too_few("max_samples", self.max_samples, radius, best, needed)

    @property
    def _largest_alpha(self) -> float:
        """What a single claim can have of alpha, whatever the number of classes: the share of the class ranked first."""
        return (1 - _UPPER_SHARE) * (1 - self.weight_floor) * (1 - _RANK_DECAY) * self.alpha

    def start(self, noise: NoiseDistribution, clean_scores: NDArray[np.float64]) -> "_SequentialRun":
        return _SequentialRun(self, noise, class_weights(clean_scores, self.weight_floor))


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


_RANK_DECAY = 0.15
"""About how often the answer under noise is not the class ranked next on the clean image."""

_UPPER_SHARE = 0.1
"""The part of alpha for the upper bounds. It adds 1.5 % to the draws of a claim that could do without them."""

_ALPHA_STOP = 0.01
"""Level of the intervals that show a radius to be out of reach: it costs some claims at worst, never validity."""

_ALPHA_KNOWN = 0.05
"""Level of the upper end of the radius that `tolerance` is measured against; informative only."""


class _SequentialRun:
    def __init__(self, rule: SequentialRule, noise: NoiseDistribution, weights: NDArray[np.float64]):
        self.rule = rule
        self.noise = noise
        self.alphas_lower = (1 - _UPPER_SHARE) * rule.alpha * weights
        self.alpha_upper = _UPPER_SHARE * rule.alpha / len(weights)
        self.counts = np.zeros(len(weights), np.int64)
        self.best = ABSTENTION
        self._best_radius = 0.0
        self.wanted = min(8, rule.max_samples)
        self.radii = sorted(rule.radii or ())  # those not yet claimed
        if rule.radii is None:
            most = _lower(rule.max_samples, rule.max_samples, rule._largest_alpha, rule.prior)
            self.largest_radius = noise.radius(most)

    def next_draws(self) -> int:
        return self.wanted

    def update(self, counts: Counts) -> None:
        self.counts += counts
        draws = int(self.counts.sum())
        top = int(self.counts.argmax())
        hits = int(self.counts[top])
        runner_up = int(np.delete(self.counts, top).max(initial=0))
        wanted = (self._decide if self.rule.radii is not None else self._find)(top, hits, runner_up, draws)
        self.wanted = min(wanted, self.rule.max_samples - draws)
        if not self.wanted:
            self._keep_better(top, hits, runner_up, draws)

    def outcome(self) -> Outcome:
        return self.best

    def _decide(self, top: int, hits: int, runner_up: int, draws: int) -> int:
        """Draws wanted next; 0 once every radius asked for is claimed or the next one is out of reach."""
        claimed = len(self.radii)
        while self.radii and self._shows(self.radii[0], top, hits, runner_up, draws):
            self.radii.pop(0)
        if len(self.radii) < claimed:
            self._keep_better(top, hits, runner_up, draws)  # later draws may speak less clearly; the claim stands
        if not self.radii or self._hopeless(self.radii[0], top, hits, runner_up, draws):
            return 0
        # No draw multiplies the e-value by more than 1/p0: a claim from the lower bound alone takes at least this many
        p0 = self.noise.probability_needed(self.radii[0])
        missing = -math.log(self.alphas_lower[top]) - float(log_e_value(hits, draws, p0, self.rule.prior))
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
        left = self.rule.max_samples - draws
        p_a, p_b = _interval(hits, runner_up, draws, _ALPHA_STOP)
        return not self._shows(radius, top, hits + left * p_a, runner_up + left * p_b, draws + left)

    def _shows(self, radius: float, top: int, hits: float, runner_up: float, draws: int) -> bool:
        """Whether these counts prove `radius`."""
        if self.noise.radius(hits / draws, runner_up / draws) <= radius:
            return False
        p0 = self.noise.probability_needed(radius)
        if self._exceeds(hits, draws, p0, self.alphas_lower[top]):
            return True
        # With the others bounded by p_b the top class needs less. A bound at one time with room to spare is a good guess
        # of one at all times; whether it holds is tested like everything else.
        p_b = 1 - float(clopper_pearson_lower(draws - runner_up, draws, self.alpha_upper / 30))
        p_a = self.noise.probability_needed(radius, p_b)
        return (
            p_a < p0
            and self._exceeds(hits, draws, p_a, self.alphas_lower[top])
            and self._exceeds(draws - runner_up, draws, 1 - p_b, self.alpha_upper)
        )

    def _exceeds(self, hits: float, draws: int, p0: float, alpha: float) -> bool:
        return hits > p0 * draws and bool(log_e_value(hits, draws, p0, self.rule.prior) >= -math.log(alpha))

    def _keep_better(self, top: int, hits: int, runner_up: int, draws: int) -> None:
        """Take the bounds that these counts prove, if they show a larger radius than those of earlier looks."""
        p_lower = _lower(hits, draws, self.alphas_lower[top], self.rule.prior)
        p_upper = min(1 - _lower(draws - runner_up, draws, self.alpha_upper, self.rule.prior), 1 - p_lower)
        shown = self.noise.radius(p_lower, p_upper)
        if shown > self._best_radius:
            self.best, self._best_radius = Outcome(top, p_lower, p_upper), shown


def _interval(hits: int, runner_up: int, draws: int, alpha: float) -> tuple[float, float]:
    """Optimistic probabilities: an upper bound for the top class, a lower one for the runner-up."""
    lower = clopper_pearson_lower([draws - hits, runner_up], draws, alpha)
    return 1 - float(lower[0]), float(lower[1])


def _lower(hits: int, draws: int, alpha: float, prior: tuple[float, float]) -> float:
    return float(confidence_sequence_lower(hits, draws, alpha, prior))


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
        _check_share("alpha", self.alpha)

    @property
    def budget(self) -> int:
        return self.n

    def check(self, noise: NoiseDistribution) -> None:
        if 2 * 0.5**self.n > self.alpha:
            needed = math.ceil(math.log2(2 / self.alpha))
            raise ValueError(f"n={self.n} draws always abstain at alpha={self.alpha:g}: it takes at least {needed}.")

    def start(self, noise: NoiseDistribution, clean_scores: NDArray[np.float64]) -> "_PredictRun":
        return _PredictRun(self, len(clean_scores))


class _PredictRun:
    def __init__(self, rule: PredictRule, num_classes: int):
        self.rule = rule
        self.counts = np.zeros(num_classes, np.int64)

    def next_draws(self) -> int:
        return self.rule.n - int(self.counts.sum())

    def update(self, counts: Counts) -> None:
        self.counts += counts

    def outcome(self) -> Outcome:
        second, first = np.sort(self.counts)[-2:] if len(self.counts) > 1 else (0, self.counts[0])
        if first == 0 or stats.binomtest(int(first), int(first + second), 0.5).pvalue > self.rule.alpha:
            return ABSTENTION
        return Outcome(int(self.counts.argmax()), 0.0, 1.0)


def make_rule(
    method: str,
    *,
    alpha: float = 0.001,
    radius: float | None = None,
    radii: Sequence[float] | None = None,
    max_samples: int | None = None,
    n0: int | None = None,
    n: int | None = None,
    tolerance: float | None = None,
) -> Rule:
    """
    A rule by name, from the settings that users give; those left at `None` take the rule's defaults.

    Args:
        method: `"sequential"` or `"fixed"`.
        alpha: probability of a wrong certificate, in (0, 1).
        radius: one radius to decide.
        radii: several radii to decide, instead of `radius`.
        max_samples: the most draws for one image (for `fixed` it is `n`, unless a smaller one is given).
        n0: draws that choose the class, `fixed` only.
        n: draws that bound its probability, `fixed` only.
        tolerance: relative tolerance of the radius, `sequential` without a radius only.

    Raises:
        ValueError: for an unknown method, a setting out of range, or one that the method does not take.
    """
    if radius is not None and radii is not None:
        raise ValueError("Give radius or radii, not both.")
    if radii is not None and not isinstance(radii, Sequence):
        raise ValueError(f"radii={radii!r} must be a list of radii; one alone is `radius`.")
    asked = tuple(radii) if radii is not None else None if radius is None else (radius,)
    rule: type[FixedRule] | type[SequentialRule]
    for one in asked or ():
        _check_radius(one)
    if method == "fixed":
        if n is not None and max_samples is not None and n > max_samples:
            raise ValueError(f"n={n} exceeds max_samples={max_samples}.")
        rule, refused = FixedRule, {"tolerance": tolerance}
        settings: dict[str, Any] = {"n0": n0, "n": n if n is not None else max_samples}
        settings["radius"] = max(asked) if asked else None
    elif method == "sequential":
        rule, refused = SequentialRule, {"n0": n0, "n": n}
        if asked is not None:
            refused["tolerance"] = tolerance
        settings = {"radii": asked, "max_samples": max_samples, "tolerance": tolerance}
    else:
        raise ValueError(f"method={method!r} is unknown: use 'sequential' or 'fixed'.")
    for name, value in refused.items():
        if value is not None:
            why = (
                "when radii are given" if name == "tolerance" and method == "sequential" else f"for method {method!r}"
            )
            raise ValueError(f"{name}={value} has no meaning {why}: leave it out.")
    return rule(alpha=alpha, **{name: value for name, value in settings.items() if value is not None})
