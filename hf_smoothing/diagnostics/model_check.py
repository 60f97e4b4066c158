"""Is a model worth smoothing? A quick check of a model, before anything is certified."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from ..core.bounds import clopper_pearson_lower
from ..core.noise import GaussianNoise
from ..core.preprocessing import to_pixels
from ..core.smoothing import SmoothedClassifier
from ..data.class_matching import match_classes
from ..data.demo_images import load_demo_images
from ..data.labelled_images import LabelledImages

SIGMAS = (0.0, 0.12, 0.25, 0.5, 1.0)

_MIN_SHARE_KEPT = 0.75
"""A model that keeps a smaller share of its predictions, or of its accuracy, has little to certify at that noise level."""


@dataclass(frozen=True)
class ModelCheck:
    """
    The result of a check.

    Attributes:
        norm_layers: number of normalization layers of each kind.
        batch_statistics: the kinds that normalize by statistics of training batches.
        levels: a dict per noise level: `sigma`; `same_answer`, the share of noisy copies with the prediction of the clean
            image; `accuracy`, the share that is right, or `None` where the labels are unknown; and `largest_radius`, the
            largest radius that the draws can certify.
        images, answers, classes: number of images, of different predictions without noise, and of the model's classes.
    """

    norm_layers: dict[str, int]
    batch_statistics: list[str]
    levels: list[dict[str, Any]]
    images: int
    answers: int
    classes: int

    def advice(self) -> list[str]:
        """The verdict, and what to do about it."""
        advice = []
        if self.batch_statistics:
            advice.append(
                f"It normalizes by batch statistics ({', '.join(self.batch_statistics)}). Statistics of clean images are "
                "wrong for noisy ones, and robustness learned at one noise level does not carry over to others (arXiv "
                "2312.09020). Prefer a model with LayerNorm or GroupNorm."
            )
        return [*advice, self._verdict(self.levels[0]["accuracy"] if self.levels[0]["sigma"] == 0 else None)]

    def _verdict(self, accuracy: float | None) -> str:
        """Whether the model is worth smoothing, given its accuracy on clean images."""
        if self.answers == 1 and self.images > 1:
            return "It predicts one class for all images, so stable predictions mean nothing: is it trained?"
        if accuracy is not None and self._may_be_guessing(accuracy):
            return (
                f"It is right about {accuracy:.0%} of {self.images} clean images, which guessing could be too, so stable "
                "predictions mean nothing. Is it trained, and for these classes?"
            )
        noisy = [level for level in self.levels if level["sigma"] > 0]
        robust_sigmas = [
            level["sigma"]
            for level in noisy
            if level["same_answer"] >= _MIN_SHARE_KEPT
            and (accuracy is None or level["accuracy"] >= _MIN_SHARE_KEPT * accuracy)
        ]
        if robust_sigmas:
            return f"It keeps its predictions up to sigma {max(robust_sigmas):g}: worth smoothing there."
        lowest = noisy[0]
        correct = "" if lowest["accuracy"] is None else f" and is right about {lowest['accuracy']:.0%}"
        return (
            f"Not worth smoothing as it is: at sigma {lowest['sigma']:g} it keeps {lowest['same_answer']:.0%} of its "
            f"predictions{correct}. Finetune it on noisy images (scripts/finetune.py --sigmas), or use a denoiser."
        )

    def _may_be_guessing(self, accuracy: float) -> bool:
        """Whether guessing gets as many images right with a probability above 5 %."""
        correct = round(accuracy * self.images)
        return stats.binomtest(correct, self.images, 1 / self.classes, alternative="greater").pvalue > 0.05


def check_model(
    smoothed: SmoothedClassifier,
    images: LabelledImages | None = None,
    *,
    sigmas: Sequence[float] = SIGMAS,
    count: int = 20,
    draws: int = 4,
    n: int = 100_000,
    alpha: float = 0.001,
) -> ModelCheck:
    """
    Check the normalization layers of a model, and its predictions under noise.

    Args:
        smoothed: from `SmoothedClassifier.from_pretrained`, at any noise level.
        images: labelled images; by default those that ship with the package, whose labels count if the model has their
            classes.
        sigmas: noise levels, in units of `[0, 1]` pixels; 0 is the clean image.
        count: number of images.
        draws: noisy copies per image and noise level.
        n: draws per image, for the largest radius.
        alpha: probability of a wrong certificate, for the largest radius.

    Raises:
        ValueError: for images whose classes the model lacks.
    """
    module = smoothed.base_classifier.classifier
    layers = [layer for layer in (module.modules() if isinstance(module, nn.Module) else ()) if _is_norm(layer)]
    kinds = Counter(type(layer).__name__ for layer in layers)
    batch_statistics = {type(layer).__name__ for layer in layers if _uses_batch_statistics(layer)}
    pixels, labels = _read_images(smoothed, images, count)
    logits = _compute_clean_logits(smoothed, pixels)
    levels = [_check_level(smoothed, pixels, logits, labels, sigma, draws) for sigma in sorted(sigmas)]
    p_lower = float(clopper_pearson_lower(n, n, alpha))
    for level in levels:
        level["largest_radius"] = GaussianNoise(level["sigma"]).radius(p_lower) if level["sigma"] > 0 else 0.0
    return ModelCheck(
        dict(kinds),
        sorted(batch_statistics),
        levels,
        images=len(pixels),
        answers=len(set(logits.argmax(1).tolist())),
        classes=logits.shape[1],
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
) -> tuple[list[torch.Tensor], list[int | None]]:
    """Pixels of some random images and their classes, `None` where the model lacks them."""
    class_names = list(smoothed.class_names or ())
    if images is not None:
        inputs = images.bind(class_names, smoothed.preprocessing)
        readers = list(images.rows())
        sample = [readers[position] for position in np.random.default_rng(0).permutation(len(readers))[:count]]
        rows = [(index, read()) for index, read in sample]
        return [inputs.pixels(row) for _, row in rows], [inputs.label(index, row) for index, row in rows]
    demo = load_demo_images()
    has_names = not all(name.startswith("LABEL_") for name in class_names)
    try:
        to_class = match_classes(demo.features["label"].names, class_names) if has_names else None
    except ValueError:
        to_class = None
    sample = demo.select(np.random.default_rng(0).permutation(len(demo))[:count])
    pixels = [to_pixels(picture, smoothed.preprocessing) for picture in sample["image"]]
    return pixels, [None if to_class is None else to_class(label) for label in sample["label"]]


@torch.inference_mode()
def _compute_clean_logits(smoothed: SmoothedClassifier, pixels: list[torch.Tensor]) -> np.ndarray:
    groups = [image[None].to(smoothed.device) for image in pixels]  # images may differ in size
    size = smoothed.batch_size
    logits = [
        smoothed.base_classifier(groups[first : first + size], 0.0).float() for first in range(0, len(groups), size)
    ]
    return torch.cat(logits).cpu().numpy()


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
