"""Conformal calibration of a count head: how far its estimates must be lowered to be right about most images."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

CALIBRATION_FILE = "calibration.json"
"""Where a count head's folder has its calibration."""


@dataclass(frozen=True)
class Calibration:
    """
    Held-out images, for each of which the estimate was compared with a Monte-Carlo certificate.

    A score is by how much the predicted p_A must be lowered, as log-odds, for the estimate that follows from it not to
    exceed the Monte-Carlo lower bound: where Monte-Carlo abstains or answers otherwise, not to exceed 1/2; where the
    estimate claims nothing, or Monte-Carlo as much as its draws can show, minus infinity. Lowered by a quantile of the
    scores, the estimate of a further image exceeds its own Monte-Carlo bound with probability at most delta, over
    calibration and test images that are exchangeable (split conformal prediction).

    Args:
        scores: for each noise level, in `[0, 1]` pixels, the scores of the images.
        n: draws of the Monte-Carlo bound, and nominal draws of the estimate.
        alpha: level of either.
        dataset: what the images are, in words: dataset, split, and which of it.
        model: the base classifier that was certified.
        conditions: what else must be as it was, such as the weights of classifier and head; by name.

    Raises:
        ValueError: for no scores.

    Source: split conformal prediction, Vovk et al. 2005; Lei et al. 2018 (arXiv 1604.04173), theorem 2.2.
    """

    scores: Mapping[float, tuple[float, ...]]
    n: int
    alpha: float
    dataset: str
    model: str
    conditions: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scores or not all(self.scores.values()):
            raise ValueError("A calibration takes scores of one or more images at each noise level.")

    def shift(self, sigma: float, delta: float) -> float:
        """
        By how much, in log-odds, predictions are to be lowered at this noise level.

        Args:
            sigma: one of the levels calibrated.
            delta: share of images that may be wrong, in (0, 1).

        Raises:
            ValueError: for another level, or a delta that takes more images.
        """
        # a quantile at one level says nothing of another
        scores = next(
            (found for level, found in self.scores.items() if math.isclose(level, sigma, rel_tol=1e-6)), None
        )
        if scores is None:
            known = ", ".join(f"{level:g}" for level in self.scores)
            raise ValueError(
                f"sigma={sigma:g} was not calibrated, only {known} was: calibrate it, or leave delta out."
            )
        rank = math.ceil((len(scores) + 1) * (1 - delta) - 1e-9)
        if rank > len(scores):
            raise ValueError(
                f"delta={delta:g} takes at least {math.ceil(1 / delta - 1e-9) - 1} images to calibrate; these are "
                f"{len(scores)}."
            )
        return max(0.0, sorted(scores)[rank - 1])  # it is not raised: the estimate is the most that is ever claimed

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

    def lowered(self, probability: float, sigma: float, delta: float) -> float:
        """The estimated lower bound of p_A (see [`estimated_lower_bound`]) once its prediction is lowered by [`shift`]."""
        lower = special.expit(_log_odds(probability) - self.shift(sigma, delta))
        return float(estimated_lower_bound(lower, self.n, self.alpha))

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        # JSON knows no infinity
        scores = {
            repr(sigma): [None if one == -math.inf else one for one in found] for sigma, found in self.scores.items()
        }
        path.write_text(json.dumps({**asdict(self), "scores": scores}, indent=1) + "\n")

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
            scores = {
                float(sigma): tuple(-math.inf if one is None else one for one in values)
                for sigma, values in found.pop("scores").items()
            }
            return cls(scores, **found)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
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


def conformal_scores(
    probabilities: NDArray[np.float64],
    predictions: NDArray[np.int64],
    p_lower: NDArray[np.float64],
    n: int,
    alpha: float,
) -> NDArray[np.float64]:
    """
    Scores of images, see [`Calibration`].

    Args:
        probabilities: `(images, classes)`, predicted.
        predictions: `(images,)`, class of the Monte-Carlo certificate; -1 where it abstains.
        p_lower: `(images,)`, its lower bound of p_A.
        n: draws.
        alpha: level.

    Returns:
        `(images,)`.
    """
    top = probabilities.max(1)
    proved = np.where(probabilities.argmax(1) == predictions, np.maximum(p_lower, 0.5), 0.5)
    hits = special.bdtrik(1 - alpha, n, proved) + 1  # with as many hits Clopper-Pearson says what was proved
    allowed = np.where(hits > n - 1e-6, np.inf, special.logit(np.minimum(hits / n, 1.0)))
    return np.where(estimated_lower_bound(top, n, alpha) > 0.5, _log_odds(top) - allowed, -np.inf)


def _log_odds(probability: ArrayLike) -> NDArray[np.float64]:
    # of 1 they would be infinite, however much they are lowered
    return np.asarray(special.logit(np.clip(probability, 1e-12, 1 - 1e-12)), np.float64)
