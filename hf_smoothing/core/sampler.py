"""The sampler: fills forward passes with noisy draws of several images and passes their class counts to the rule."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .base_classifier import BaseClassifier
from .lattice import LatticeSampler, NoisyImage, SampledNoise
from .noise import SmoothingNoise
from .progress_bar import ProgressBar
from .rule_protocols import CleanPass, Counts, Outcomes, Rows, Rule, Runs

CountHead = Callable[[torch.Tensor, float], torch.Tensor]
"""Maps clean pixels `(batch, channels, height, width)` and sigma to expected class frequencies `(batch, classes)`."""

_FIRST_DRAWS = 8
"""Roughly how many draws each image requests after its clean pass."""


@dataclass(frozen=True)
class FinishedImages:
    """Images that have finished together; all fields have one element per image."""

    positions: list[int]
    """Places in the iterable of images."""
    outcomes: Outcomes
    counts: Counts
    num_samples: NDArray[np.int64]
    """Forward passes spent."""
    dimensions: list[int]
    """Numbers of pixel values."""


@dataclass
class _Batch:
    """A forward pass whose results the CPU has not seen yet."""

    rows: Rows
    draws: NDArray[np.int64]
    is_clean: NDArray[np.bool_]
    """Which of the rows got their clean pass, in place of draws."""
    counts: torch.Tensor
    """`(len(rows) * classes + 1,)`, on the device: class counts, then the number of draws without a finite logit."""
    clean_logits: torch.Tensor | None


class _ActiveImages:
    """
    The images that are being sampled: one row of arrays per image, which later images use again.

    Attributes:
        position: place in the iterable of images; -1 for a free row.
        started: whether the run of the image has started; before that it waits for its clean pass.
        to_launch, to_count: draws that the rule wants and that were not launched, or not counted, yet.
        counts: class counts of the draws that the rule does not know yet.
        num_samples: forward passes launched.
        size: the number of values of the image, rounded up, see [`Sampler`].
    """

    def __init__(self, num_rows: int, num_classes: int):
        self.noisy: list[NoisyImage | None] = [None] * num_rows
        self.free = list(range(num_rows - 1, -1, -1))
        self.position = np.full(num_rows, -1)
        self.started = np.zeros(num_rows, bool)
        self.to_launch, self.to_count, self.num_samples = (np.zeros(num_rows, np.int64) for _ in range(3))
        self.counts = np.zeros((num_rows, num_classes), np.int64)
        self.size = np.zeros(num_rows, np.int64)

    def add(self, position: int, noisy: NoisyImage) -> int:
        row = self.free.pop()
        self.noisy[row], self.position[row] = noisy, position
        self.started[row], self.num_samples[row] = False, 0
        self.to_launch[row] = self.to_count[row] = 1
        self.size[row] = _round_up(noisy.image.numel())
        return row

    def remove(self, rows: Rows) -> list[NoisyImage]:
        self.position[rows] = -1
        self.free += rows.tolist()
        return [self.noisy[row] for row in rows]  # type: ignore[misc]

    @property
    def rows(self) -> Rows:
        return np.flatnonzero(self.position >= 0)


@dataclass
class Sampler:
    """
    Samples images under a rule. Every forward pass is filled with `batch_size` draws, of as many images as it takes.

    On CUDA a second batch is launched before the results of the first are read, so that CPU and GPU work at the same time.
    The rule gets counts only once all draws that an image asked for are in, so that batches decide nothing.

    The sampler's error depends on the size of images. Images whose size has the same next power of two share runs.

    Args:
        base_classifier, noise, rule, seed, batch_size: see [`SmoothedClassifier`].
        count_head: replaces the clean pass, if the rule uses one.
        progress: a bar to update.
        batches_ahead: how many batches are launched before the results of one are read; by default 1 on CUDA, else 0.
    """

    base_classifier: BaseClassifier
    noise: SmoothingNoise
    rule: Rule
    seed: int
    batch_size: int
    count_head: CountHead | None = None
    progress: ProgressBar | None = None
    batches_ahead: int | None = None

    _runs: dict[int, Runs] = field(init=False, default_factory=dict)
    _active: _ActiveImages = field(init=False)
    _lattice: LatticeSampler = field(init=False)
    _first_batch: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self.device = self.base_classifier.device
        if self.batches_ahead is None:
            self.batches_ahead = int(self.device.type == "cuda")
        if not self.rule.uses_count_head:
            self.count_head = None
        self._lattice = LatticeSampler.on_device(self.noise, self.rule.method, self.seed, self.device)

    @torch.inference_mode()
    def sample(self, images: Iterable[torch.Tensor]) -> Iterator[FinishedImages]:
        """
        Yield images as they finish, in any order. Holds only as many images at a time as fill the batches.

        Takes pixels as [`to_pixels`] returns them, all of one shape unless the base classifier resizes them.

        Raises:
            TypeError: for images that are not float32 tensors.
            ValueError: for different shapes, logits that are not finite, or a count head that returns no frequencies.
        """
        waiting = enumerate(self._check(images))
        in_flight: deque[_Batch] = deque()
        while True:
            num_added = yield from self._admit(waiting)
            if batch := self._launch():
                in_flight.append(batch)
            elif not in_flight and not num_added:  # a count head may finish images without a draw
                return
            if in_flight and (not batch or len(in_flight) > (self.batches_ahead or 0)):
                yield from self._collect(in_flight.popleft())
            self._first_batch = False

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

    def _admit(self, waiting: Iterator[tuple[int, torch.Tensor]]) -> Generator[FinishedImages, None, int]:
        """Add waiting images until the active ones want a batch of draws; returns how many were added."""
        added: list[int] = []
        wanted = 0 if self._first_batch else int(self._active.to_launch.sum())
        # A first batch of clean passes alone would take a batch full of images away from other processes
        waits_for_clean_pass = self.rule.uses_clean_pass and self.count_head is None
        first_wanted = _FIRST_DRAWS if self._first_batch or not waits_for_clean_pass else 1
        while wanted < self.batch_size and (item := next(waiting, None)) is not None:
            position, pixels = item
            noisy = self._lattice.start(pixels)
            if position == 0:
                self._start_runs(noisy)
            added.append(self._active.add(position, noisy))
            if not self.rule.uses_clean_pass and self.count_head is None:
                self._start(np.array(added[-1:]), None)
                first_wanted = int(self._active.to_launch[added[-1]])
            wanted += first_wanted
        if added and self.count_head is not None:
            yield from self._ask_count_head(np.array(added), self.count_head)
        return len(added)

    def _start_runs(self, first: NoisyImage) -> None:
        if self.rule.uses_base_classifier:
            self.base_classifier.prepare(first.image, self.noise.sigma)
        num_classes = self.base_classifier.num_classes(first.image)
        self._active = _ActiveImages(self.batch_size * (1 + (self.batches_ahead or 0)), num_classes)
        # again: the sampler's error grows with the size of the images
        self.rule.check(SampledNoise(self.noise, _round_up(first.image.numel())))

    def _by_size(self, rows: Rows) -> Iterator[tuple[NDArray[np.int64], Runs]]:
        """The rows of each size, as indices into `rows`, and their runs."""
        sizes = self._active.size[rows]
        for size in np.unique(sizes).tolist():
            if size not in self._runs:
                noise = SampledNoise(self.noise, size)
                self._runs[size] = self.rule.start(noise, *self._active.counts.shape)
            yield np.flatnonzero(sizes == size), self._runs[size]

    def _start(self, rows: Rows, clean: CleanPass | None) -> None:
        active = self._active
        active.started[rows] = True
        for images, runs in self._by_size(rows):
            part = None if clean is None else CleanPass(clean.scores[images], clean.frequencies)
            active.to_launch[rows[images]] = active.to_count[rows[images]] = runs.start(rows[images], part)

    def _ask_count_head(self, rows: Rows, count_head: CountHead) -> Iterator[FinishedImages]:
        """Start images with the class frequencies that the count head predicts."""
        images = [self._active.noisy[row].image[None] for row in rows]  # type: ignore[union-attr]
        clean = torch.cat([self.base_classifier.denoise_and_resize(image, 0.0) for image in images])
        # one by one: in a batch, the last bits of a prediction would depend on its companions, and so could a certificate
        predicted = torch.cat([count_head(image[None], self.noise.sigma) for image in clean])
        frequencies = predicted.double().cpu().numpy()
        one_row_per_image = frequencies.shape[:1] == (len(rows),)
        if not one_row_per_image or not (np.abs(frequencies.sum(1) - 1) < 1e-3).all() or not (frequencies >= 0).all():
            raise ValueError("The count head must return class frequencies: for each image, shares of sum 1.")
        self._active.num_samples[rows] += 1
        self._start(rows, CleanPass(frequencies, frequencies=True))
        yield from self._finish(rows[self._active.to_count[rows] == 0])

    def _launch(self) -> _Batch | None:
        """Launch a forward pass of at most `batch_size` draws, oldest images first; `None` where no image wants draws."""
        if self._first_batch and not hasattr(self, "_active"):
            return None  # no images
        active = self._active
        rows = np.flatnonzero(active.to_launch)
        if not len(rows):
            return None
        rows = rows[np.argsort(active.position[rows])]
        before = np.cumsum(active.to_launch[rows]) - active.to_launch[rows]
        rows = rows[before < self.batch_size]
        draws = np.minimum(active.to_launch[rows], self.batch_size - before[: len(rows)])
        active.to_launch[rows] -= draws
        active.num_samples[rows] += draws
        is_clean = ~active.started[rows]
        logits = self.base_classifier(self._draw(rows, draws, is_clean), self.noise.sigma)
        clean_logits = None
        if is_clean.any():
            first_rows = np.cumsum(draws) - draws
            clean_logits = logits[torch.from_numpy(first_rows[is_clean]).to(logits.device)]
        return _Batch(rows, draws, is_clean, _count_classes(logits, draws), clean_logits)

    def _draw(self, rows: Rows, draws: NDArray[np.int64], is_clean: NDArray[np.bool_]) -> list[torch.Tensor]:
        """The pixels of a forward pass, in groups of one shape and kind."""
        images = [self._active.noisy[row] for row in rows]
        kinds = [(image.image.shape, clean) for image, clean in zip(images, is_clean)]  # type: ignore[union-attr]
        groups, start = [], 0
        for end in range(1, len(images) + 1):
            if end < len(images) and kinds[end] == kinds[start]:
                continue
            if is_clean[start]:
                groups.append(torch.stack([image.image for image in images[start:end]]))  # type: ignore[union-attr]
            else:
                groups.append(self._lattice.draw(images[start:end], draws[start:end].tolist()))  # type: ignore[arg-type]
            start = end
        return groups

    def _collect(self, batch: _Batch) -> Iterator[FinishedImages]:
        """Read the results of a forward pass, update the runs of its images, and yield those that are finished."""
        active, rows = self._active, batch.rows
        results = batch.counts.cpu().numpy()
        if results[-1]:
            raise ValueError("The base classifier returned logits that are not finite: it cannot be certified.")
        if batch.clean_logits is not None:
            self._start(rows[batch.is_clean], CleanPass(batch.clean_logits.double().cpu().numpy()))
        drawn = ~batch.is_clean
        rows, counts = rows[drawn], results[:-1].reshape(len(rows), -1)[drawn]
        active.counts[rows] += counts
        active.to_count[rows] -= batch.draws[drawn]
        complete = rows[active.to_count[rows] == 0]
        for images, runs in self._by_size(complete):
            part = complete[images]
            active.to_launch[part] = active.to_count[part] = runs.update(part, active.counts[part])
        active.counts[complete] = 0
        yield from self._finish(batch.rows[active.to_count[batch.rows] == 0])

    def _finish(self, rows: Rows) -> Iterator[FinishedImages]:
        active = self._active
        for images, runs in self._by_size(rows):
            part = rows[images]
            positions, num_samples = active.position[part].tolist(), active.num_samples[part]
            finished = active.remove(part)
            for image in finished:
                self._lattice.finish(image)
            dimensions = [image.image.numel() for image in finished]
            outcomes = runs.outcomes(part)
            if self.progress is not None:
                self.progress.finish(num_samples.tolist(), outcomes.radii.tolist())
            yield FinishedImages(positions, outcomes, runs.counts[part], num_samples, dimensions)
        if self.progress is not None and self.progress.is_due:
            self._show_progress(self.progress)

    def _show_progress(self, progress: ProgressBar) -> None:
        active, rows, radius = self._active, self._active.rows, 0.0
        if len(rows) == 1 and active.started[rows[0]]:
            _, runs = next(self._by_size(rows))
            radius = float(runs.outcomes(rows, active.counts[rows]).radii[0])
        draws, done = active.num_samples[rows], np.zeros(len(rows))
        for images, runs in self._by_size(rows):
            part = rows[images]
            planned = active.started[part] & runs.is_planned(part)
            done[images] = np.where(planned, draws[images] / (draws[images] + active.to_launch[part]), 0.0)
        progress.show(int(draws.sum()), float(done.sum()), radius)


def _round_up(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _count_classes(logits: torch.Tensor, draws: NDArray[np.int64]) -> torch.Tensor:
    """
    Class counts of logits `(rows, classes)`, `draws[i]` rows for image i, and in a last cell the number of rows whose
    largest logit is not finite; one vector, on the device.
    """
    num_cells = len(draws) * logits.shape[1]
    largest, classes = logits.max(1)  # NaN where a row has one
    if len(draws) > 1:
        images = torch.from_numpy(np.repeat(np.arange(0, num_cells, logits.shape[1]), draws))
        classes += images.to(logits.device, non_blocking=True)
    return torch.bincount(torch.where(largest.isfinite(), classes, num_cells), minlength=num_cells + 1)


_Item = TypeVar("_Item")


def in_order(stream: Iterable[tuple[int, _Item]]) -> Iterator[_Item]:
    """Items in the order of their positions, each as soon as those before it are there."""
    early: dict[int, _Item] = {}
    following = 0
    for position, item in stream:
        early[position] = item
        while following in early:
            yield early.pop(following)
            following += 1
