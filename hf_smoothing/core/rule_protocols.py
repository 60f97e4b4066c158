"""What a sampling rule is: the protocols that all rules share, and helpers to check their settings.

A rule holds settings only. For each image it starts a run. The run says how many draws it wants next (0: finished), takes
their class counts, and says in the end what they prove. Rules see class counts and a noise distribution, never a model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from .certificates import ABSTAIN, Guarantee, format_radius

Counts = NDArray[np.int64]


class NoiseDistribution(Protocol):
    """What a rule needs to know about a smoothing distribution."""

    @property
    def sigma(self) -> float:
        """Its standard deviation, in `[0, 1]` pixels."""

    def radius(self, p_a: float, p_b: float | None = None) -> float:
        """
        The radius certified where the top class has probability `p_a` or more and every other class `p_b` or less
        (`1 - p_a` if None); 0 where these bounds prove nothing.
        """

    def probability_needed(self, radius: float, p_b: float | None = None) -> float:
        """The probability that the top class must exceed to be certified at `radius`; `p_b` as for `radius`."""


@dataclass(frozen=True)
class Outcome:
    """What a run proved; fields as in [`Certificate`]."""

    prediction: int
    p_lower: float
    p_upper: float
    delta: float | None = None
    calibration: str | None = None


ABSTENTION = Outcome(ABSTAIN, 0.0, 1.0)


@dataclass(frozen=True)
class CleanPass:
    """The result of one pass over the clean image."""

    scores: NDArray[np.float64]
    """`(classes,)`: the base classifier's logits, or the prediction of a count head."""
    frequencies: bool = False
    """Whether the scores come from a count head: expected class frequencies under noise, of sum 1."""


class Run(Protocol):
    """The sampling of one image under a rule."""

    counts: Counts

    def next_draws(self) -> int:
        """How many draws the run wants next; 0 when it is finished. Pass the counts of all of them to `update` at once."""

    def update(self, counts: Counts) -> None:
        """Take the class counts, shape `(classes,)`, of the draws that `next_draws` asked for."""

    def outcome(self) -> Outcome:
        """What has been proved so far."""


class Rule(Protocol):
    """Settings of a sampling rule; one out of range is a `ValueError` at construction. `start` begins an image."""

    method: ClassVar[str]
    uses_clean_pass: ClassVar[bool]

    @property
    def guarantee(self) -> Guarantee: ...
    @property
    def alpha(self) -> float: ...
    @property
    def budget(self) -> int:
        """The most draws that one image can take."""

    def check(self, noise: NoiseDistribution) -> None:
        """Raise a `ValueError` if the rule can never claim what it is asked to."""

    def start(self, noise: NoiseDistribution, clean: CleanPass) -> Run:
        """Start an image, given the result of its clean pass; all zeros unless `uses_clean_pass`."""


def probability_in_reach(noise: NoiseDistribution, radius: float) -> float:
    """The probability that `radius` needs. Raises a `ValueError` where no probability suffices."""
    p0 = noise.probability_needed(radius)
    if p0 >= 1:
        raise ValueError(f"radius={radius:g} can never be certified with this noise: it needs a larger sigma.")
    return p0


def radii_in_reach(radii: Sequence[float], noise: NoiseDistribution, n: int, alpha: float) -> list[float]:
    """Those of the radii that Clopper-Pearson proves where all `n` draws hit."""
    return [radius for radius in radii if noise.probability_needed(radius) < alpha ** (1 / n)]


def probabilities_proving(radii: Sequence[float], noise: NoiseDistribution) -> list[float]:
    """The smallest probabilities that prove the radii, in floating point too; ascending."""
    probabilities = []
    for radius in sorted(radii):
        probability = noise.probability_needed(radius)
        while noise.radius(probability) < radius and probability < 1:
            probability = math.nextafter(probability, 1.0)
        probabilities.append(probability)
    return probabilities


def check_reach(n: int, alpha: float, noise: NoiseDistribution, radius: float) -> None:
    """Raise a `ValueError` where `n` draws can never prove `radius` by Clopper-Pearson."""
    p0 = probability_in_reach(noise, radius)
    if not radii_in_reach([radius], noise, n, alpha):
        needed = math.floor(math.log(alpha) / math.log(p0)) + 1
        raise too_few("n", n, radius, noise.radius(alpha ** (1 / n)), needed)


def too_few(name: str, value: int, radius: float, reachable: float, needed: int) -> ValueError:
    """The error for a setting `name` of so few draws that they can never prove `radius`."""
    return ValueError(
        f"{name}={value} draws can never certify radius {radius:g}: if all of them hit one class, they prove "
        f"{format_radius(reachable)}. Radius {radius:g} takes at least {needed:,} draws."
    )
