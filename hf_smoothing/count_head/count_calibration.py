"""Calibrating a count head against a run of Monte-Carlo certificates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoImageProcessor

from ..core.bounds import FloatArray
from ..core.calibration import CALIBRATION_FILE, Calibration
from ..core.count_predictor import CountPredictor
from ..core.loading import weights_digest
from ..core.noise import GaussianNoise
from ..core.preprocessing import Preprocessing
from .count_errors import Comparison
from .measured_counts import Counts, read_counts


def calibrate_count_head(count_head: str | Path, run_dir: str | Path) -> Calibration:
    """
    Compare a count head's estimates with Monte-Carlo certificates, and save what comes of it in the head's folder.

    Args:
        count_head: folder of a count head.
        run_dir: a finished run of method `fixed`, on images that neither head nor classifier was trained on.

    Raises:
        ValueError: for a head or run that cannot be read, a run of another method or other classes, images that the head was
            trained on or that are no longer those certified.
        OSError: where the folder cannot be written to.
    """
    run = Path(run_dir)
    measured = read_counts(run)
    settings = measured.settings
    if settings["method"] != "fixed":
        raise ValueError(
            f"{run} is of method {settings['method']!r}: a calibration takes certificates of method 'fixed'."
        )
    folder = Path(count_head)
    if not folder.is_dir():
        raise ValueError(f"{str(count_head)!r} is no folder: the calibration is written beside the count head.")
    predictor = CountPredictor.from_pretrained(folder, class_names=settings["label_names"], calibrated=False)
    refuse_training_images(folder, settings)
    probabilities = predict_counts(predictor, measured, folder)
    n = int(measured.counts[0].sum())
    predicted, allowed = {}, {}
    for one in compare(measured, probabilities):
        predicted[one.sigma], allowed[one.sigma] = one.compared()
    calibration = Calibration(
        predicted,
        allowed,
        n=n,
        alpha=settings["alpha"],
        dataset=measured.images,
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


def predict_counts(
    predictor: CountPredictor, measured: Counts, folder: str | Path, batch_size: int = 256
) -> FloatArray:
    """
    What a count head says of images that were counted.

    Args:
        predictor: the count head.
        measured: which images, and at which noise levels.
        folder: a model whose image processor prepares the images.
        batch_size: images in one forward pass.

    Returns:
        Predicted class frequencies `(rows, classes)`.

    Raises:
        ValueError: for images that are no longer those counted.
    """
    preprocessing = Preprocessing.of(AutoImageProcessor.from_pretrained(folder))
    inputs = measured.open().bind(predictor.class_names, preprocessing)
    wanted, rows = np.unique(measured.indices, return_inverse=True)
    found = np.empty((len(rows), len(predictor.class_names)))
    for first in tqdm(range(0, len(wanted), batch_size), "asking the count head", leave=False):
        pixels = torch.stack([inputs[index][0] for index in wanted[first : first + batch_size]])
        for sigma in np.unique(measured.sigmas):
            here = (rows >= first) & (rows < first + batch_size) & (measured.sigmas == sigma)
            found[here] = predictor(pixels, float(sigma)).double().cpu().numpy()[rows[here] - first]
    return found


def compare(measured: Counts, probabilities: FloatArray) -> list[Comparison]:
    """
    Predictions beside what was measured, one comparison for each noise level.

    Args:
        measured: of a run of method `fixed`.
        probabilities: `(rows, classes)`, predicted for its rows.
    """
    return [
        Comparison(
            float(sigma),
            probabilities[rows],
            measured.counts[rows],
            measured.predictions[rows],
            measured.p_lower[rows],
            measured.labels[rows],
            measured.settings["alpha"],
        )
        for sigma in np.unique(measured.sigmas)
        for rows in [measured.sigmas == sigma]
    ]


def refuse_training_images(folder: Path, settings: dict[str, Any]) -> None:
    """
    Raise a `ValueError` where a run is on images that a count head may have been trained on.

    Args:
        folder: of the count head.
        settings: of the run.
    """
    training = folder / "results" / "training.json"
    if training.exists():
        refuse_shared_images(json.loads(training.read_text())["counts"], settings)


def refuse_shared_images(trained_on: dict[str, Any], settings: dict[str, Any]) -> None:
    """
    Raise a `ValueError` where a run may hold images of another one, on which a count head was trained.

    Args:
        trained_on: settings of the run that it was trained on.
        settings: of the run.
    """

    def where(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).exists() else name

    def splits(split: str) -> set[str]:
        # a slice such as train[45000:] may hold images of the split's other slices too: nobody knows
        return {part.split("[")[0].strip() for part in split.split("+")}

    shared = splits(trained_on["split"]) & splits(settings["split"])
    if where(trained_on["dataset_name"]) == where(settings["dataset_name"]) and shared:
        raise ValueError(
            f"The count head was trained on the split {settings['split']!r} of {settings['dataset_name']!r}: use "
            "images that it has not seen, or its errors there say nothing of others."
        )
