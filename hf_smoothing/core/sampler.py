"""The sampler: fills forward passes with noisy draws of several images and passes their class counts to the rule."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .base_classifier import BaseClassifier
from .certificates import Certificate
from .noise import NoisyImage, SmoothingNoise, image_key
from .progress_bar import ProgressBar
from .rule_protocols import CleanPass, Counts, Rule, Run

CountHead = Callable[[torch.Tensor, float], torch.Tensor]
"""Maps clean pixels `(batch, channels, height, width)` and sigma to expected class frequencies `(batch, classes)`."""

_FIRST_DRAWS = 8
"""Roughly how many draws each image requests after its clean pass."""


@dataclass(eq=False)
class ActiveImage:
    """An image that is being sampled. Without a run it waits for its clean pass, from which the rule starts one."""

    position: int
    noisy: NoisyImage
    num_samples: int = 0
    """Forward passes spent on it."""
    wanted: int = 1
    """Forward passes that it waits for; 0 when it is finished."""
    run: Run | None = None

    def start(self, run: Run) -> None:
        self.run = run
        self.wanted = run.next_draws()
        self.pending = np.zeros_like(run.counts)

    @property
    def finished(self) -> bool:
        return self.wanted == 0

    def draw(self, count: int) -> torch.Tensor:
        """Pixels `(count, channels, height, width)` of the next forward passes."""
        return self.noisy.image[None] if self.run is None else self.noisy.draw(count)

    def add(self, counts: Counts, draws: int) -> None:
        """Collect counts. The run gets them once all draws that it asked for are in, so that batch sizes decide nothing."""
        assert self.run is not None
        self.pending += counts
        self.wanted -= draws
        if self.wanted == 0:
            self.run.update(self.pending)
            self.pending = np.zeros_like(self.pending)
            self.wanted = self.run.next_draws()


@dataclass
class Sampler:
    """
    Samples images under a rule. Every forward pass is filled with `batch_size` draws, of as many images as it takes.

    The count head, if any, replaces the base classifier in the clean pass.
    """

    base_classifier: BaseClassifier
    noise: SmoothingNoise
    rule: Rule
    seed: int
    batch_size: int
    count_head: CountHead | None
    progress: ProgressBar | None

    _first_batch = True

    @torch.inference_mode()
    def sample(self, images: Iterable[torch.Tensor]) -> Iterator[ActiveImage]:
        """
        Yield images as they finish, in any order. Holds only as many images at a time as fill a batch.

        Takes pixels as [`to_pixels`] returns them, all of one shape unless the base classifier resizes them.

        Raises:
            TypeError: for images that are not float32 tensors.
            ValueError: for different shapes, logits that are not finite, or a count head that returns no frequencies.
        """
        waiting = enumerate(self._check(images))
        active: list[ActiveImage] = []
        while True:
            self._admit(waiting, active)
            if not active:
                return
            if self.count_head is not None and self.rule.uses_clean_pass:
                self._ask_count_head([image for image in active if image.run is None], self.count_head)
            if unfinished := [image for image in active if not image.finished]:
                self._run_batch(unfinished)
            self._first_batch = False
            finished = [image for image in active if image.finished]
            active = [image for image in active if not image.finished]
            yield from finished
            if self.progress is not None:
                self.progress.update(
                    [image.num_samples for image in finished], [image.num_samples for image in active]
                )

    def _check(self, images: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        shape: torch.Size | None = None
        for position, pixels in enumerate(images):
            if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.float32:
                raise TypeError(f"Image {position} is no float32 tensor: convert it with preprocessing.to_pixels.")
            shape = shape or pixels.shape
            if pixels.shape != shape and self.base_classifier.resize is None:
                raise ValueError(
                    f"Image {position} has shape {tuple(pixels.shape)}, the first one {tuple(shape)}: make the sizes equal."
                )
            yield pixels

    def _admit(self, waiting: Iterator[tuple[int, torch.Tensor]], active: list[ActiveImage]) -> None:
        """Add waiting images until the active ones want a batch of draws."""
        wanted = sum(map(self._expected_draws, active))
        while wanted < self.batch_size and (item := next(waiting, None)) is not None:
            active.append(self._activate(*item))
            wanted += self._expected_draws(active[-1])

    def _expected_draws(self, image: ActiveImage) -> int:
        # A first batch of clean passes alone would take a batch full of images away from other processes
        return _FIRST_DRAWS if self._first_batch and image.run is None else image.wanted

    def _activate(self, position: int, pixels: torch.Tensor) -> ActiveImage:
        key = image_key(pixels, self.seed)
        pixels = pixels.to(self.base_classifier.device)
        image = ActiveImage(position, self.noise.noisy_copies(pixels, key))
        if position == 0:
            self.rule.check(image.noisy)  # again: the sampler's error grows with the size of the images
        if not self.rule.uses_clean_pass:
            num_classes = self.base_classifier.num_classes(pixels)
            image.start(self.rule.start(image.noisy, CleanPass(np.zeros(num_classes))))
        return image

    def _ask_count_head(self, images: list[ActiveImage], count_head: CountHead) -> None:
        """Start images with the class frequencies that the count head predicts."""
        if not images:
            return
        clean = torch.cat([self.base_classifier.denoise_and_resize(image.noisy.image[None], 0.0) for image in images])
        frequencies = count_head(clean, self.noise.sigma).double().cpu().numpy()
        one_row_per_image = frequencies.shape[:1] == (len(images),)
        if not one_row_per_image or not (np.abs(frequencies.sum(1) - 1) < 1e-3).all() or not (frequencies >= 0).all():
            raise ValueError("The count head must return class frequencies: for each image, shares of sum 1.")
        for image, row in zip(images, frequencies):
            image.num_samples += 1
            image.start(self.rule.start(image.noisy, CleanPass(row, frequencies=True)))

    def _run_batch(self, active: list[ActiveImage]) -> None:
        """Run one forward pass of at most `batch_size` draws, oldest images first, and update these images."""
        batch: list[tuple[ActiveImage, int]] = []
        room = self.batch_size
        for image in active:
            if draws := min(image.wanted, room):
                batch.append((image, draws))
                room -= draws
        logits = self.base_classifier([image.draw(draws) for image, draws in batch], self.noise.sigma)
        counts = _count_classes(logits, [draws for _, draws in batch])
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("The base classifier returned logits that are not finite: it cannot be certified.")
        first_row = 0
        for (image, draws), image_counts in zip(batch, counts):
            image.num_samples += draws
            if image.run is None:
                scores = logits[first_row].double().cpu().numpy()
                image.start(self.rule.start(image.noisy, CleanPass(scores)))
            else:
                image.add(image_counts, draws)
            first_row += draws


def _count_classes(logits: torch.Tensor, draws: Sequence[int]) -> NDArray[np.int64]:
    """Class counts `(images, classes)` from logits `(rows, classes)`: `draws[i]` rows for image i."""
    num_images, num_classes = len(draws), logits.shape[1]
    images = torch.repeat_interleave(torch.tensor(draws, device=logits.device))  # i, draws[i] times
    votes = images * num_classes + logits.argmax(1)
    return torch.bincount(votes, minlength=num_images * num_classes).view(-1, num_classes).cpu().numpy()


def in_order(stream: Iterable[tuple[int, Certificate]]) -> Iterator[Certificate]:
    """Certificates in the order of their images, each as soon as those before it are finished."""
    early: dict[int, Certificate] = {}
    following = 0
    for position, certificate in stream:
        early[position] = certificate
        while following in early:
            yield early.pop(following)
            following += 1
