"""Results of a random sample of images, completed by a count head's estimates for all images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import Result, read_results


@dataclass(frozen=True)
class CompletedResult(Result):
    """
    The certificates of a random sample, as in [`Result`], and the estimates for all images at the same noise level.

    Attributes:
        estimates: the estimates, from a run of method `surrogate` on all images.
    """

    estimates: Result | None = None

    @property
    def labels(self) -> dict[int, int]:
        """The class of each image with an estimate, by its index."""
        assert self.estimates is not None
        return self.estimates.labels

    def metric_columns(self) -> dict[str, list[Any]]:
        """The columns of `certified_accuracy`: one value per image with an estimate, None where it was not sampled."""
        assert self.estimates is not None
        certified = {row["index"]: row for row in self.rows}
        rows = [certified.get(index, {}) for index in self.estimates.column("index")]
        return {
            "predictions": [row.get("prediction") for row in rows],
            "references": self.estimates.column("label"),
            "radii": [row.get("radius") for row in rows],
            **{name: [row.get(column) for row in rows] for name, column in self.optional_columns().items()},
            "estimated_predictions": self.estimates.column("prediction"),
            "estimated_radii": self.estimates.column("radius"),
            "sampled": [index in certified for index in self.estimates.column("index")],
        }


def complete(results: Sequence[Result], estimates: Path) -> list[Result]:
    """
    Complete each result by the estimates of a run.

    Args:
        results: of runs on random samples (`--max-samples`).
        estimates: the folder of a run of method `surrogate` on all images.

    Raises:
        ValueError: for a result whose images are not a random sample, estimates of another model, dataset or noise level, or
            that lack an image of the sample.
    """
    by_sigma = {result.sigma: result for result in read_results([estimates])}
    completed: list[Result] = []
    for result in results:
        if not result.settings.get("max_samples_at_random") and not result.settings.get("sample"):  # in older runs
            raise ValueError(
                f"{result.title}: its images are not a random sample. Certify with --max-samples, without --streaming."
            )
        if result.sigma not in by_sigma:
            raise ValueError(f"{estimates} has no estimates for sigma = {result.sigma}, which {result.title} has.")
        estimate = by_sigma[result.sigma]
        for name in ("model_weights", "dataset_name", "dataset_config_name", "split", "every"):
            ours, theirs = result.settings.get(name), estimate.settings.get(name)
            if ours != theirs:
                raise ValueError(f"{estimates} has estimates for {name}={theirs!r}, but {result.title} has {ours!r}.")
        labels = estimate.labels
        for index, label in result.labels.items():
            if labels.get(index, -1) != label:
                raise ValueError(
                    f"{estimates} lacks an estimate for image {index} with label {label} of {result.title}."
                )
        completed.append(CompletedResult(result.source, result.name, result.rows, result.run, estimates=estimate))
    return completed
