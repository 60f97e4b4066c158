"""Conformal calibration of a count head: how far its estimates must be shifted to be right about most images."""

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
"""Where a count head's folder has its calibration."""


@dataclass(frozen=True)
class Calibration:
    """
    Held-out images, for each of which the estimate was compared with a Monte-Carlo certificate.

    A score is by how much the predicted p_A must be lowered, as log-odds, for the radius that is then claimed not to exceed
    what Monte-Carlo proves: nothing, where that abstains or answers otherwise. It is below 0 where the prediction could be
    raised, and minus infinity where nothing that could be claimed exceeds it. Shifted by a quantile of the scores, down or
    up, the claim about a further image exceeds what Monte-Carlo proves of it with probability at most delta, over
    calibration and test images that are exchangeable (split conformal prediction). Delta is a share of all images: where
    few get a radius, of these a larger share has too large a one.

    What is claimed is the radius that follows from the shifted prediction, or, where a few radii are to be decided, the
    largest of these below it. The second takes less lowering: an estimate between two of the radii may be too large by
    the way down to the lower one. To decide a single radius, only the order matters in which the head ranks the images.

    Args:
        predicted: for each noise level, in `[0, 1]` pixels, what was predicted of the images: log-odds of p_A.
        allowed: for each level, the log-odds from which Monte-Carlo's own bound would have followed: more is too much.
            Infinity where it proves as much as its draws can show.
        n: draws of the Monte-Carlo bound, and nominal draws of the estimate.
        alpha: level of either.
        dataset: what the images are, in words: dataset, split, and which of it.
        model: the base classifier that was certified.
        conditions: what else must be as it was, such as the weights of classifier and head; by name.

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
        sizes = {sigma: len(found) for sigma, found in self.predicted.items()}
        if not sizes or not all(sizes.values()) or sizes != {sigma: len(one) for sigma, one in self.allowed.items()}:
            raise ValueError("A calibration takes one or more images at each noise level.")

    @property
    def images(self) -> dict[float, int]:
        """How many there are at each noise level."""
        return {sigma: len(found) for sigma, found in self.predicted.items()}

    @property
    def words(self) -> str:
        """What a claim rests on."""
        return f"{self.dataset}; Monte-Carlo with n = {self.n:,}"

    def shared_images(self, sigma: float, probabilities: FloatArray) -> int:
        """
        How many of some images are among those calibrated on: by what is predicted of them, which two pictures hardly share
        to the ninth digit.

        Args:
            sigma: one of the levels calibrated.
            probabilities: `(images, classes)`, predicted of them.
        """
        predicted = _log_odds(probabilities.max(1))
        same = np.abs(predicted[:, None] - self._at(sigma)[0]) < 1e-9
        return int((same.any(1) & (np.abs(predicted) < 27)).sum())  # of the sure ones no digit is left

    def scores(self, sigma: float, p_needed: Sequence[float] | None = None) -> NDArray[np.float64]:
        """
        Scores of the images, ascending.

        Args:
            sigma: one of the levels calibrated.
            p_needed: the probabilities that the radii to be decided need; `None` where each image's own is claimed.

        Raises:
            ValueError: for another level.
        """
        predicted, allowed = self._at(sigma)
        if p_needed is None:
            return np.sort(predicted - allowed)
        needed = _allowed(np.sort(p_needed), self.n, self.alpha)
        proved = (needed < allowed[:, None]).sum(1)  # of the radii; the next one is the first that is too much
        return np.sort(predicted - np.append(needed, np.inf)[proved])

    def shift(self, sigma: float, delta: float, p_needed: Sequence[float] | None = None) -> float:
        """
        By how much, in log-odds, predictions are to be lowered at this noise level; where it is below 0, raised, because
        they are too large for fewer images than a share delta. -64 claims whatever draws can show.

        Args:
            sigma: one of the levels calibrated.
            delta: share of images that may be wrong, in (0, 1).
            p_needed: as in [`scores`].

        Raises:
            ValueError: for another level, or a delta that takes more images.
        """
        scores = self.scores(sigma, p_needed)
        rank = math.ceil((len(scores) + 1) * (1 - delta) - 1e-9)
        if rank > len(scores):
            raise ValueError(
                f"delta={delta:g} takes at least {math.ceil(1 / delta - 1e-9) - 1} images to calibrate; these are "
                f"{len(scores)}."
            )
        return max(float(scores[rank - 1]), -_NO_LESS)

    def claim_rate(self, sigma: float, delta: float, p_needed: Sequence[float] | None = None) -> float:
        """The share of the images here that get a radius; arguments and errors as of [`shift`]."""
        predicted, _ = self._at(sigma)
        least = _allowed(0.5 if p_needed is None else min(p_needed), self.n, self.alpha)
        return float((predicted - least > self.shift(sigma, delta, p_needed)).mean())

    def _at(self, sigma: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        # a quantile at one level says nothing of another
        level = next((level for level in self.predicted if math.isclose(level, sigma, rel_tol=1e-6)), None)
        if level is None:
            known = ", ".join(f"{level:g}" for level in self.predicted)
            raise ValueError(
                f"sigma={sigma:g} was not calibrated, only {known} was: calibrate it, or leave delta out."
            )
        return np.array(self.predicted[level]), np.array(self.allowed[level])

    def shifted(self, probability: ArrayLike, shift: float) -> NDArray[np.float64]:
        """The estimated lower bound of p_A (see [`estimated_lower_bound`]) of predictions shifted by [`shift`]."""
        return estimated_lower_bound(special.expit(_log_odds(probability) - shift), self.n, self.alpha)

    def claimed(self, probability: ArrayLike, shift: float, p_needed: Sequence[float]) -> NDArray[np.int64]:
        """How many of some radii, which need these probabilities, are claimed of predictions shifted by [`shift`]."""
        return (_log_odds(probability)[..., None] - _allowed(p_needed, self.n, self.alpha) > shift).sum(-1)

    def check(self, conditions: Mapping[str, str | None]) -> None:
        """
        Raise a `ValueError` unless everything is as it was when the head was calibrated.

        Args:
            conditions: as they are now.
        """
        changed = [name for name, value in self.conditions.items() if conditions.get(name) != value]
        if changed:
            raise ValueError(
                f"The count head was calibrated under another {', '.join(changed)} (with {self.model}): what it says is no "
                "claim here. Calibrate it anew, or leave delta out."
            )

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        # JSON knows no infinity
        columns = {
            name: {repr(sigma): [None if one == math.inf else one for one in found] for sigma, found in column.items()}
            for name, column in (("predicted", self.predicted), ("allowed", self.allowed))
        }
        path.write_text(json.dumps({**asdict(self), **columns}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """
        Read what [`save`] wrote.

        Raises:
            OSError: where there is no such file.
            ValueError: for a file that holds something else.
        """
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            for name in ("predicted", "allowed"):
                found[name] = {
                    float(sigma): tuple(math.inf if one is None else float(one) for one in values)
                    for sigma, values in found[name].items()
                }
            return cls(**found)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:  # or one of an earlier version
            raise ValueError(f"{path} holds no calibration: hf-smoothing calibrate makes one.") from error


def estimated_lower_bound(probability: ArrayLike, n: int, alpha: float) -> NDArray[np.float64]:
    """
    What Clopper-Pearson would say if `n` draws had hit as often as predicted, `n * probability` times. It bounds nothing,
    since nothing was drawn.

    The paper rounds to whole hits; here the bound is continued between them. With few draws it matters: no p below 1 would
    round down to `n` hits, and the largest radii, which take nothing less, could never be estimated.

    Source: Accelerated Smoothing (arXiv 2402.07498), section 4.
    """
    hits = n * np.asarray(probability, np.float64)
    return np.asarray(special.betaincinv(np.maximum(hits, 1e-9), np.maximum(n - hits, 0.0) + 1, alpha), np.float64)


def compared(
    probabilities: FloatArray,
    predictions: NDArray[np.int64],
    p_lower: NDArray[np.float64],
    n: int,
    alpha: float,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """
    Estimates beside Monte-Carlo certificates of the same images.

    Args:
        probabilities: `(images, classes)`, predicted.
        predictions: `(images,)`, class of the Monte-Carlo certificate; -1 where it abstains.
        p_lower: `(images,)`, its lower bound of p_A.
        n: draws.
        alpha: level.

    Returns:
        What is `predicted` and what is `allowed` of each image, see [`Calibration`].
    """
    proved = np.where(probabilities.argmax(1) == predictions, np.maximum(p_lower, 0.5), 0.5)
    return tuple(_log_odds(probabilities.max(1)).tolist()), tuple(_allowed(proved, n, alpha).tolist())


def _allowed(p_lower: ArrayLike, n: int, alpha: float) -> NDArray[np.float64]:
    """Log-odds of the prediction from which [`estimated_lower_bound`] makes `p_lower`; infinity where it takes all draws."""
    hits = special.bdtrik(1 - alpha, n, np.asarray(p_lower, np.float64)) + 1
    return np.where(hits <= n - 1e-6, special.logit(np.minimum(hits / n, 1.0)), np.inf)  # no hits do for a p above 1


_NO_LESS = 64.0
"""As good as infinity, and JSON can hold it: more than lies between 1e-12, see [`_log_odds`], and a miss in 1e15 draws."""


def _log_odds(probability: ArrayLike) -> NDArray[np.float64]:
    # of 1 they would be infinite, however much they are lowered
    return np.asarray(special.logit(np.clip(probability, 1e-12, 1 - 1e-12)), np.float64)
