"""Claims that grow while noisy copies are drawn, and that hold whenever drawing stops.

The claims are those of the sequential rule (see `core/bets.py`) for many radii in small steps. Its e-values are bets that do
not grow on average while a claim is false. So by Ville's inequality, the probability that any claim that is ever shown is
wrong is at most alpha: the first wrong one includes the smallest radius that is too large, or a wrong class. Someone may
watch all claims and stop at any of them.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.certificates import ABSTAIN
from ..core.lattice import LatticeSampler, SampledNoise, choose_seed
from ..core.noise import SmoothingNoise
from ..core.rule_protocols import CleanPass
from ..core.sequential_rule import SequentialRule
from ..core.smoothing import SmoothedClassifier

ALPHA = 0.001
MAX_DRAWS = 10_000
RADIUS_STEP = 0.02
"""Step from one radius that can be claimed to the next, in units of sigma."""

_FIRST_DRAWS = 8
_QUICK, _SLOW = 0.12, 0.5
"""Seconds per batch: a quicker one is followed by a batch of twice the size, a slower one by half the size."""


def make_live_rule(noise: SmoothingNoise, alpha: float = ALPHA, max_draws: int = MAX_DRAWS) -> SequentialRule:
    """The rule that decides radii in steps of `RADIUS_STEP` sigma, from 0 to what `max_draws` equal draws can show."""
    largest = float(noise.radius(alpha ** (1 / max_draws)))
    radii = np.arange(0, largest, RADIUS_STEP * noise.sigma)
    return SequentialRule(tuple(radii.tolist()), alpha, max_draws)


@dataclass(frozen=True)
class LiveClaim:
    """
    What can be claimed after some draws of one image.

    Attributes:
        prediction: the class that is proved to lead, or `ABSTAIN` while none is.
        radius: no change of the image smaller than this changes the prediction (l2, `[0, 1]` pixels); 0 on abstention.
        counts: `(classes,)`, how often each class was predicted.
        copies: `(draws, channels, height, width)`, the noisy copies of the last batch, and `classes` `(draws,)`, what the
            base classifier takes them for.
        is_final: whether drawing has ended: at `max_draws`, or where the rest of them is unlikely to enlarge the radius.
    """

    prediction: int
    radius: float
    counts: NDArray[np.int64]
    copies: torch.Tensor
    classes: NDArray[np.int64]
    is_final: bool

    @property
    def draws(self) -> int:
        return int(self.counts.sum())

    @property
    def leader(self) -> int:
        """The class predicted most often, proved to lead or not."""
        return int(self.counts.argmax())

    @property
    def abstains(self) -> bool:
        return self.prediction == ABSTAIN


def watch_claims(smoothed: SmoothedClassifier, pixels: torch.Tensor, rule: SequentialRule) -> Iterator[LiveClaim]:
    """
    Draw noisy copies of one image and yield what can be claimed after each batch. Every claim holds, see the top of this
    file.

    The seed comes from the operating system. Batches grow while they are quick, so that the first claim comes soon.

    Args:
        smoothed: the smoothed classifier.
        pixels: the image `(channels, height, width)`, as [`to_pixels`] returns it.
        rule: as [`make_live_rule`] makes it.

    Raises:
        ValueError: for a base classifier that cannot be certified: rows that depend on each other, logits not finite.
    """
    sigma = smoothed.noise.sigma
    lattice = LatticeSampler.on_device(smoothed.noise, "live", choose_seed(), smoothed.device)
    image = lattice.start(pixels)
    with torch.inference_mode():
        smoothed.base_classifier.prepare(image.image, sigma)
        clean = smoothed.base_classifier([image.image[None]], sigma).double().cpu().numpy()
    row = np.zeros(1, np.int64)
    runs = rule.start(SampledNoise(smoothed.noise, pixels.numel()), 1, clean.shape[1])
    runs.start(row, CleanPass(clean))
    size, left, wanted = _FIRST_DRAWS, rule.max_draws, 1
    while left and wanted:
        started = time.monotonic()
        size = min(size, left)
        with torch.inference_mode():
            copies = lattice.draw([image], [size])
            logits = smoothed.base_classifier([copies], sigma)
        if not bool(logits.isfinite().all()):
            raise ValueError("The base classifier returned logits that are not finite: it cannot be certified.")
        classes = logits.argmax(1).cpu().numpy()
        left -= size
        (wanted,) = runs.update(row, np.bincount(classes, minlength=clean.shape[1])[None])
        outcomes = runs.outcomes(row)
        yield LiveClaim(
            prediction=int(outcomes.predictions[0]),
            radius=float(outcomes.radii[0]),
            counts=runs.counts[0].copy(),
            copies=copies.cpu(),
            classes=classes,
            is_final=not (left and wanted),
        )
        seconds = time.monotonic() - started
        if seconds < _QUICK and size < smoothed.batch_size:
            size *= 2
        elif seconds > _SLOW and size > 1:
            size //= 2
    lattice.finish(image)
