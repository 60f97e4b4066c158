"""Calibrating a count head with a run of Monte-Carlo certificates."""

import json
from pathlib import Path
from typing import Any

from ..core.calibration import CALIBRATION_FILE, Calibration
from ..core.count_predictor import CountPredictor
from ..core.noise import GaussianNoise
from ..core.rule_protocols import probabilities_proving, radii_in_reach
from ..core.weights import weights_digest
from ..metrics.certified_accuracy import DEFAULT_THRESHOLDS
from .comparison import compare_with_certificates, predict_counts
from .measured_counts import read_counts


def calibrate_count_head(count_head: str | Path, run_dir: str | Path) -> Calibration:
    """
    Compare a count head's estimates with Monte-Carlo certificates, and save the calibration in the head's folder.

    Args:
        count_head: folder of a count head.
        run_dir: finished run of method `fixed`, on images that neither head nor classifier was trained on.

    Raises:
        ValueError: for a head or run that cannot be read, a run of another method or other classes, images that the head was
            trained on, or images that were changed since the run.
        OSError: if the folder cannot be written to.
    """
    run, folder = Path(run_dir), Path(count_head)
    measured = read_counts(run)
    settings = measured.settings
    if settings["method"] != "fixed":
        raise ValueError(
            f"{run} is of method {settings['method']!r}: a calibration takes certificates of method 'fixed'."
        )
    if not folder.is_dir():
        raise ValueError(f"{str(count_head)!r} is no folder: the calibration is saved in the count head's folder.")
    predictor = CountPredictor.from_pretrained(folder, class_names=settings["label_names"], calibrated=False)
    refuse_training_images(folder, settings)
    predicted, allowed = {}, {}
    for comparison in compare_with_certificates(measured, predict_counts(predictor, measured, folder)):
        predicted[comparison.sigma], allowed[comparison.sigma] = comparison.to_calibration()
    calibration = Calibration(
        predicted,
        allowed,
        n=int(measured.counts[0].sum()),
        alpha=settings["alpha"],
        dataset=measured.describe_images(),
        model=settings["model_name_or_path"],
        conditions={
            "model_weights": settings["model_weights"],
            "head_weights": weights_digest(predictor.model),
            "noise": GaussianNoise.name,
            "noise_resolution": str(settings.get("noise_resolution", "input")),
            "denoiser": settings.get("denoiser"),
            "dtype": settings["dtype"] if settings["dtype"] == "float32" else f"{settings['dtype']} autocast",
        },
    )
    calibration.save(folder / CALIBRATION_FILE)
    return calibration


def claim_rows(calibration: Calibration) -> list[dict[str, str]]:
    """What a calibrated count head may claim at each noise level and choice of radii, as rows of a table."""
    rows = []
    for sigma, images in calibration.images.items():
        noise = GaussianNoise(sigma)
        decided = radii_in_reach(DEFAULT_THRESHOLDS[1:], noise, calibration.n, calibration.alpha)
        together = [decided] if len(decided) > 1 else []
        for radii in (None, *together, *([radius] for radius in decided)):
            needed = None if radii is None else probabilities_proving(radii, noise)
            claims = "each image's own" if radii is None else f"r = {', '.join(f'{radius:g}' for radius in radii)}"
            row = {"sigma": f"{sigma:g}", "claimed": claims, "images": str(images)}
            row["too large as they are"] = f"{100 * (calibration.scores(sigma, needed) > 0).mean():.1f} %"
            row |= {f"at delta = {delta:g}": _shift(calibration, sigma, delta, needed) for delta in (0.1, 0.05)}
            rows.append(row)
    return rows


def _shift(calibration: Calibration, sigma: float, delta: float, p_needed: list[float] | None) -> str:
    try:
        shift, claims = calibration.shift(sigma, delta, p_needed), calibration.claim_rate(sigma, delta, p_needed)
    except ValueError:
        return "too few images"
    return f"{shift:.3f}; {100 * claims:.1f} %"


def refuse_training_images(count_head: Path, settings: dict[str, Any]) -> None:
    """Raise a `ValueError` if a run of these settings shares a split with the training data of the head in a folder."""
    training = count_head / "results" / "training.json"
    if training.exists():
        refuse_shared_images(json.loads(training.read_text())["counts"], settings)


def refuse_shared_images(training_settings: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise a `ValueError` if a run shares a split of a dataset with the run that a count head was trained on."""

    def resolve(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).exists() else name

    def list_splits(split: str) -> set[str]:
        # slices such as train[45000:] count as their split: two slices may overlap
        return {part.split("[")[0].strip() for part in split.split("+")}

    shared_splits = list_splits(training_settings["split"]) & list_splits(settings["split"])
    if resolve(training_settings["dataset_name"]) == resolve(settings["dataset_name"]) and shared_splits:
        raise ValueError(
            f"The count head was trained on the split {settings['split']!r} of {settings['dataset_name']!r}: use images "
            "that it was not trained on, since its errors on training images do not carry over to others."
        )
