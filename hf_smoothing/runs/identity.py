"""What a run certifies and with what: its identity, kept in `run.json`, by which it is resumed, audited and reused."""

from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..core.count_predictor import CountPredictor
from ..core.noise import GaussianNoise
from ..core.smoothing import SmoothedClassifier
from ..core.surrogate_rule import SurrogateRule
from ..core.weights import loading, weights_digest
from ..data.labelled_images import LabelledImages
from ..utils.provenance import command_line, package_versions
from .records import Record
from .settings import AUTO, NoiseLevel, RunSettings

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
"""Types of the forward passes by name, as `SmoothedClassifier` takes them: float32 weights, with autocast or without."""


def open_images(settings: Record, streaming: bool = False) -> LabelledImages:
    """The images of a run. Raises a `ValueError` where they cannot be loaded, or have changed since the run."""
    names = ("split", "image_column", "label_column", "every", "max_samples")
    options = {option: settings[option] for option in names}
    if settings.get("sample") is not None:  # the name of older runs
        options["max_samples"] = settings["sample"]
    name, config_name = settings["dataset_name"], settings["dataset_config_name"]
    images = LabelledImages(name, config_name=config_name, streaming=streaming, **options)
    if settings.get("dataset_fingerprint") not in (None, images.fingerprint):
        raise ValueError(f"{name!r} is not what the run certified: its files were changed, copied or touched since.")
    return images


def load_classifier(settings: Record, device: torch.device | str, batch_size: int) -> SmoothedClassifier:
    """The smoothed classifier of a run, at its first noise level. Raises a `ValueError` where it cannot be loaded."""
    names = ("count_head", "noise_resolution", "denoiser", "revision", "attn_implementation")
    options = {option: settings[option] for option in names if settings.get(option) is not None}
    name = settings["model_name_or_path"]
    noise = GaussianNoise(next((sigma for sigma in settings["sigmas"] if sigma != AUTO), 1.0))
    autocast = DTYPES[settings["dtype"]]
    with loading(name):
        return SmoothedClassifier.from_pretrained(
            name, noise, batch_size=batch_size, device=device, autocast=autocast, **options
        )


def at_level(smoothed: SmoothedClassifier, level: NoiseLevel, settings: Record) -> SmoothedClassifier:
    """The classifier of a run at one of its noise levels, which may be `"auto"`."""
    if level == AUTO:
        return smoothed.with_fallback(settings["levels"], settings["agreement"])
    return smoothed.with_noise(GaussianNoise(level))


def describe_classifier(smoothed: SmoothedClassifier) -> Record:
    """What defines the function of the base classifier: weights, classes, attention, denoiser and image processor."""
    model: Any = smoothed.base_classifier.classifier
    denoiser, processor = smoothed.base_classifier.denoiser, smoothed.image_processor
    return {
        "label_names": smoothed.class_names,
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "model_weights": weights_digest(model),
        "image_processor": type(processor).__name__,
        "denoiser_weights": weights_digest(denoiser) if isinstance(denoiser, nn.Module) else None,
        "image_processor.backend": getattr(processor, "backend", None),
        **{f"image_processor.{name}": value for name, value in processor.to_dict().items()},
    }


def describe_run(settings: RunSettings, images: LabelledImages, smoothed: SmoothedClassifier) -> Record:
    """What must be the same for a run to be resumed, as plain values. Processes, batch size and device may change."""
    model: Any = smoothed.base_classifier.classifier
    head = smoothed.count_head
    return {
        **asdict(replace(settings, image_column=images.image_column, label_column=images.label_column)),
        "noise_resolution": settings.resolution,
        "max_samples_at_random": None if settings.max_samples is None else images.total is not None,
        "dataset_fingerprint": images.fingerprint,
        "dataset_label_names": images.class_names,
        "model_commit": getattr(model.config, "_commit_hash", None),
        **describe_classifier(smoothed),
        "count_head_weights": weights_digest(head.model) if isinstance(head, CountPredictor) else None,
        "calibration": _describe_calibration(settings, smoothed),
        "radii_decided": {f"{sigma:g}": settings.rule(sigma)[1] for sigma in settings.single_levels},
    }


def describe_session(accelerator: Accelerator, smoothed: SmoothedClassifier) -> Record:
    """What may change when a run is resumed: command, device, processes, batch size and versions."""
    return {
        "command": command_line(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "device": str(smoothed.device),
        "batch_size": smoothed.batch_size,
        "versions": package_versions("datasets", "accelerate", "torchvision"),
    }


def _describe_calibration(settings: RunSettings, smoothed: SmoothedClassifier) -> Record | None:
    calibration, shifts = smoothed.calibration, dict[str, float]()
    for sigma in settings.single_levels:
        rule, _ = settings.rule(sigma)
        if isinstance(rule, SurrogateRule) and rule.delta is not None:
            shifts[f"{sigma:g}"] = rule.shift(GaussianNoise(sigma))
    if not shifts or calibration is None:
        return None
    fields = ("dataset", "model", "n", "alpha")
    return {**{name: getattr(calibration, name) for name in fields}, "shifts": shifts}
