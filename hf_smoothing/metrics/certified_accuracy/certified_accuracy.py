"""Certified accuracy of a smoothed classifier: the only place in the package that computes it.

`evaluate.load` copies this file and its neighbours, and reads imports line by line: one per line, none of `hf_smoothing`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

from .shares import exact_interval, most_wrong_certificates, share_of_sample, unanimous

ABSTAIN = -1
GUARANTEES = ("per_input", "marginal", "selected", "none")
DEFAULT_THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 1.0)

Column = Iterable[Any]
"""A list, array or tensor on the CPU with one value per image."""


@dataclass(frozen=True)
class _Columns:
    """Checked input, one value per image."""

    right: NDArray[np.bool_]
    abstains: NDArray[np.bool_]
    failed: NDArray[np.bool_]
    radii: NDArray[np.float64]
    guarantee: str | None
    alpha: float | None
    p_lower: NDArray[np.float64] | None
    num_samples: NDArray[np.float64]
    """Only of images that did not fail, where known."""
    unanimous: NDArray[np.bool_]
    """Whether all counted draws gave the prediction; False where unknown."""
    estimates: "_Columns | None" = None
    """The estimates for all images, where only some were certified."""
    sampled: NDArray[np.bool_] | None = None
    """Which of all images were certified, where there are estimates."""


def certified_accuracy(
    predictions: Column,
    references: Column,
    radii: Column,
    thresholds: Iterable[float] = DEFAULT_THRESHOLDS,
    guarantees: Column | None = None,
    p_lower: Column | None = None,
    num_samples: Column | None = None,
    alphas: Column | None = None,
    num_results: int = 1,
    estimated_predictions: Column | None = None,
    estimated_radii: Column | None = None,
    sampled: Column | None = None,
    reach: float | None = None,
    counts: Column | None = None,
) -> dict[str, Any]:
    """
    Share of *all* images whose prediction is right and certified at each radius or beyond (Cohen et al., arXiv 1902.02918).

    Abstentions and images that failed count as wrong. Intervals are exact (Clopper-Pearson), 95 %, each for itself.
    `net_of_alpha` deducts wrong certificates from each share, see [`most_wrong_certificates`].

    Args:
        predictions: class indices; -1 where the classifier abstains, None where the image failed.
        references: the true classes, 0 or above.
        radii: certified radii, 0 or above and at full precision (float64); 0 on abstention, None where the image failed.
        thresholds: radii at which to count, 0 or above. Radius 0 counts every right prediction that does not abstain.
        guarantees: `per_input`, `marginal`, `selected` or `none` for each image, None where unknown. Different ones are
            refused: they do not make one figure. With `none` the figures are estimates, not certified.
        p_lower: lower bounds, in [0, 1], of the probability of the predicted class under noise.
        num_samples: forward passes spent on each image, 0 or above; None where unknown.
        alphas: largest probability that the certificate of each image is wrong, above 0 and below 1; None where unknown.
            Different ones are refused, as different guarantees are.
        num_results: how many results the bounds net of alpha must hold for together, such as the rows of a table.
        estimated_predictions: a count head's estimates for all images. With them, certificates of a few images tell the
            certified accuracy of all, see [`share_of_sample`].
        estimated_radii: the estimates of the radii.
        sampled: with estimates, whether each image was certified. These images must have been drawn at random, without
            regard to their estimates. Where it is False, the columns of certificates may hold None.
        reach: the largest radius that the draws can prove, where it is known (`rule.largest_radius(noise)` tells it). Beyond
            it nothing is measured: no image can have such a radius, however robust the classifier is.
        counts: the class counts of the counted draws of each image, None where unknown. Where all draws gave the prediction,
            the radius is the largest that so few draws prove, and more draws would prove a larger one. So a share at a
            larger radius than that of such an image is a lower bound only.

    Returns:
        A dict ready for JSON; without estimates, `num_sampled` is `num_images` and `estimated_share` is None:

        - `num_images`, `num_sampled`, `num_failed`;
        - `certified_accuracy`: for each threshold `radius`, `right` (images), `share`, `interval_95` (low, high),
          `net_of_alpha` (None with estimates), `estimated_share` (of the estimates alone, which nothing guarantees),
          `is_floor`: whether the share is a lower bound only, because some right images had too few draws for this radius
          (by `counts`), and `out_of_reach`: whether the radius is beyond `reach`, or no image has it and some had too few
          draws for it; then the shares and the interval are None;
        - `certified_accuracy_at_0`: the share of right predictions at any radius. It is not the accuracy of the base
          classifier on clean images, which is often much higher;
        - `abstention_rate`: share of all images;
        - `mean_certified_radius`: wrong images count 0. It is a weak measure: a useless classifier can make it as large as
          it likes, and it rewards easy images (arXiv 2410.06895). Compare the shares or the distribution of p_A instead;
        - `guarantee`, `alpha`: of all images; None where unknown;
        - the figures above but `certified_accuracy` are of the images sampled;
        - `expected_wrong`, `most_wrong`: how many certificates are wrong on average, at most (alpha N), and with 95 %
          confidence (q). They and `net_of_alpha` are None unless the guarantee is `per_input` and alpha is known;
        - `p_lower_quartiles`: of the bound on the *true* class, which is 0 where the prediction is wrong; None without
          `p_lower`;
        - `median_num_samples`: over the images that did not fail; None without `num_samples`.

    Raises:
        ValueError: for no images, unequal numbers, mixed guarantees or alphas, a value out of its range (named).

    >>> figures = certified_accuracy([0, 1, -1], [0, 0, 0], [0.3, 0.9, 0.0], thresholds=[0, 0.25, 0.5])
    >>> [row["right"] for row in figures["certified_accuracy"]], round(figures["abstention_rate"], 3)
    ([1, 1, 0], 0.333)
    """
    optional = {"guarantees": guarantees, "p_lower": p_lower, "num_samples": num_samples, "alphas": alphas}
    optional["counts"] = counts
    estimates = {
        "estimated_predictions": estimated_predictions,
        "estimated_radii": estimated_radii,
        "sampled": sampled,
    }
    columns = _validate(predictions, references, radii, **optional, **estimates)
    if not len(columns.right):
        raise ValueError("There are no images: predictions, references and radii are empty.")
    try:
        levels = [float(level) for level in thresholds]
    except (TypeError, ValueError):
        raise ValueError(f"thresholds={thresholds!r} must be a list of radii, such as [0, 0.5].") from None
    if not levels or not all(0 <= level < math.inf for level in levels):
        raise ValueError(f"thresholds={levels} must be one or more finite radii, 0 or above.")
    if not isinstance(num_results, int) or num_results < 1:
        raise ValueError(f"num_results={num_results!r} must be an integer, 1 or above.")
    if reach is not None and not reach >= 0:
        raise ValueError(f"reach={reach!r} must be a radius, 0 or above.")
    bounds, draws = columns.p_lower, columns.num_samples
    alpha = columns.alpha if columns.guarantee == "per_input" else None
    certificates = int((~columns.failed).sum())
    most_wrong = None if alpha is None else most_wrong_certificates(certificates, alpha, num_results)
    estimated = columns.estimates
    return {
        "num_images": len(columns.right if estimated is None else estimated.right),
        "num_sampled": len(columns.right),
        "num_failed": int(columns.failed.sum()),
        "certified_accuracy": [_share(columns, level, most_wrong, reach) for level in levels],
        "certified_accuracy_at_0": float(columns.right.mean()),
        "abstention_rate": float(columns.abstains.mean()),
        "mean_certified_radius": float(np.where(columns.right, columns.radii, 0.0).mean()),
        "guarantee": columns.guarantee,
        "alpha": columns.alpha,
        "expected_wrong": None if alpha is None else alpha * certificates,
        "most_wrong": most_wrong,
        "p_lower_quartiles": None if bounds is None else np.quantile(bounds * columns.right, _QUARTILES).tolist(),
        "median_num_samples": float(np.median(draws)) if len(draws) else None,
    }


_QUARTILES = (0.25, 0.5, 0.75)


def certified_accuracy_curve(
    predictions: Column, references: Column, radii: Column
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """
    Certified accuracy at *every* radius, as an exact step function.

    Args: as for [`certified_accuracy`].

    Returns:
        Radii in ascending order from 0 and as many shares: `shares[i]` holds above `radii[i - 1]` up to and including
        `radii[i]` (matplotlib's `step(where="pre")`). Beyond the last radius the share is 0.
    """
    columns = _validate(predictions, references, radii)
    reached = np.sort(columns.radii[columns.right])
    corners = np.unique([0.0, *reached])
    return corners, (len(reached) - np.searchsorted(reached, corners)) / len(columns.right)


def _share(columns: _Columns, level: float, most_wrong: int | None, reach: float | None) -> dict[str, Any]:
    reached = columns.right & (columns.radii >= level)
    right, images = int(reached.sum()), len(columns.right)
    row = {"radius": level, "right": right, "share": right / images, "interval_95": exact_interval(right, images)}
    row["net_of_alpha"] = None if most_wrong is None else max(right - most_wrong, 0) / images
    row["estimated_share"] = None
    if columns.estimates is not None and columns.sampled is not None:
        estimated = columns.estimates.right & (columns.estimates.radii >= level)
        row["share"], row["interval_95"] = share_of_sample(reached, estimated, columns.sampled)
        row |= {"net_of_alpha": None, "estimated_share": float(estimated.mean())}
    row["is_floor"] = bool((columns.unanimous & columns.right & ~reached).any())
    row["out_of_reach"] = False
    beyond = (reach is not None and level > reach) or (row["is_floor"] and not right)
    return mark_out_of_reach(row) if beyond else row


def mark_out_of_reach(row: dict[str, Any]) -> dict[str, Any]:
    """A row of [`certified_accuracy`] at a radius that the draws cannot prove: its share is not measured."""
    unknown = dict.fromkeys(("share", "interval_95", "net_of_alpha", "estimated_share"))
    return row | unknown | {"is_floor": False, "out_of_reach": True}


def _validate(
    predictions: Column,
    references: Column,
    radii: Column,
    guarantees: Column | None = None,
    p_lower: Column | None = None,
    num_samples: Column | None = None,
    alphas: Column | None = None,
    counts: Column | None = None,
    estimated_predictions: Column | None = None,
    estimated_radii: Column | None = None,
    sampled: Column | None = None,
) -> _Columns:
    if estimated_predictions is not None or estimated_radii is not None or sampled is not None:
        if estimated_predictions is None or estimated_radii is None or sampled is None:
            raise ValueError("estimated_predictions, estimated_radii and sampled belong together: give all three.")
        estimates = _validate(estimated_predictions, references, estimated_radii)
        drawn = np.array([bool(value) for value in sampled], bool)
        if len(drawn) != len(estimates.right):
            raise ValueError(
                f"Unequal numbers ({len(estimates.right)} images, {len(drawn)} sampled): give one for each."
            )
        optional = {"guarantees": guarantees, "p_lower": p_lower, "num_samples": num_samples, "alphas": alphas}
        optional["counts"] = counts
        kept = {name: _pick(column, drawn) for name, column in optional.items() if column is not None}
        required = (_pick(column, drawn) for column in (predictions, references, radii))
        certified = _validate(*required, **kept)
        return replace(certified, estimates=estimates, sampled=drawn)
    columns: dict[str, Column | None] = {"predictions": predictions, "references": references, "radii": radii}
    columns |= {"guarantees": guarantees, "p_lower": p_lower, "num_samples": num_samples, "alphas": alphas}
    columns["counts"] = counts
    given = {name: list(column) for name, column in columns.items() if column is not None}
    if len({len(column) for column in given.values()}) > 1:
        sizes = ", ".join(f"{len(column)} {name}" for name, column in given.items())
        raise ValueError(f"Unequal numbers ({sizes}): give one of each for every image.")
    failed = np.array([value is None for value in given["predictions"]], bool)
    labels, distances = (
        _numbers(name, [0 if skip else value for skip, value in zip(failed, given[name])])
        for name in ("references", "radii")
    )
    classes = _numbers("predictions", given["predictions"], missing=ABSTAIN)
    _check("predictions", classes, _is_integer(classes, ABSTAIN), f"{_INTEGER}: a class, or -1 for an abstention.")
    _check("references", labels, _is_integer(labels), f"{_INTEGER}, 0 or above: images need labels to be counted.")
    _check("radii", distances, (distances >= 0) & (distances < math.inf), "must be a finite radius, 0 or above.")
    abstains = (classes == ABSTAIN) & ~failed
    _check("radii", distances, ~abstains | (distances == 0), "must be 0, since the prediction abstains there (-1).")
    bounds = None
    if "p_lower" in given:
        bounds = _numbers("p_lower", given["p_lower"], missing=0)
        _check("p_lower", bounds, (bounds >= 0) & (bounds <= 1), "must be a probability.")
    draws_or_none = given.get("num_samples", [None] * len(failed))
    draws = _numbers("num_samples", draws_or_none, missing=0)
    _check("num_samples", draws, _is_integer(draws), f"{_INTEGER}, 0 or above.")
    known = np.array([number is not None for number in draws_or_none], bool)
    return _Columns(
        right=(classes == labels) & ~abstains & ~failed,
        abstains=abstains,
        failed=failed,
        radii=distances,
        guarantee=_guarantee(given.get("guarantees", []), failed),
        alpha=_alpha(given.get("alphas", []), failed),
        p_lower=bounds,
        num_samples=draws[known & ~failed],
        unanimous=unanimous(given.get("counts", [None] * len(failed)), classes),
    )


def _pick(column: Column, rows: NDArray[np.bool_]) -> list[Any]:
    return [value for value, row in zip(column, rows, strict=True) if row]


_INTEGER = "must be an integer"


def _guarantee(guarantees: list[Any], failed: NDArray[np.bool_]) -> str | None:
    # a failed image has no certificate; "" stands for None in evaluate's string columns
    kinds = sorted({str(name or "unknown") for name, skip in zip(guarantees, failed) if not skip})
    for kind in kinds:
        if kind not in (*GUARANTEES, "unknown"):
            raise ValueError(f"guarantees has {kind!r}; choose from {', '.join(GUARANTEES)}, and None where unknown.")
    if len(kinds) > 1:
        raise ValueError(f"Different guarantees ({', '.join(kinds)}) do not make one figure: compute each alone.")
    return kinds[0] if kinds and kinds != ["unknown"] else None


def _alpha(alphas: list[Any], failed: NDArray[np.bool_]) -> float | None:
    known = np.array([value is not None for value in alphas], bool)
    values = _numbers("alphas", alphas, missing=0.5)
    _check("alphas", values, (values > 0) & (values < 1), "must be a probability above 0 and below 1.")
    kinds = sorted(
        {f"{value:g}" if there else "unknown" for value, there, skip in zip(values, known, failed) if not skip}
    )
    if len(kinds) > 1:
        raise ValueError(f"Different alphas ({', '.join(kinds)}) do not make one figure: compute each alone.")
    return float(values[known & ~failed][0]) if kinds and kinds != ["unknown"] else None


def _numbers(name: str, values: list[Any], missing: float | None = None) -> NDArray[np.float64]:
    try:
        return np.array([missing if value is None else float(value) for value in values], np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold one number per image: {error}.") from None


def _is_integer(values: NDArray[np.float64], at_least: int = 0) -> NDArray[np.bool_]:
    return np.isfinite(values) & (np.floor(values) == values) & (values >= at_least)


def _check(name: str, values: NDArray[np.float64], fine: NDArray[np.bool_], wanted: str) -> None:
    if not fine.all():
        at = int(np.argmin(fine))
        raise ValueError(f"{name}[{at}]={values[at]:g} {wanted}")


_INTEGERS, _FLOATS, _STRINGS = (datasets.Value(kind) for kind in ("int64", "float64", "string"))
_REQUIRED = {"predictions": _INTEGERS, "references": _INTEGERS, "radii": _FLOATS}
_ESTIMATES = {"estimated_predictions": _INTEGERS, "estimated_radii": _FLOATS, "sampled": datasets.Value("bool")}
_FEATURES = {
    **_REQUIRED,
    "guarantees": _STRINGS,
    "p_lower": _FLOATS,
    "num_samples": _INTEGERS,
    "alphas": _FLOATS,
    "counts": datasets.List(_INTEGERS),
    **_ESTIMATES,
}


class CertifiedAccuracy(evaluate.Metric):
    """
    [`certified_accuracy`] as a metric of `evaluate`: `CertifiedAccuracy()`, or `evaluate.load` with this folder.

    `predictions`, `references` and `radii` are required; `guarantees`, `p_lower`, `num_samples`, `alphas` and `counts` are
    optional, the same ones in every batch. `evaluate.combine` passes only the three required columns to `add_batch`, all to
    `compute`.

    >>> metric = CertifiedAccuracy()
    >>> metric.add_batch(predictions=[0, 1], references=[0, 0], radii=[0.3, 0.9], guarantees=["per_input"] * 2)
    >>> metric.compute(thresholds=[0.25])["certified_accuracy"][0]["share"]
    0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Certified accuracy of a smoothed classifier over all images, abstentions counted as wrong.",
            citation="Cohen, Rosenfeld, Kolter: Certified Adversarial Robustness via Randomized Smoothing (2019).",
            inputs_description=certified_accuracy.__doc__,
            features=datasets.Features(_REQUIRED),
            reference_urls=["https://arxiv.org/abs/1902.02918", "https://arxiv.org/abs/2410.06895"],
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **columns: Any) -> None:
        """Add one image; the other columns keep their names."""
        values = {name: [value] for name, value in columns.items()}
        self.add_batch(predictions=[prediction], references=[reference], **values)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **columns: Any) -> None:
        """Add a batch of images; bad values are refused here."""
        batch = {"predictions": predictions, "references": references, **columns}
        batch = {name: list(column) for name, column in batch.items() if column is not None}
        if self.writer is None:
            self._expect(batch)
        if set(batch) != set(self.features):
            raise ValueError(
                f"A batch has the columns {', '.join(batch)}; the first one had {', '.join(self.features)}: give the same "
                "ones in every batch."
            )
        _validate(**batch)
        if "guarantees" in batch:
            batch["guarantees"] = [name or "" for name in batch["guarantees"]]  # evaluate takes no None for a string
        super().add_batch(**batch)

    def compute(self, *, predictions: Any = None, references: Any = None, **columns: Any) -> dict[str, Any] | None:
        """Compute over what was added, or over the columns given; None in all processes of `num_process` but the first."""
        if self.writer is None and (predictions is not None or references is not None):
            self._expect({"predictions": predictions, "references": references, **columns})
        return super().compute(predictions=predictions, references=references, **columns)

    def _compute(self, **columns: Any) -> dict[str, Any]:
        return certified_accuracy(**columns)

    def _expect(self, batch: dict[str, Any]) -> None:
        """Set the columns of all batches until `compute`."""
        given = {name for name, column in batch.items() if column is not None} - {"thresholds", "num_results", "reach"}
        if unknown := sorted(given.difference(_FEATURES)):
            raise ValueError(f"There is no column {unknown[0]!r}; there are {', '.join(_FEATURES)}.")
        if missing := [name for name in _REQUIRED if name not in given]:
            raise ValueError(f"{', '.join(missing)} missing: give {', '.join(_REQUIRED)}.")
        self.info.features = datasets.Features({name: kind for name, kind in _FEATURES.items() if name in given})
