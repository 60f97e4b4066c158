"""What the Hub reads of a model card: the YAML front matter and `.eval_results`."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from .results_pages import Json, best_by_radius

OPERATING_RADII = (0.0, 0.25, 0.5, 1.0)
"""The radii that the metadata name."""


def card_metadata(
    name: str, points: Sequence[Json], tags: Sequence[str], datasets: Sequence[str], base_model: str | None
) -> str:
    """The front matter of a card, as YAML, with the certified accuracy at some of the points of [`certified_points`]."""
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=list(tags),
        datasets=list(datasets) or None,
        base_model=base_model,
        model_name=name,
        eval_results=[_eval_result(point) for point in _operating_points(points)] or None,
    )
    return metadata.to_yaml()


def eval_results(points: Sequence[Json]) -> str:
    """The content of `.eval_results/*.yaml`."""
    entries = eval_result_entries_to_yaml([_entry(point) for point in _operating_points(points)])
    return yaml.safe_dump(entries, sort_keys=False)


def _operating_points(points: Sequence[Json]) -> list[Json]:
    return [point for point in points if point["radius"] in OPERATING_RADII]


def certified_points(report: Json, name: str) -> list[Json]:
    """
    The certified accuracies of a model in a `report.json`, one per radius, at the noise level with the largest share.

    Args:
        report: results of other models are left out, and estimates are not certificates.
        name: of the model.
    """
    own = [
        entry
        for entry in report["results"]
        if entry["model"] is not None
        and Path(entry["model"]).name == name
        and entry["guarantee"] in ("per_input", "marginal")  # an estimate is not a certificate
    ]
    best = best_by_radius({**report, "results": own}) if own else []
    return [point for point in best if point["standing"] == "counted"]


def _arguments(point: Json) -> Json:
    entry = point["entry"]
    settings = entry["made_by"]["settings"]
    return {
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
        # a calibrated head is lowered or raised according to the radii it decides
        **({"radii": entry["decided_radii"]} if settings.get("delta") is not None and entry["decided_radii"] else {}),
    }


def _eval_result(point: Json) -> EvalResult:
    settings = point["entry"]["made_by"]["settings"]
    return EvalResult(
        task_type="image-classification",
        dataset_type=settings["dataset_name"],
        dataset_name=settings["dataset_name"],
        dataset_split=settings["split"],
        metric_type="certified_accuracy",
        metric_name=f"Certified accuracy at r = {point['radius']:g}, sigma = {point['sigma']:g}",
        metric_value=point["share"],
        metric_args=_arguments(point),
    )


def _entry(point: Json) -> EvalResultEntry:
    arguments = _arguments(point)
    return EvalResultEntry(
        dataset_id=point["entry"]["made_by"]["settings"]["dataset_name"],
        task_id=f"certified_accuracy_r{point['radius']:g}_sigma{point['sigma']:g}_n{arguments['n']}",
        value=point["share"],
        notes=", ".join(f"{name}: {value}" for name, value in arguments.items()),
    )
