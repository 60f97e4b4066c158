"""Conformal calibration of a count head: how far its estimates must be shifted to hold for most images."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from .bounds import FloatArray

CALIBRATION_FILE = "calibration.json"
"""Name of the calibration in the folder of a count head."""


@dataclass(frozen=True)
class Calibration:
    """
    Estimates of held-out images beside their Monte-Carlo certificates.

    The score of an image says how far the predicted p_A must be lowered, in log-odds, until the claimed radius does not
    exceed what Monte-Carlo proves (nothing, where it abstains or predicts another class). It is below 0 where the prediction
    may be raised, and minus infinity where no possible claim exceeds the proof. Predictions are shifted by a quantile of the
    scores. Then the claim about a new image exceeds what Monte-Carlo proves with probability at most delta, over
    exchangeable calibration and test images (split conformal prediction). Delta is a share of all images: where few images
    get a radius, a larger share of those is too large.

    The claim is the radius of the shifted prediction. To decide a few radii, it is the largest of them that the shifted
    prediction reaches, which needs less lowering: an estimate between two radii claims only the lower one.

    Args:
        predicted: for each noise level, in `[0, 1]` pixels, the predicted log-odds of p_A of the images.
        allowed: for each level, the log-odds that give exactly the Monte-Carlo bound: a larger prediction is too large.
            Infinity where Monte-Carlo proves as much as its draws can.
        n: draws of the Monte-Carlo bound, and the draws that the estimate stands for.
        alpha: level of both.
        dataset: the images in words: dataset, split, and selection.
        model: the base classifier that was certified.
        conditions: what must not change, by name, such as the weights of classifier and head.

    Raises:
        ValueError: for no images, or levels at which not every prediction has its bound.

    Source: split conformal prediction, Vovk et al. 2005; Lei et al. 2018 (arXiv 1604.04173), theorem 2.2.
    """

    predicted: Mapping[float, tuple[float, ...]]
    allowed: Mapping[float, tuple[float, ...]]
    n: int
    alpha: float
    dataset: str
    model: str
    conditions: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = self.images
        if not sizes or not all(sizes.values()) or sizes != {sigma: len(row) for sigma, row in self.allowed.items()}:
            raise ValueError("A calibration needs one or more images at each noise level.")

    @property
    def images(self) -> dict[float, int]:
        """The number of images at each noise level."""
        return {sigma: len(row) for sigma, row in self.predicted.items()}

    @property
    def description(self) -> str:
        """What a claim rests on, in words."""
        return f"{self.dataset}; Monte-Carlo with n = {self.n:,}"

    def count_shared_images(self, sigma: float, probabilities: FloatArray) -> int:
        """How many rows of predictions `(images, classes)` are, to the ninth digit, those of calibration images."""
        predicted = _log_odds(probabilities.max(1))
        same = np.abs(predicted[:, None] - self.at(sigma)[0]) < 1e-9
        return int((same.any(1) & (np.abs(predicted) < 27)).sum())  # near 0 and 1 no digits are left

    def scores(self, sigma: float, p_needed: Sequence[float] | None = None) -> NDArray[np.float64]:
        """
        Scores of the images, ascending.

        Args:
            sigma: a calibrated noise level; another one is a `ValueError`.
            p_needed: the probabilities that the radii to decide need; `None` to claim each image's own radius.
        """
        predicted, allowed = self.at(sigma)
        if p_needed is None:
            return np.sort(predicted - allowed)
        needed = _allowed(np.sort(p_needed), self.n, self.alpha)
        proved = self.proves(sigma, np.sort(p_needed)).sum(1)  # the next radius is the first that is too large
        return np.sort(predicted - np.append(needed, np.inf)[proved])

    def proves(self, sigma: float, p_needed: ArrayLike) -> NDArray[np.bool_]:
        """Whether Monte-Carlo proves the radii that need these probabilities, for the predicted class: `(images, radii)`."""
        return _allowed(p_needed, self.n, self.alpha) < self.at(sigma)[1][:, None]

    def shift(self, sigma: float, delta: float, p_needed: Sequence[float] | None = None) -> float:
        """
        How far predictions are lowered at this noise level, in log-odds. Below 0 they are raised: they are too large for a
        smaller share of images than delta. -64 claims whatever draws can prove. `sigma` and `p_needed` as in [`scores`].

        Raises:
            ValueError: for a level that was not calibrated, or a delta that needs more images.
        """
        scores = self.scores(sigma, p_needed)
        rank = math.ceil((len(scores) + 1) * (1 - delta) - 1e-9)
        if rank > len(scores):
            raise ValueError(
                f"delta={delta:g} takes at least {math.ceil(1 / delta - 1e-9) - 1} images to calibrate; these are "
                f"{len(scores)}."
            )
        return max(float(scores[rank - 1]), -_LARGEST_SHIFT)

    def claim_rate(self, sigma: float, delta: float, p_needed: Sequence[float] | None = None) -> float:
        """The share of the calibration images that get a radius; arguments and errors as in [`shift`]."""
        predicted, _ = self.at(sigma)
        least = _allowed(0.5 if p_needed is None else min(p_needed), self.n, self.alpha)
        return float((predicted - least > self.shift(sigma, delta, p_needed)).mean())

    def at(self, sigma: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`predicted` and `allowed` of one noise level; another level than the calibrated ones is a `ValueError`."""
        # a quantile at one level says nothing about another
        level = next((level for level in self.predicted if math.isclose(level, sigma, rel_tol=1e-6)), None)
        if level is None:
            known = ", ".join(f"{level:g}" for level in self.predicted)
            raise ValueError(f"sigma={sigma:g} was not calibrated, only {known} was: calibrate it or omit delta.")
        return np.array(self.predicted[level]), np.array(self.allowed[level])

    def shifted_lower_bound(self, probability: ArrayLike, shift: float) -> NDArray[np.float64]:
        """The estimated lower bound of p_A (see [`estimate_lower_bound`]) for predictions shifted by [`shift`]."""
        return estimate_lower_bound(special.expit(_log_odds(probability) - shift), self.n, self.alpha)

    def count_claimed_radii(
        self, probability: ArrayLike, shift: float, p_needed: Sequence[float]
    ) -> NDArray[np.int64]:
        """How many of the radii that need these probabilities are claimed for predictions shifted by [`shift`]."""
        return (_log_odds(probability)[..., None] - _allowed(p_needed, self.n, self.alpha) > shift).sum(-1)

    def check(self, conditions: Mapping[str, str | None]) -> None:
        """Raise a `ValueError` if these conditions differ from those under which the head was calibrated."""
        changed = [name for name, value in self.conditions.items() if conditions.get(name) != value]
        if changed:
            raise ValueError(
                f"The count head was calibrated under another {', '.join(changed)} (with {self.model}): its claims do not "
                "hold here. Calibrate it again, or leave delta out."
            )

    def save(self, path: Path) -> None:
        """Write it as JSON, which has no infinity."""
        content = asdict(self)
        for name in ("predicted", "allowed"):
            content[name] = {
                sigma: [None if value == math.inf else value for value in row] for sigma, row in content[name].items()
            }
        path.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read a file written by [`save`]. Raises a `ValueError` for a file that holds something else."""
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            for name in ("predicted", "allowed"):
                content[name] = {
                    float(sigma): tuple(math.inf if value is None else float(value) for value in row)
                    for sigma, row in content[name].items()
                }
            return cls(**content)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:  # also for an earlier version
            raise ValueError(f"{path} holds no calibration: hf-smoothing calibrate makes one.") from error


def estimate_lower_bound(probability: ArrayLike, n: int, alpha: float) -> NDArray[np.float64]:
    """
    Estimate the Clopper-Pearson bound of `n` draws with `n * probability` hits. It bounds nothing, since nothing was drawn.

    The paper rounds hits down to integers. Here the bound is continuous between them: no p below 1 would round down to `n`
    hits, so the largest radii could never be estimated.

    Source: Accelerated Smoothing (arXiv 2402.07498), section 4.
    """
    hits = n * np.asarray(probability, np.float64)
    return np.asarray(special.betaincinv(np.maximum(hits, 1e-9), np.maximum(n - hits, 0.0) + 1, alpha), np.float64)


def compare_estimates(
    probabilities: FloatArray, predictions: NDArray[np.int64], p_lower: NDArray[np.float64], n: int, alpha: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """
    Compare estimates with Monte-Carlo certificates of the same images.

    Args:
        probabilities: `(images, classes)`, the predictions of the count head.
        predictions: `(images,)`, class of the Monte-Carlo certificate; -1 where it abstains.
        p_lower: `(images,)`, lower bound of p_A of the Monte-Carlo certificate.
        n: draws.
        alpha: level.

    Returns:
        `predicted` and `allowed` log-odds of each image, see [`Calibration`].
    """
    proved = np.where(probabilities.argmax(1) == predictions, np.maximum(p_lower, 0.5), 0.5)
    return tuple(_log_odds(probabilities.max(1)).tolist()), tuple(_allowed(proved, n, alpha).tolist())


def _allowed(p_lower: ArrayLike, n: int, alpha: float) -> NDArray[np.float64]:
    """Log-odds of the prediction for which [`estimate_lower_bound`] is `p_lower`; infinity where it takes all draws."""
    hits = special.bdtrik(1 - alpha, n, np.asarray(p_lower, np.float64)) + 1
    return np.where(hits <= n - 1e-6, special.logit(np.minimum(hits / n, 1.0)), np.inf)


_LARGEST_SHIFT = 64.0
"""Stands for infinity, which JSON lacks: exceeds the log-odds between 1e-12, see [`_log_odds`], and a miss in 1e15 draws."""


def _log_odds(probability: ArrayLike) -> NDArray[np.float64]:
    # those of 1 would stay infinite however far they are lowered
    return np.asarray(special.logit(np.clip(probability, 1e-12, 1 - 1e-12)), np.float64)
