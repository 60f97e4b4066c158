"""Certificates, what they guarantee, and what a rule of sampling is.

A rule is a plain description (settings only). For each image it starts a run, which answers how many draws it wants
next (0: finished), takes their class counts, and in the end says what they prove. Rules see class counts and a noise
distribution; they know nothing of models.
"""

import math
from dataclasses import asdict, dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

ABSTAIN = -1
"""The prediction of a certificate that claims nothing."""

Guarantee = Literal["per_input", "marginal", "none"]
Counts = NDArray[np.int64]


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
        noise_resolution: where noise was added, and to whose pixels the radius belongs: the network's `input`, the picture
            at its `native` size, or at so many pixels a side.
        sigma: scale of the noise, in `[0, 1]` pixels.
        alpha: probability of a wrong claim.
        p_lower: lower bound of the probability of `prediction` under noise, on which the radius rests.
        p_upper: upper bound of the probability of every other class, on which it rests too.
        counts: how often each class was predicted in the counted draws.
        num_samples: forward passes spent on the image, those that only chose the class included.
        seed: seed of the noise.
        dtype: floating-point type of the forward passes.
        compiled: whether they went through `torch.compile`.
        denoiser: what was in front of the classifier and part of it, if anything.
        delta: `marginal` only: the share of images, over calibration and test images, about which the claim may be wrong
            besides alpha: of which Monte-Carlo would prove a smaller radius, or not this answer.
        calibration: `marginal` only: the images that it was calibrated on, in words.
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
    noise_resolution: str = "input"
    denoiser: str | None = None
    delta: float | None = None
    calibration: str | None = None

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


class NoiseDistribution(Protocol):
    """What a rule needs to know of a smoothing distribution."""

    @property
    def sigma(self) -> float:
        """Its standard deviation, in `[0, 1]` pixels."""
        ...

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
class Outcome:
    """
    What a run proved: a class (or `ABSTAIN`), a lower bound of its probability and an upper bound of the others'; and
    `delta` and `calibration` where it is true of most images only, as in [`Certificate`].
    """

    prediction: int
    p_lower: float
    p_upper: float
    delta: float | None = None
    calibration: str | None = None


ABSTENTION = Outcome(ABSTAIN, 0.0, 1.0)


@dataclass(frozen=True)
class CleanPass:
    """
    What one pass over the clean image said.

    Attributes:
        scores: `(classes,)`: the base classifier's logits, or what a count head predicts.
        frequencies: whether they are a count head's: expected class frequencies under noise, of sum 1.
    """

    scores: NDArray[np.float64]
    frequencies: bool = False


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
    uses_clean_pass: ClassVar[bool]

    @property
    def guarantee(self) -> Guarantee: ...

    @property
    def alpha(self) -> float: ...

    @property
    def budget(self) -> int:
        """The most draws that one image can take."""
        ...

    def check(self, noise: NoiseDistribution) -> None:
        """Raise a `ValueError` if the rule can never claim what it is asked to."""
        ...

    def start(self, noise: NoiseDistribution, clean: CleanPass) -> Run:
        """Begin an image with what its clean pass said; nothing but zeros unless `uses_clean_pass`."""
        ...


def probability_in_reach(noise: NoiseDistribution, radius: float) -> float:
    """The probability that `radius` needs, where there is one."""
    p0 = noise.probability_needed(radius)
    if p0 >= 1:
        raise ValueError(
            f"radius={radius:g} can never be certified with this noise: it takes more of it (a larger sigma)."
        )
    return p0


def too_few(name: str, value: int, radius: float, reachable: float, needed: int) -> ValueError:
    return ValueError(
        f"{name}={value} draws can never certify radius {radius:g}: all of one class, they show "
        f"{format_radius(reachable)}. Radius {radius:g} takes at least {needed:,} draws."
    )
