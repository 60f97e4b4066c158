"""Images under way in the engine, the bar that shows how far they are, and their certificates in order."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from tqdm.auto import tqdm

from .certificates import Certificate
from .noise import NoisyImage
from .sampling_rule import Counts, Run


class ActiveImage:
    """An image that is being sampled. Without a run it waits for its clean pass, from which the rule starts one."""

    def __init__(self, position: int, noisy: NoisyImage, run: Run | None):
        self.position = position
        self.noisy = noisy
        self.num_samples = 0
        self.wanted = 1
        self.run: Run | None = None
        if run is not None:
            self.begin(run)

    def begin(self, run: Run) -> None:
        self.run = run
        self.wanted = run.next_draws()
        self.pending = np.zeros_like(run.counts)

    @property
    def finished(self) -> bool:
        return self.wanted == 0

    def rows(self, count: int) -> torch.Tensor:
        return self.noisy.image[None] if self.run is None else self.noisy.draw(count)

    def take(self, counts: Counts, draws: int) -> None:
        """Collect counts; the run sees them once all draws it asked for are in, so that batches never decide anything."""
        assert self.run is not None
        self.pending += counts
        self.wanted -= draws
        if self.wanted == 0:
            self.run.update(self.pending)
            self.pending = np.zeros_like(self.pending)
            self.wanted = self.run.next_draws()


class ProgressBar:
    """Images done, draws a second and time left; an image in progress counts by the part of its budget it has used."""

    def __init__(self, total: int | None, budget: int):
        self.budget = budget
        self.done = 0
        self.draws_of_done = 0
        self.bar = tqdm(
            total=total,
            desc="certifying",
            # without counts: images under way make `n` a fraction
            bar_format="{desc} "
            + ("{percentage:3.0f}%|{bar}| {elapsed}<{remaining}" if total else "{elapsed}")
            + "{postfix}",
        )

    def update(self, active: list[ActiveImage]) -> None:
        finished = [image for image in active if image.finished]
        self.done += len(finished)
        self.draws_of_done += sum(image.num_samples for image in finished)
        under_way = [image.num_samples for image in active if not image.finished]
        elapsed = self.bar.format_dict["elapsed"] or 1e-9
        rate = (self.draws_of_done + sum(under_way)) / elapsed
        self.bar.set_postfix_str(f"{self.done} images, {rate:.0f} draws/s", refresh=False)
        self.bar.update(self.done + sum(under_way) / self.budget - self.bar.n)

    def close(self) -> None:
        self.bar.close()


def in_order(stream: Iterable[tuple[int, Certificate]]) -> Iterator[Certificate]:
    """Certificates in the order of their images, each as soon as those before it are there."""
    early: dict[int, Certificate] = {}
    following = 0
    for position, certificate in stream:
        early[position] = certificate
        while following in early:
            yield early.pop(following)
            following += 1
