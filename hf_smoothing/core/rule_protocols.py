"""What a sampling rule is: the protocols that all rules share, and helpers to check their settings.

A rule holds settings only. It starts runs: the sampling of many images, one row of arrays per image. For the rows that it is
given, a run says how many draws it wants next (0: finished), takes their class counts, and says in the end what they prove.
Rules see class counts and a noise distribution, never a model. No row depends on another.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .certificates import ABSTAIN, Guarantee, format_radius

Counts = NDArray[np.int64]
Rows = NDArray[np.int64]
"""Indices of rows, each at most once."""
FloatArray = NDArray[np.float64]


class NoiseDistribution(Hashable, Protocol):
    """What a rule needs to know about a smoothing distribution."""

    @property
    def sigma(self) -> float:
        """Its standard deviation, in `[0, 1]` pixels."""

    def radius(self, p_a: ArrayLike, p_b: ArrayLike | None = None) -> FloatArray:
        """
        The radius certified where the top class has probability `p_a` or more and every other class `p_b` or less
        (`1 - p_a` if None); 0 where these bounds prove nothing.
        """

    def probability_needed(self, radius: ArrayLike, p_b: ArrayLike | None = None) -> FloatArray:
        """The probability that the top class must exceed to be certified at `radius`; `p_b` as for `radius`."""


@dataclass(frozen=True)
class Outcomes:
    """What was proved, one element per row, as in [`Certificate`]; `predictions` is `ABSTAIN` where nothing was."""

    predictions: NDArray[np.int64]
    radii: FloatArray
    p_lower: FloatArray
    p_upper: FloatArray
    delta: float | None = None
    calibration: str | None = None

    @classmethod
    def from_bounds(
        cls, noise: NoiseDistribution, classes: NDArray[np.int64], p_lower: FloatArray, p_upper: FloatArray
    ) -> "Outcomes":
        """Claim these classes where the bounds give a radius above 0, and abstain elsewhere."""
        radii = np.asarray(noise.radius(p_lower, p_upper))
        claimed = radii > 0
        predictions = np.where(claimed, classes, ABSTAIN)
        return cls(predictions, radii, np.where(claimed, p_lower, 0.0), np.where(claimed, p_upper, 1.0))


@dataclass(frozen=True)
class CleanPass:
    """The results of one pass over clean images."""

    scores: FloatArray
    """`(images, classes)`: the base classifier's logits, or the predictions of a count head."""
    frequencies: bool = False
    """Whether the scores come from a count head: expected class frequencies under noise, of sum 1."""


class Runs(Protocol):
    """The sampling of images under a rule, one row per image. A row can be used again once its image is finished."""

    counts: Counts
    """`(rows, classes)`: the counted draws."""

    def start(self, rows: Rows, clean: CleanPass | None) -> NDArray[np.int64]:
        """Start images in these rows, given their clean pass if there was one; returns the draws that each wants."""

    def update(self, rows: Rows, counts: Counts) -> NDArray[np.int64]:
        """
        Take the class counts `(len(rows), classes)` of all draws that these rows wanted.

        Returns:
            How many draws each wants next, `(len(rows),)`; 0 when it is finished.
        """

    def is_planned(self, rows: Rows) -> NDArray[np.bool_]:
        """Whether each row wants no draws beyond those that it wants now, so that the time left is known."""

    def outcomes(self, rows: Rows, pending: Counts | None = None) -> Outcomes:
        """
        What has been proved so far.

        With `pending`, class counts `(len(rows), classes)` of a part of the draws that these rows want: what would be proved
        if these were all. This is a preview, to show progress: a part of the draws proves nothing.
        """


class Rule(Protocol):
    """Settings of a sampling rule; one out of range is a `ValueError` at construction."""

    method: ClassVar[str]
    uses_clean_pass: ClassVar[bool]
    """Whether it needs the base classifier's logits of clean images, where no count head takes their place."""
    uses_count_head: ClassVar[bool]
    uses_base_classifier: ClassVar[bool]
    """Whether it draws."""

    @property
    def guarantee(self) -> Guarantee: ...
    @property
    def alpha(self) -> float: ...
    @property
    def budget(self) -> int:
        """The most draws that one image can take."""

    def check(self, noise: NoiseDistribution) -> None:
        """Raise a `ValueError` if the rule can never claim what it is asked to."""

    def largest_radius(self, noise: NoiseDistribution) -> float:
        """The radius that it claims where all draws hit one class: no image can have a larger one."""

    def start(self, noise: NoiseDistribution, num_rows: int, num_classes: int) -> Runs:
        """Runs of up to `num_rows` images at a time, under the distribution that `noise` gives for their rows."""


def probability_in_reach(noise: NoiseDistribution, radius: float) -> float:
    """The probability that `radius` needs. Raises a `ValueError` where no probability suffices."""
    p0 = float(noise.probability_needed(radius))
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
        probability = float(np.max(noise.probability_needed(radius)))
        while np.min(noise.radius(probability)) < radius and probability < 1:
            probability = math.nextafter(probability, 1.0)
        probabilities.append(probability)
    return probabilities


def check_reach(n: int, alpha: float, noise: NoiseDistribution, radius: float) -> None:
    """Raise a `ValueError` where `n` draws can never prove `radius` by Clopper-Pearson."""
    p0 = probability_in_reach(noise, radius)
    if not radii_in_reach([radius], noise, n, alpha):
        needed = math.floor(math.log(alpha) / math.log(p0)) + 1
        raise too_few("n", n, radius, float(noise.radius(alpha ** (1 / n))), needed)


def first_true(holds: Callable[[int], bool], start: int) -> int:
    """The smallest number above `start` for which a monotone statement holds."""
    most = start + 1
    while not holds(most):
        most *= 2
    return bisect_left(range(most), True, lo=start, key=holds)


def too_few(name: str, value: int, radius: float, reachable: float, needed: int) -> ValueError:
    """The error for a setting `name` of so few draws that they can never prove `radius`."""
    return ValueError(
        f"{name}={value} draws can never certify radius {radius:g}: if all of them hit one class, they prove "
        f"{format_radius(reachable)}. Radius {radius:g} takes at least {needed:,} draws."
    )
