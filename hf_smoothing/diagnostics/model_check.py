"""Is a model worth smoothing? A look of a minute, before anything is certified."""

import time
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

_SHARE_KEPT = 0.75
"""A model that keeps less of its answers, or of its accuracy, under noise than this has little to certify there."""

_FEWEST = 8
"""Pictures to look at, however slow the model: of fewer nothing can be said."""


@dataclass(frozen=True)
class ModelCheck:
    """
    What a look at a model found.

    Attributes:
        norm_layers: how many of each kind of normalisation layer.
        batch_statistics: those of them that normalise by statistics of training batches.
        levels: for each noise level, a dict of `sigma`; `same_answer`, the share of noisy copies that are answered as the
            clean picture; `accuracy`, their share that is right, or `None` where the labels are unknown; and
            `largest_radius`, the most that `n` draws can show there.
        images: pictures looked at.
        answers: different answers to them without noise.
        classes: of the model.
        draws_per_second: noisy copies a second, in batches of `batch_size`.
        n: draws of the usual protocol.
        batch_size: as above.
        device: where.
    """

    norm_layers: dict[str, int]
    batch_statistics: list[str]
    levels: list[dict[str, Any]]
    images: int
    answers: int
    classes: int
    draws_per_second: float
    n: int
    batch_size: int
    device: str

    def advice(self) -> list[str]:
        """What to make of it, a sentence or two each."""
        said = []
        if self.batch_statistics:
            said.append(
                f"It normalises by batch statistics ({', '.join(self.batch_statistics)}): those of clean pictures are wrong "
                "for noisy ones, and robustness learned at one noise level does not carry over (arXiv 2312.09020). Prefer a "
                "model with LayerNorm or GroupNorm."
            )
        if self.answers == 1 and self.images > 1:
            said.append("It answers all of these pictures alike, so keeping its answers says nothing: is it trained?")
            return said
        accuracy = self.levels[0]["accuracy"] if self.levels[0]["sigma"] == 0 else None
        if accuracy is not None and self._may_be_guessing(accuracy):
            said.append(
                f"It is right about {accuracy:.0%} of {self.images} clean pictures, which guessing might be too: keeping "
                "its answers says nothing. Is it trained, and for these classes?"
            )
            return said
        noisy = [level for level in self.levels if level["sigma"] > 0]
        kept = [
            level["sigma"]
            for level in noisy
            if level["same_answer"] >= _SHARE_KEPT
            and (accuracy is None or level["accuracy"] >= _SHARE_KEPT * accuracy)
        ]
        if kept:
            said.append(f"It keeps its answers up to sigma {max(kept):g}: worth smoothing there.")
        else:
            least = noisy[0]
            right = "" if least["accuracy"] is None else f" and is right about {least['accuracy']:.0%}"
            said.append(
                f"Not worth smoothing as it is: at sigma {least['sigma']:g} it keeps {least['same_answer']:.0%} of its "
                f"answers{right}. Finetune it on noisy images (scripts/finetune.py --sigmas), or put a denoiser in front."
            )
        return said

    def _may_be_guessing(self, accuracy: float) -> bool:
        """Whether as many right answers or more are nothing unusual (1 in 20) for one who guesses."""
        right = round(accuracy * self.images)
        return stats.binomtest(right, self.images, 1 / self.classes, alternative="greater").pvalue > 0.05

    def seconds(self, images: int) -> float:
        """About how long the usual protocol takes for so many images."""
        return images * self.n / self.draws_per_second


def check_model(
    smoothed: SmoothedClassifier,
    images: LabelledImages | None = None,
    *,
    sigmas: Sequence[float] = SIGMAS,
    count: int = 20,
    draws: int = 4,
    n: int = 100_000,
    alpha: float = 0.001,
    seconds: float = 20.0,
) -> ModelCheck:
    """
    Look at a model.

    Args:
        smoothed: from `SmoothedClassifier.from_pretrained`, at any noise level.
        images: pictures with labels; by default those that ship with the package, whose labels count if the model has
            their classes.
        sigmas: noise levels, in `[0, 1]` pixels; 0 is the clean picture.
        count: pictures to look at.
        draws: noisy copies of each at each level.
        n: draws for the largest radius and the time.
        alpha: probability of a wrong certificate, for the largest radius.
        seconds: about how long it may take: slow models are shown fewer pictures, but eight at least, and fewer copies.

    Raises:
        ValueError: for images whose classes are not the model's.
    """
    module = smoothed.base_classifier.classifier
    layers = [layer for layer in (module.modules() if isinstance(module, nn.Module) else ()) if _is_norm(layer)]
    kinds = Counter(type(layer).__name__ for layer in layers)
    by_batch = {type(layer).__name__ for layer in layers if _normalises_by_batch(layer)}
    pixels, labels = _pictures(smoothed, images, count)
    rate = _draws_per_second(smoothed, pixels[:1], seconds / 3)
    a_level = rate * 2 * seconds / 3 / len(sigmas)
    fits = max(_FEWEST, int(a_level / draws))
    draws = max(1, min(draws, int(a_level / min(fits, len(pixels)))))
    pixels, labels = pixels[:fits], labels[:fits]
    logits = _clean_logits(smoothed, pixels)
    clean, classes = logits.argmax(1), logits.shape[1]
    levels = [_level(smoothed, pixels, clean, labels, sigma, draws, n, alpha) for sigma in sorted(sigmas)]
    return ModelCheck(
        dict(kinds),
        sorted(by_batch),
        levels,
        len(pixels),
        len(set(clean.tolist())),
        classes,
        rate,
        n,
        smoothed.batch_size,
        str(smoothed.device),
    )


def _is_norm(layer: nn.Module) -> bool:
    """Whether a layer normalises: by what it keeps for that, since some (timm's) have an activation inside."""
    return "norm" in type(layer).__name__.lower() and (
        not list(layer.children()) or bool(list(layer.parameters(recurse=False))) or _normalises_by_batch(layer)
    )


def _normalises_by_batch(layer: nn.Module) -> bool:
    # some models bring frozen ones of their own, which are of no common class
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) or (
        "batchnorm" in type(layer).__name__.lower() and hasattr(layer, "running_mean")
    )


def _pictures(
    smoothed: SmoothedClassifier, images: LabelledImages | None, count: int
) -> tuple[list[torch.Tensor], list[int | None]]:
    names = list(smoothed.class_names or ())
    if images is not None:
        inputs = images.bind(names, smoothed.preprocessing)
        readers = list(images.rows())
        sample = [readers[position] for position in np.random.default_rng(0).permutation(len(readers))[:count]]
        rows = [(index, read()) for index, read in sample]
        return [inputs.pixels(row) for _, row in rows], [inputs.label(index, row) for index, row in rows]
    shipped = load_demo_images()
    nameless = all(name.startswith("LABEL_") for name in names)  # which has the classes of nothing in particular
    try:
        to_class = None if nameless else match_classes(shipped.features["label"].names, names)
    except ValueError:
        to_class = None
    chosen = shipped.select(np.random.default_rng(0).permutation(len(shipped))[:count])
    pixels = [to_pixels(picture, smoothed.preprocessing) for picture in chosen["image"]]
    return pixels, [None if to_class is None else to_class(label) for label in chosen["label"]]


def _draws_per_second(smoothed: SmoothedClassifier, pixels: list[torch.Tensor], seconds: float) -> float:
    """The rate in full batches, from three of them, or as many as fit into the time."""
    smoothed.certify(pixels, method="counts", n=8)  # the first passes set things up
    started, timed = time.perf_counter(), 0
    # none that would end after the time is up
    while timed < 3 and (not timed or (time.perf_counter() - started) * (timed + 1) / timed < seconds):
        smoothed.certify(pixels, method="counts", n=smoothed.batch_size, seed=timed)
        timed += 1
    return timed * smoothed.batch_size / (time.perf_counter() - started)


@torch.inference_mode()
def _clean_logits(smoothed: SmoothedClassifier, pixels: list[torch.Tensor]) -> np.ndarray:
    # each picture is a group: they may be of different sizes
    groups = [one[None].to(smoothed.device) for one in pixels]
    size = smoothed.batch_size
    found = [
        smoothed.base_classifier(groups[first : first + size], 0.0).float() for first in range(0, len(groups), size)
    ]
    return torch.cat(found).cpu().numpy()


def _level(
    smoothed: SmoothedClassifier,
    pixels: list[torch.Tensor],
    clean: np.ndarray,
    labels: list[int | None],
    sigma: float,
    draws: int,
    n: int,
    alpha: float,
) -> dict[str, Any]:
    known = None not in labels
    if sigma == 0:
        right = np.mean(clean == np.array(labels)) if known else None
        return {
            "sigma": 0.0,
            "same_answer": 1.0,
            "accuracy": None if right is None else float(right),
            "largest_radius": 0.0,
        }
    noise = GaussianNoise(sigma)
    counts = np.array([one.counts for one in smoothed.with_noise(noise).certify(pixels, method="counts", n=draws)])
    rows = np.arange(len(counts))
    return {
        "sigma": sigma,
        "same_answer": float(counts[rows, clean].mean() / draws),
        "accuracy": float(counts[rows, np.array(labels)].mean() / draws) if known else None,
        "largest_radius": noise.radius(float(clopper_pearson_lower(n, n, alpha))),
    }
