"""Certificates and what they guarantee."""

import math
from dataclasses import asdict, dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import Any, Literal

ABSTAIN = -1
"""The prediction of a certificate that claims nothing."""

Guarantee = Literal["per_input", "marginal", "selected", "none"]

_NORM_EXPONENTS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


@dataclass(frozen=True)
class LevelChoice:
    """
    How one classifier of two noise levels (`sigma="auto"`) answered, and what that rests on; the proof is in `agreement.py`.
    Pairs have a value for the primary level and one for the fallback level.

    Attributes:
        levels: standard deviations of the noise. `sigma` of the certificate is the one in use.
        agreement: the share of the noisy copies at the primary level that must agree for their answer to count.
        p_lower, p_upper: bounds of the probability of the most probable class at the primary level; 0 and 1 where nothing
            was proved, or needed.
        radius: within it, all pictures have the level in use; 0 where this is not proved.
        predictions, radii: of the certificates at the two levels; `ABSTAIN` and 0 where there is none.
        alphas: probabilities that the certificate at the primary level, that at the fallback level, or `p_upper` is wrong.
            They add up to the certificate's alpha.
        num_samples: forward passes for each of the three.
    """

    levels: tuple[float, float]
    agreement: float
    p_lower: float
    p_upper: float
    radius: float
    predictions: tuple[int, int]
    radii: tuple[float, float]
    alphas: tuple[float, float, float]
    num_samples: tuple[int, int, int]


@dataclass(frozen=True)
class Certificate:
    """
    What was proved about one image.

    Attributes:
        prediction: class index of the smoothed classifier, or `ABSTAIN` (-1).
        radius: no change of the image smaller than this changes the prediction. Measured in the norm `norm` of `[0, 1]`
            pixels at the resolution at which the noise was added. Full precision; 0 on abstention.
        guarantee: `per_input`: the claim is wrong with probability at most alpha over the draws, whatever the model.
            `marginal`: over exchangeable calibration and test images, see `delta`. `selected`: the same, but about the share
            of wrong claims, see `false_claims`. `none`: an estimate.
        method, noise, norm: names of the rule that decided, of the smoothing distribution, and of the norm of the radius.
        sampling: `lattice`: noisy copies lie on a lattice, which tells the base classifier nothing of the picture's bits.
        sigma: standard deviation of the noise, in `[0, 1]` pixels.
        alpha: probability of a wrong claim.
        p_lower, p_upper: what the radius rests on: a lower bound of the probability of `prediction` under noise, and an
            upper bound of that of every other class. `sequential` proves a relation between the two in place of two
            bounds; they are a pair that gives the radius that was decided.
        counts: how often each class was predicted in the counted draws.
        num_samples: forward passes spent on the image, selection draws included.
        seed: seed of the noise; alpha is a probability over a seed that is chosen after model and image.
        dtype, compiled: type of the forward passes, and whether they went through `torch.compile`.
        noise_resolution: where noise was added, and so the pixels that the radius is about: the network's `input`, the
            picture at its `native` size, or a number of pixels a side.
        dimensions: number of pixel values (channels x height x width) that got noise, which [`radius_in`] needs; None in
            old records.
        denoiser: the denoiser in front of the classifier, if any; it is part of what is certified.
        delta: `marginal` only: the share of images, over calibration and test images, about which the claim may be wrong
            besides alpha: Monte-Carlo would prove a smaller radius or another prediction.
        calibration: `marginal` and `selected` only: the images used for calibration, in words.
        false_claims: `selected` only: the largest expected share of wrong claims among those at a radius, over the images of
            one call or run: Monte-Carlo would not prove this radius for the prediction.
        level_choice: only with `sigma="auto"`: how the level was chosen. `sigma`, `counts`, `p_lower`, `p_upper` are those
            of the level that is proved to be in use, else of the fallback level; `num_samples` counts all passes.
    """

    prediction: int
    radius: float
    guarantee: Guarantee
    method: str
    noise: str
    norm: str
    sampling: Literal["lattice"]
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
    dimensions: int | None = None
    denoiser: str | None = None
    delta: float | None = None
    calibration: str | None = None
    false_claims: float | None = None
    level_choice: LevelChoice | None = None

    @property
    def abstains(self) -> bool:
        return self.prediction == ABSTAIN

    def radius_in(self, norm: str) -> float:
        """
        The radius that this certificate implies in another norm, full precision: no change of the image with a smaller
        `norm` changes the prediction.

        In d dimensions `||x||_p <= max(1, d^(1/p - 1/q)) ||x||_q`, with equality for a change of one pixel value or of all
        by the same size. So the l_p radius divided by this factor is the largest l_q radius that follows: an l2 radius r
        implies r in l1 and r / sqrt(d) in linf; an l1 radius r implies r / sqrt(d) in l2 and r / d in linf. At 3x32x32 an
        l2 radius is 55 times the linf radius that it implies: l2 smoothing is a weak defence against linf attacks.

        Args:
            norm: `"l1"`, `"l2"` or `"linf"`, of `[0, 1]` pixels at the resolution at which the noise was added.

        Raises:
            ValueError: for another norm, or where the factor depends on `dimensions` and they are unknown.
        """
        if norm not in _NORM_EXPONENTS:
            raise ValueError(f"norm={norm!r} is unknown; choose from {', '.join(_NORM_EXPONENTS)}.")
        exponent = 1 / _NORM_EXPONENTS[self.norm] - 1 / _NORM_EXPONENTS[norm]
        if exponent <= 0 or self.radius == 0:
            return self.radius
        if self.dimensions is None:
            raise ValueError(
                f"The {norm} radius depends on the number of pixel values, and this certificate does not have it "
                "(dimensions=None): set it with dataclasses.replace(certificate, dimensions=channels * height * width)."
            )
        return self.radius / self.dimensions**exponent

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, ready for JSON."""
        return {**asdict(self), "counts": list(self.counts)}


def format_radius(radius: float, digits: int = 3) -> str:
    """
    Text of a radius, rounded *down*: only a proved radius is shown.

    >>> format_radius(0.24999), format_radius(0.5)
    ('0.249', '0.500')
    """
    if not math.isfinite(radius):
        return str(radius)
    return str(Decimal(radius).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR))
