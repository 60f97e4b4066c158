"""The progress bar of a run."""

import time

from tqdm.auto import tqdm

from .work_queue import REFRESH_SECONDS, WorkQueue

_WORDS = {"counts": ("counting", None), "surrogate": ("estimating", "claimed")}
"""By method, where the result is no certificate: what the bar says it does, and what it calls a right image."""


class Progress:
    """
    A bar with images done, draws per second, certified or claimed accuracy so far, and time left.

    Args:
        queue: the work queue of the run.
        before: for each sigma, the images that were done before this start, and how many of them were right.
        radius: the radius at which a right prediction must be certified to count.
        total: number of images, or an upper bound, if one is known.
        shown: whether this process shows the bar.
        method: of the run: `counts` and `surrogate` do not certify.
    """

    def __init__(
        self,
        queue: WorkQueue,
        before: dict[float, tuple[int, int]],
        radius: float,
        total: int | None,
        shown: bool,
        method: str,
    ):
        self.queue = queue
        self.before = before
        self.radius = radius
        verb, self.participle = _WORDS.get(method, ("certifying", "certified"))
        # smoothing 0: images differ in cost, so the mean rate predicts the time left best
        self.bar = tqdm(
            desc=verb,
            total=total,
            initial=sum(images for images, _ in before.values()),
            unit="image",
            smoothing=0,
            disable=not shown,
        )
        self.started = self.updated = time.monotonic()

    def update(self, sigma: float, at_once: bool = False) -> None:
        """Show the progress of all processes and the accuracy at `sigma`; unless `at_once`, only now and then."""
        now = time.monotonic()
        if self.bar.disable or (now - self.updated < REFRESH_SECONDS and not at_once):
            return
        self.updated = now
        images = {level: before + self.queue.total(f"images {level}") for level, (before, _) in self.before.items()}
        right = self.before[sigma][1] + self.queue.total(f"right {sigma}")
        rate = self.queue.total("draws") / (now - self.started)
        share = f"{right / max(images[sigma], 1):.1%} {self.participle} at radius {self.radius:g} (sigma {sigma:g})"
        self.bar.set_postfix_str(f"{rate:.0f} draws/s{f', {share}' if self.participle else ''}", refresh=False)
        self.bar.update(sum(images.values()) - self.bar.n)
