"""Faults of base classifiers and settings that make certificates small or impossible: what causes them, and the fix."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from ..core.certificates import format_radius
from ..core.fixed_rule import FixedRule
from ..core.noise import GaussianNoise
from ..core.row_independence import DependentRowsError, RandomLogitsError
from ..core.smoothing import SmoothedClassifier

Pixels = list[torch.Tensor]


@dataclass(frozen=True)
class Fault:
    """
    A fault of a model or of settings.

    Attributes:
        kind: its name in one or two words.
        cause: one sentence.
        fix: one sentence.
    """

    kind: str
    cause: str
    fix: str

    def __str__(self) -> str:
        return f"{self.cause} {self.fix}"


@torch.inference_mode()
def compute_logits(smoothed: SmoothedClassifier, pixels: Pixels) -> NDArray[np.float32]:
    """Logits `(images, classes)` of clean images, which may differ in size."""
    groups = [image[None].to(smoothed.device) for image in pixels]
    size = smoothed.batch_size
    logits = [
        smoothed.base_classifier(groups[first : first + size], 0.0).float() for first in range(0, len(groups), size)
    ]
    return torch.cat(logits).cpu().numpy()


_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
"""What a classifier raises that does not take its input."""


def find_fatal_fault(smoothed: SmoothedClassifier, pixels: Pixels) -> Fault | None:
    """A fault without whose fix nothing else can be said of a model: it fails, or its logits are not finite."""
    try:
        logits = compute_logits(smoothed, pixels)
    except _FAILURES as error:
        shape = "x".join(map(str, pixels[0].shape))
        return Fault(
            "no logits",
            f"It fails on a batch of {shape} pixels: {_first_line(error)}",
            "Give a callable from RGB pixels (batch, 3, height, width) to logits (batch, classes), and the size of its "
            "images (image_size; --image-size on the command line).",
        )
    if not np.isfinite(logits).all():
        half = "16" in smoothed.base_classifier.precision
        return Fault(
            "overflow" if half else "not finite",
            f"Its logits are not finite in {smoothed.base_classifier.precision}.",
            "float16 ends at 65,504: use bfloat16 or float32."
            if half
            else "The checkpoint is broken or a layer divides by 0: look at the weights.",
        )
    return None


def find_draws_fault(smoothed: SmoothedClassifier, pixels: Pixels, sigma: float) -> Fault | None:
    """A fault that makes draws at noise level `sigma` worthless: logits that depend on each other, are random, or none."""
    try:
        smoothed.base_classifier.prepare(pixels[0].to(smoothed.device), sigma)
    except (DependentRowsError, RandomLogitsError) as error:
        cause, _, fix = str(error).rpartition(". ")
        return Fault("rows" if isinstance(error, DependentRowsError) else "randomness", f"{cause}.", fix)
    except _FAILURES as error:
        return Fault(
            "noisy copies",
            f"It fails on noisy copies at sigma {sigma:g}: {_first_line(error)}",
            "Noise takes pixels out of [0, 1]: take any values, and batches of any size.",
        )
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


_NORMALIZATIONS = {
    "of ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "of CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "to [-1, 1]": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of each channel, in `[0, 1]` pixels."""

_MIN_EVIDENCE = 0.002
"""Largest probability with which chance alone makes another input look better."""


Change = Callable[[torch.Tensor], torch.Tensor]
"""Another input in place of the pixels of an image."""


def find_input_faults(smoothed: SmoothedClassifier, pixels: Pixels, labels: Sequence[int | None]) -> list[Fault]:
    """
    The faults of a classifier that expects other values than `[0, 1]` pixels: it is right more often about those.

    There are two at most: another order of the channels, and other values of the pixels.
    """
    if None in labels or pixels[0].shape[0] != 3:
        return []
    inputs = _other_inputs(smoothed)
    if (first := _find_input_fault(smoothed, pixels, labels, inputs)) is None:
        return []
    fault, change = first
    order = fault.kind == "channel order"
    further = [(other, by) for other, by in inputs if (other.kind == "channel order") != order]
    second = _find_input_fault(smoothed, [change(image) for image in pixels], labels, further, " with that")
    return [fault] if second is None else [fault, second[0]]


def _find_input_fault(
    smoothed: SmoothedClassifier,
    pixels: Pixels,
    labels: Sequence[int | None],
    inputs: Sequence[tuple[Fault, Change]],
    given: str = "",
) -> tuple[Fault, Change] | None:
    """The one that makes most of the difference, with its change, if chance is no explanation."""
    right, faults = compute_logits(smoothed, pixels).argmax(1) == labels, dict[float, tuple[Fault, Change]]()
    for fault, change in inputs:
        changed = compute_logits(smoothed, [change(image) for image in pixels]).argmax(1) == labels
        better, worse = int((changed & ~right).sum()), int((~changed & right).sum())
        chance = float(stats.binom.sf(better - 1, better + worse, 0.5)) if better else 1.0
        figures = f"{right.mean():.0%} of {len(pixels)} images are right{given}, and {changed.mean():.0%} so."
        faults.setdefault(chance, (Fault(fault.kind, f"{fault.cause}: {figures}", fault.fix), change))
    least = min(faults)
    return faults[least] if least < _MIN_EVIDENCE else None


def _normalize(image: torch.Tensor, center: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (image - center) / scale


def _other_inputs(smoothed: SmoothedClassifier) -> list[tuple[Fault, Change]]:
    """What a classifier may expect in place of `[0, 1]` pixels."""
    inside = "Do that inside the classifier, after the noise: sigma and radii are in [0, 1] pixels."
    inputs: list[tuple[Fault, Change]] = [
        (Fault("0 to 255", "It expects pixels from 0 to 255", inside), lambda image: image * 255),
        (Fault("channel order", "It expects the channels as blue, green, red", inside), lambda image: image.flip(0)),
    ]
    for name, (mean, std) in _NORMALIZATIONS.items():
        center, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        missing = Fault("normalization", f"It expects normalized pixels ({name})", inside)
        inputs.append((missing, partial(_normalize, center=center, scale=scale)))
    preprocessing = smoothed.preprocessing
    if preprocessing is not None and preprocessing.mean is not None and preprocessing.std is not None:
        center, scale = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        twice = Fault(
            "normalized twice",
            "The image processor and the model both normalize",
            "Set do_normalize=False in the image processor, or leave it to the image processor.",
        )
        inputs.append((twice, lambda image: image * scale + center))
    return inputs


def find_budget_faults(n: int, alpha: float, sigma: float, radii: Sequence[float]) -> list[Fault]:
    """Faults of settings: draws that prove nothing, or radii that they cannot prove at noise level `sigma`."""
    noise = GaussianNoise(sigma)
    largest = FixedRule(n=n, alpha=alpha).largest_radius(noise)
    if largest <= 0:
        needed = math.floor(math.log(alpha) / math.log(0.5)) + 1
        return [
            Fault(
                "too few draws",
                f"Everything abstains: {n:,} draws prove nothing at alpha = {alpha:g}, even if all of them agree.",
                f"Take {needed} draws or more; thousands for larger radii.",
            )
        ]
    if not (beyond := [radius for radius in radii if radius > largest]):
        return []
    needed = max(
        math.floor(math.log(alpha) / math.log(float(noise.probability_needed(radius)))) + 1 for radius in beyond
    )
    return [
        Fault(
            "radius out of reach",
            f"{n:,} draws prove at most radius {format_radius(largest)} at sigma {sigma:g}, and "
            f"{', '.join(f'{radius:g}' for radius in beyond)} was asked for.",
            f"Take {needed:,} draws or more, or a larger sigma." if needed < 10**8 else "Take a larger sigma.",
        )
    ]


_MUCH_SMALLER = 1.5
"""Pictures that are this many times larger than what the noise is added to make a radius mean something else."""


def find_resize_fault(smoothed: SmoothedClassifier, pictures: Sequence[Image.Image], pixels: Pixels) -> list[Fault]:
    """The fault of noise that is added to a picture after it was made much smaller."""
    if smoothed.noise_resolution == "native":
        return []
    sizes = [(picture.width, picture.height) for picture in pictures]
    ratios = [max(width / image.shape[2], height / image.shape[1]) for (width, height), image in zip(sizes, pixels)]
    if np.median(ratios) < _MUCH_SMALLER:
        return []
    (width, height), (_, rows, columns) = sizes[0], pixels[0].shape
    return [
        Fault(
            "resized",
            f"Pictures such as the first, {width}x{height}, are resized to {columns}x{rows} before the noise is added, so a "
            f"radius is a distance between {columns}x{rows} pictures: in the original, the same change is about "
            f"{ratios[0]:.1f} times as large.",
            "Say so with the radius, or pass noise_resolution='native'.",
        )
    ]
