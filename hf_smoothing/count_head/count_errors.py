"""How far a count head's estimates are off, over all images: those it gets wrong are in every figure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..core.bounds import FloatArray, clopper_pearson_lower
from ..core.calibration import Calibration, compared, estimated_lower_bound
from ..core.certificates import ABSTAIN
from ..core.noise import GaussianNoise
from ..core.sampling_rule import probabilities_showing


@dataclass(frozen=True)
class Comparison:
    """
    Estimates beside the Monte-Carlo certificates of the same images, at one noise level.

    Attributes:
        sigma: the noise level, in `[0, 1]` pixels.
        probabilities: `(images, classes)`, predicted.
        counts: `(images, classes)`, measured with `n` draws each.
        predictions: `(images,)`, class of the Monte-Carlo certificate; -1 where it abstains.
        p_lower: `(images,)`, its lower bound of p_A.
        labels: `(images,)`, true classes.
        alpha: level of the certificates.
    """

    sigma: float
    probabilities: FloatArray
    counts: NDArray[np.int64]
    predictions: NDArray[np.int64]
    p_lower: FloatArray
    labels: NDArray[np.int64]
    alpha: float

    @property
    def n(self) -> int:
        return int(self.counts[0].sum())

    @property
    def top(self) -> NDArray[np.int64]:
        """The class predicted to be the most frequent one."""
        return self.probabilities.argmax(1)

    def radii(self, p_lower: FloatArray) -> FloatArray:
        """Radii from lower bounds of p_A; 0 where they show nothing."""
        noise = GaussianNoise(self.sigma)
        return np.array([noise.radius(float(p)) for p in p_lower])

    @property
    def estimated(self) -> FloatArray:
        return self.radii(estimated_lower_bound(self.probabilities.max(1), self.n, self.alpha))

    @property
    def measured(self) -> FloatArray:
        return np.where(self.predictions == ABSTAIN, 0.0, self.radii(self.p_lower))

    def rows(self, chosen: NDArray[np.int64]) -> "Comparison":
        """Some of the images."""
        columns = ("probabilities", "counts", "predictions", "p_lower", "labels")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})

    def compared(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of [`calibration.compared`]."""
        return compared(self.probabilities, self.predictions, self.p_lower, self.n, self.alpha)


def errors(one: Comparison, radii: Sequence[float], bins: int = 10) -> dict[str, Any]:
    """
    Disagreement, over- and underestimation, the calibration of the predicted p_A, and what both certify.

    An estimate is too large where it exceeds the radius that Monte-Carlo proves for the *same* class; where Monte-Carlo
    abstains or answers otherwise, that radius is 0. It is too small where it claims less than Monte-Carlo does, of whatever
    class, and is not too large.

    Args:
        one: estimates and certificates.
        radii: to count at.
        bins: of the calibration curve, equally many images in each.
    """
    estimated = one.estimated
    same = one.top == one.predictions
    proved = np.where(same, one.measured, 0.0)
    error = estimated - proved
    over = error > 0
    # where the head names another class, what Monte-Carlo proves is missed too, unless the head claims more than nothing
    error = np.where(~over & ~same, estimated - one.measured, error)
    under = error < 0
    share = np.take_along_axis(one.counts, one.top[:, None], 1)[:, 0] / one.n
    predicted = one.probabilities.max(1)
    edges = [-np.inf, 0.0, *(radius for radius in radii if radius > 0), np.inf]
    return {
        "sigma": one.sigma,
        "images": len(error),
        "n": one.n,
        "disagreement": float((one.top != one.counts.argmax(1)).mean()),
        "overestimated": float(over.mean()),
        "mean_excess": _mean(error[over]),
        "underestimated": float(under.mean()),
        "mean_shortfall": _mean(-error[under]),
        "by_radius": [
            {
                "above": None if np.isinf(low) else low,
                "up_to": None if np.isinf(high) else high,
                "images": int(inside.sum()),
                "overestimated": _mean(over[inside]),
                "mean_error": _mean(error[inside]),
            }
            for low, high in pairwise(edges)
            if (inside := (one.measured > low) & (one.measured <= high)).any()
        ],
        "accuracy": {
            "monte_carlo": _accuracy(one.predictions == one.labels, one.measured, radii),
            "estimate": _accuracy((one.top == one.labels) & (estimated > 0), estimated, radii),
        },
        "calibration_curve": [
            {"predicted": float(predicted[rows].mean()), "measured": float(share[rows].mean()), "images": len(rows)}
            for rows in np.array_split(np.argsort(predicted, kind="stable"), bins)
            if len(rows)
        ],
    }


def expected_at(one: Comparison, n: int, radii: Sequence[float]) -> dict[str, Any]:
    """
    What Monte-Carlo with another number of draws can be expected to certify, from the draws that there are, and what the
    estimate claims at that number. Nothing of it was measured at `n`.

    Args:
        one: estimates and certificates.
        n: draws.
        radii: to count at.

    Returns:
        `n`; `monte_carlo`, the expected accuracy at the radii (Jeffreys' posterior of the true class's probability) with
        `deviation`, the standard deviation of what nobody knows; and `estimate`, the accuracy of the estimate.
    """
    noise = GaussianNoise(one.sigma)
    hits = one.counts[np.arange(len(one.labels)), one.labels]
    shown = clopper_pearson_lower(np.arange(n + 1), n, one.alpha)
    expected = []
    for radius in radii:
        p0 = noise.probability_needed(radius)
        enough = np.searchsorted(shown, p0, side="left" if radius > 0 else "right")
        chances = np.asarray(stats.betabinom.sf(enough - 1, n, hits + 0.5, one.n - hits + 0.5), np.float64)
        deviation = float(np.sqrt((chances * (1 - chances)).sum()) / len(chances))
        expected.append({"radius": radius, "share": float(chances.mean()), "deviation": deviation})
    estimated = one.radii(estimated_lower_bound(one.probabilities.max(1), n, one.alpha))
    accuracy = _accuracy((one.top == one.labels) & (estimated > 0), estimated, radii)
    return {"n": n, "monte_carlo": expected, "estimate": accuracy}


def random_splits(
    one: Comparison,
    delta: float,
    radii: Sequence[float],
    splits: int = 200,
    seed: int = 0,
    *,
    decided: Sequence[float] | None = None,
) -> dict[str, Any]:
    """
    Calibrate on a random half of the images, judge on the other; again and again.

    Args:
        one: estimates and certificates.
        delta: share of images about which the claim may be wrong.
        radii: to count at.
        splits: how many.
        seed: of the halves.
        decided: as in [`judged`].

    Returns:
        Of [`judged`], over all splits; and `binomial_error`, the standard error that a miss rate of delta has in one half of
        so many images.
    """
    generator = np.random.default_rng(seed)
    images = len(one.labels)
    found = []
    for _ in range(splits):
        order = generator.permutation(images)
        half, rest = one.rows(order[: images // 2]), one.rows(order[images // 2 :])
        predicted, allowed = half.compared()
        calibration = Calibration({one.sigma: predicted}, {one.sigma: allowed}, one.n, one.alpha, "a random half", "")
        found.append(judged(rest, calibration, delta, radii, decided=decided))

    def mean(name: str) -> list[dict[str, float]]:
        shares = np.mean([[share["share"] for share in split[name]] for split in found], axis=0)
        return [{"radius": radius, "share": float(share)} for radius, share in zip(radii, shares)]

    return {
        "delta": delta,
        "decided": _listed(decided),
        "splits": splits,
        "miss_rate": float(np.mean([split["miss_rate"] for split in found])),
        "claim_rate": float(np.mean([split["claim_rate"] for split in found])),
        "binomial_error": float(np.sqrt(delta * (1 - delta) / (images - images // 2))),
        "accuracy": mean("accuracy"),
        "proved_accuracy": mean("proved_accuracy"),
    }


def judged(
    one: Comparison,
    calibration: Calibration,
    delta: float,
    radii: Sequence[float],
    *,
    decided: Sequence[float] | None = None,
) -> dict[str, Any]:
    """
    What becomes of the estimates once a calibration has shifted them.

    Args:
        one: estimates and certificates, of images that it was not made with.
        calibration: of the same noise level, draws and alpha.
        delta: share of images about which the claim may be wrong.
        radii: to count at.
        decided: the radii that are claimed, the largest that can be of each image; `None` claims each image's own radius.

    Returns:
        `miss_rate`, the share of images of which more is claimed than Monte-Carlo proves; `claim_rate`, the share of which
        anything is; `accuracy` at the radii, as claimed; and `proved_accuracy`, the part of it that Monte-Carlo proves too.

    Raises:
        ValueError: see [`Calibration.shift`].
    """
    tops = one.probabilities.max(1)
    if decided is None:
        claimed = one.radii(calibration.shifted(tops, calibration.shift(one.sigma, delta)))
        answered = claimed > 0
    else:
        needed = probabilities_showing(decided, GaussianNoise(one.sigma))
        number = calibration.claimed(tops, calibration.shift(one.sigma, delta, needed), needed)
        claimed, answered = np.append(0.0, sorted(decided))[number], number > 0
    # an answer with a radius of 0 claims no more than that Monte-Carlo gives it
    holds = np.where(one.top == one.predictions, claimed <= one.measured, ~answered)
    return {
        "delta": delta,
        "decided": _listed(decided),
        "miss_rate": float((~holds).mean()),
        "claim_rate": float(answered.mean()),
        "accuracy": _accuracy((one.top == one.labels) & answered, claimed, radii),
        "proved_accuracy": _accuracy(
            (one.top == one.labels) & answered & (one.top == one.predictions), np.minimum(claimed, one.measured), radii
        ),
    }


def _listed(radii: Sequence[float] | None) -> list[float] | None:
    return None if radii is None else list(radii)


def _accuracy(right: NDArray[np.bool_], found: FloatArray, radii: Sequence[float]) -> list[dict[str, float]]:
    return [{"radius": radius, "share": float((right & (found >= radius)).mean())} for radius in radii]


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None
