"""The YAML front matter of a model card, with its certified accuracies as a `model-index`."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ..reporting.rendering import format_number
from ..reporting.report import Json, best_by_radius

OPERATING_RADII = (0.0, 0.25, 0.5, 1.0)
"""The radii that the metadata name."""


def card_metadata(
    name: str,
    points: Sequence[Json],
    tags: Sequence[str],
    datasets: Sequence[str],
    base_model: str | None,
    license: str | None,
) -> str:
    """The front matter of a card, as YAML, with the certified accuracy at some of the points of [`certified_points`]."""
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=list(tags),
        datasets=list(datasets) or None,
        base_model=base_model,
        model_name=name,
        eval_results=[_eval_result(point) for point in points if point["radius"] in OPERATING_RADII] or None,
    )
    return metadata.to_yaml()


def certified_points(report: Json, name: str, weights: str | None = None) -> list[Json]:
    """
    The certified accuracies of the model `name` in a `report.json`, as [`best_by_radius`] gives them. Results of other
    models and estimates are left out. A run of a folder with another name counts if its weights had the digest `weights`.
    """

    def is_own(entry: Json) -> bool:
        settings = (entry["made_by"] or {}).get("settings", {})
        return Path(entry["model"] or "").name == name or (
            weights is not None and settings.get("model_weights") == weights
        )

    own = [entry for entry in report["results"] if is_own(entry) and entry["guarantee"] in ("per_input", "marginal")]
    return [point for point in best_by_radius(own) if point["standing"] == "counted"]


def _eval_result(point: Json) -> EvalResult:
    entry = point["entry"]
    settings = entry["made_by"]["settings"]
    arguments = {
        "radius": point["radius"],
        "sigma": entry["sigma"],
        "norm": "l2",
        "alpha": entry["alpha"],
        "guarantee": entry["guarantee"],
        "method": settings["method"],
        "n": settings["n"] or settings["max_draws"],
        "every": settings["every"],
        "dtype": settings["dtype"],
        "noise_resolution": str(settings.get("noise_resolution", "input")),
        **{name: settings[name] for name in ("delta", "denoiser") if settings.get(name) is not None},
    }
    if settings.get("delta") is not None and entry["decided_radii"]:
        arguments["radii"] = entry[
            "decided_radii"
        ]  # a calibrated head is lowered or raised according to the radii it decides
    return EvalResult(
        task_type="image-classification",
        dataset_type=settings["dataset_name"],
        dataset_name=settings["dataset_name"],
        dataset_split=settings["split"],
        metric_type="certified_accuracy",
        metric_name=f"Certified accuracy at r = {point['radius']:g}, sigma = {format_number(point['sigma'])}",
        metric_value=point["share"],
        metric_args=arguments,
    )
