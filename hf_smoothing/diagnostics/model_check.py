"""Is a model worth smoothing? A quick check of a model, before anything is certified, that names the causes of trouble."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import stats
from torch import nn

from ..core.base_classifier import Classifier
from ..core.bounds import clopper_pearson_lower
from ..core.noise import GaussianNoise
from ..core.preprocessing import to_pixels
from ..core.smoothing import SmoothedClassifier
from ..data.class_matching import match_classes
from ..data.demo_images import load_demo_images
from ..data.labelled_images import LabelledImages, Row
from .model_faults import (
    Fault,
    compute_logits,
    find_budget_faults,
    find_draws_fault,
    find_fatal_fault,
    find_input_faults,
    find_resize_fault,
)

SIGMAS = (0.0, 0.12, 0.25, 0.5, 1.0)

_MIN_SHARE_KEPT = 0.75
"""A model that keeps a smaller share of its predictions, or of its accuracy, has little to certify at that noise level."""

_EXPLAIN_PREDICTIONS = {"normalization", "normalized twice", "0 to 255", "channel order"}
"""Faults that explain wrong or unstable predictions."""

_ROWS, _INPUT, _GUESSES, _NOISE = (
    "whether rows depend on each other",
    "which pixels it expects",
    "whether it guesses",
    "whether it keeps its predictions under noise",
)
"""What a fault may keep from being judged."""


@dataclass(frozen=True)
class ModelCheck:
    """
    The result of a check.

    Attributes:
        norm_layers: number of normalization layers of each kind.
        batch_statistics: the kinds that normalize by statistics of training batches.
        faults: what was found besides the predictions, see [`all_faults`].
        levels: a dict per noise level, none where the model cannot be certified at all: `sigma`; `same_answer`, the share of
            noisy copies with the prediction of the clean image; `accuracy`, the share that is right, or `None` where
            labels are unknown; and `largest_radius`, the largest radius that the draws can certify.
        images, answers, classes: number of images, of different predictions without noise, and of the model's classes.
        sigma: the noise level that was asked about.
        not_judged: what the faults keep from being judged.
    """

    norm_layers: dict[str, int] = field(default_factory=dict)
    batch_statistics: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    levels: list[dict[str, Any]] = field(default_factory=list)
    images: int = 0
    answers: int = 0
    classes: int = 0
    sigma: float | None = None
    not_judged: list[str] = field(default_factory=list)

    @property
    def all_faults(self) -> list[Fault]:
        """The faults that were found, and then what the accuracies and kept predictions tell, if nothing explains them."""
        explained = {fault.kind for fault in self.faults} & _EXPLAIN_PREDICTIONS
        judged = None if explained or not self.levels else self._judge_predictions()
        return [*self.faults, *([] if judged is None else [judged])]

    def advice(self) -> list[str]:
        """Causes with their fixes, what they keep from being judged, and the verdict."""
        return [*map(str, self.all_faults), *filter(None, (self.omissions(), self.verdict()))]

    def omissions(self) -> str | None:
        """What the faults keep from being judged, in a sentence; None where they leave nothing out."""
        if not self.not_judged:
            return None
        return f"Not judged because of that: {', '.join(self.not_judged)}. Check again after the fix."

    def verdict(self) -> str | None:
        """Up to where it is worth smoothing; None where a fault says that it is not."""
        if {fault.kind for fault in self.all_faults} & (
            _EXPLAIN_PREDICTIONS | {"guesses", "noise"}
        ) or not self._robust_sigmas():
            return None
        return f"It keeps its predictions up to sigma {max(self._robust_sigmas()):g}: worth smoothing there."

    @property
    def _clean_accuracy(self) -> float | None:
        return self.levels[0]["accuracy"] if self.levels and self.levels[0]["sigma"] == 0 else None

    def _robust_sigmas(self) -> list[float]:
        accuracy = self._clean_accuracy
        return [
            level["sigma"]
            for level in self.levels
            if level["sigma"] > 0
            and level["same_answer"] >= _MIN_SHARE_KEPT
            and (accuracy is None or level["accuracy"] >= _MIN_SHARE_KEPT * accuracy)
        ]

    def _judge_predictions(self) -> Fault | None:
        """The fault of a model that guesses, or loses its predictions under noise."""
        accuracy = self._clean_accuracy
        if self.answers == 1 and self.images > 1:
            return Fault(
                "guesses",
                "It predicts one class for all images, so stable predictions mean nothing: is it trained?",
                "Load trained weights, and check that the classes are those of the images.",
            )
        if accuracy is not None and self._may_be_guessing(accuracy):
            return Fault(
                "guesses",
                f"It is right about {accuracy:.0%} of {self.images} clean images, which guessing could be too, so stable "
                "predictions mean nothing.",
                "Is it trained, and for these classes in this order?",
            )
        noisy = {level["sigma"]: level for level in self.levels if level["sigma"] > 0}
        robust, asked = self._robust_sigmas(), self.sigma
        if (
            asked is not None
            and asked in noisy
            and asked not in robust
            and (lower := [level for level in robust if level < asked])
        ):
            return Fault(
                "units of sigma",
                f"It loses its predictions at sigma {asked:g}, and keeps them at {max(lower):g}: is that in other units?",
                "Give sigma for pixels in [0, 1]: half of that for [-1, 1]; that for normalized pixels times their std.",
            )
        if robust or not noisy:
            return None
        lowest = noisy[min(noisy)]
        correct = "" if lowest["accuracy"] is None else f" and is right about {lowest['accuracy']:.0%}"
        return Fault(
            "noise",
            f"Not worth smoothing as it is: at sigma {lowest['sigma']:g} it keeps {lowest['same_answer']:.0%} of its "
            f"predictions{correct}.",
            "Finetune it on noisy images (scripts/finetune.py --sigmas), or use a denoiser.",
        )

    def _may_be_guessing(self, accuracy: float) -> bool:
        """Whether guessing gets as many images right with a probability above 5 %."""
        correct = round(accuracy * self.images)
        return stats.binomtest(correct, self.images, 1 / self.classes, alternative="greater").pvalue > 0.05


def check_model(
    model: SmoothedClassifier | Classifier,
    images: LabelledImages | None = None,
    *,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
    sigma: float | None = None,
    radii: Sequence[float] = (),
    sigmas: Sequence[float] = SIGMAS,
    count: int = 40,
    draws: int = 4,
    n: int = 100_000,
    alpha: float = 0.001,
) -> ModelCheck:
    """
    Check whether randomized smoothing suits a model, and name the causes of small or impossible certificates.

    Args:
        model: a [`SmoothedClassifier`], or any callable from pixels `(batch, channels, height, width)` in `[0, 1]` to logits
            `(batch, classes)`.
        images: labelled images; by default those that ship with the package, whose labels count if the model has their
            classes. The labels of a callable without `class_names` are the numbers of its classes.
        class_names: the classes of a callable, in the order of its logits.
        image_size: height and width of the images that a callable takes; by default that of the images.
        sigma: the noise level that you want to certify at, in `[0, 1]` pixels; it is checked too.
        radii: the radii that you want to prove.
        sigmas: noise levels, in units of `[0, 1]` pixels; 0 is the clean image.
        count: number of images.
        draws: noisy copies per image and noise level.
        n: draws per image, for the largest radius.
        alpha: probability of a wrong certificate, for the largest radius.

    Raises:
        ValueError: for images whose classes the model lacks, and settings out of range.
    """
    smoothed = model if isinstance(model, SmoothedClassifier) else _smooth(model, class_names)
    module = smoothed.base_classifier.classifier
    layers = [layer for layer in (module.modules() if isinstance(module, nn.Module) else ()) if _is_norm(layer)]
    result = ModelCheck(
        norm_layers=dict(Counter(type(layer).__name__ for layer in layers)),
        batch_statistics=sorted({type(layer).__name__ for layer in layers if _uses_batch_statistics(layer)}),
        sigma=sigma,
        faults=find_budget_faults(n, alpha, sigma or max(sigmas), radii),
    )
    if result.batch_statistics:
        result.faults.append(_blame_batch_statistics(result.batch_statistics))
    pictures, labels = _read_images(smoothed, images, count)
    pixels = [_to_pixels(picture, smoothed, image_size) for picture in pictures]
    result.faults.extend(find_resize_fault(smoothed, pictures, pixels))
    if fatal := find_fatal_fault(smoothed, pixels):
        not_judged = [_ROWS, _INPUT, _GUESSES, _NOISE]
        return replace(result, faults=[*result.faults, fatal], not_judged=not_judged, images=len(pixels))
    logits = compute_logits(smoothed, pixels)
    if any(label is not None and label >= logits.shape[1] for label in labels):
        labels = [None] * len(labels)
    if input_faults := find_input_faults(smoothed, pixels, labels):
        result.faults.extend(input_faults)
        result.not_judged.extend([_GUESSES, _NOISE])
    levels: list[dict[str, Any]] = []
    for checked in sorted({*sigmas, *([] if sigma is None else [sigma, sigma / 2, sigma / 4])}):
        if checked > 0 and (fault := find_draws_fault(smoothed, pixels, checked)):
            result.faults.append(fault)
            result.not_judged.extend([_ROWS] if fault.kind == "randomness" else [])
            result.not_judged.extend([] if _NOISE in result.not_judged else [f"{_NOISE} from sigma {checked:g} on"])
            break
        levels.append(_check_level(smoothed, pixels, logits, labels, checked, draws))
    p_lower = float(clopper_pearson_lower(n, n, alpha))
    for level in levels:
        level["largest_radius"] = GaussianNoise(level["sigma"]).radius(p_lower) if level["sigma"] > 0 else 0.0
    return replace(
        result,
        levels=levels,
        images=len(pixels),
        answers=len(set(logits.argmax(1).tolist())),
        classes=logits.shape[1],
    )


def _smooth(classifier: Classifier, class_names: Sequence[str] | None) -> SmoothedClassifier:
    return SmoothedClassifier(classifier, GaussianNoise(0.25), batch_size=32, class_names=class_names)


def _blame_batch_statistics(kinds: Sequence[str]) -> Fault:
    return Fault(
        "batch statistics",
        f"It normalizes by batch statistics ({', '.join(kinds)}). Statistics of clean images are wrong for noisy ones, and "
        "robustness learned at one noise level does not carry over to others (arXiv 2312.09020).",
        "Prefer a model with LayerNorm or GroupNorm.",
    )


def _is_norm(layer: nn.Module) -> bool:
    """Whether a layer normalizes. It may contain other layers, such as an activation, if it has parameters of its own."""
    return "norm" in type(layer).__name__.lower() and (
        not list(layer.children()) or bool(list(layer.parameters(recurse=False))) or _uses_batch_statistics(layer)
    )


def _uses_batch_statistics(layer: nn.Module) -> bool:
    # some models bring frozen layers of their own class
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) or (
        "batchnorm" in type(layer).__name__.lower() and hasattr(layer, "running_mean")
    )


def _read_images(
    smoothed: SmoothedClassifier, images: LabelledImages | None, count: int
) -> tuple[list[Image.Image], list[int | None]]:
    """Some random pictures and their classes, `None` where the model lacks them."""
    class_names = list(smoothed.class_names or ())
    if images is not None:
        readers = list(images.rows())
        sample = [readers[position] for position in np.random.default_rng(0).permutation(len(readers))[:count]]
        rows = [(index, read()) for index, read in sample]
        names = class_names or images.class_names or _number_classes(images, rows)
        inputs = images.bind(names, smoothed.preprocessing)
        return [images.picture(row) for _, row in rows], [inputs.label(index, row) for index, row in rows]
    demo = load_demo_images()
    has_names = class_names and not all(name.startswith("LABEL_") for name in class_names)
    try:
        to_class = match_classes(demo.features["label"].names, class_names) if has_names else None
    except ValueError:
        to_class = None
    sample = demo.select(np.random.default_rng(0).permutation(len(demo))[:count])
    return list(sample["image"]), [None if to_class is None else to_class(label) for label in sample["label"]]


def _number_classes(images: LabelledImages, rows: Sequence[tuple[int, Row]]) -> list[str]:
    """Names of classes that are numbers; more than there are do no harm."""
    return [str(number) for number in range(1 + max(int(row[images.label_column]) for _, row in rows))]


def _to_pixels(picture: Image.Image, smoothed: SmoothedClassifier, image_size: int | None) -> torch.Tensor:
    if smoothed.preprocessing is None and image_size is not None and picture.size != (image_size, image_size):
        picture = picture.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return to_pixels(picture, smoothed.preprocessing)


def _check_level(
    smoothed: SmoothedClassifier,
    pixels: list[torch.Tensor],
    clean_logits: np.ndarray,
    labels: list[int | None],
    sigma: float,
    draws: int,
) -> dict[str, Any]:
    """The shares of noisy copies that keep the clean prediction, and that are right."""
    predictions, num_classes = clean_logits.argmax(1), clean_logits.shape[1]
    if sigma == 0:
        frequencies = np.eye(num_classes)[predictions]
    else:
        certificates = smoothed.with_noise(GaussianNoise(sigma)).certify(pixels, method="counts", n=draws)
        frequencies = np.array([certificate.counts for certificate in certificates]) / draws
    rows = np.arange(len(pixels))
    return {
        "sigma": sigma,
        "same_answer": float(frequencies[rows, predictions].mean()),
        "accuracy": None if None in labels else float(frequencies[rows, np.array(labels)].mean()),
    }
