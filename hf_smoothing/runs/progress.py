"""The progress bar of a run."""

import time

from tqdm.auto import tqdm

from .work_queue import REFRESH_SECONDS, WorkQueue

_WORDS = {"counts": ("counting", None), "surrogate": ("estimating", "claimed")}
"""What a method does, and what that makes of an image, where it is no certificate."""


class Progress:
    """
    A bar with images done, draws a second, accuracy so far of what is certified or claimed, and time left.

    Args:
        queue: the work queue of the run.
        before: for each sigma, the images that were done before, and how many of them were right.
        radius: the radius at which an answer is certified to count as right.
        total: images in all, or the most that there can be, if that is known.
        shown: whether this process shows the bar.
        method: of the certificates: an estimate is none, and counts claim nothing.
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
        doing, self.done = _WORDS.get(method, ("certifying", "certified"))
        # smoothing 0: images differ in cost, so the mean rate tells the time left best
        self.bar = tqdm(
            desc=doing,
            total=total,
            initial=sum(images for images, _ in before.values()),
            unit="image",
            smoothing=0,
            disable=not shown,
        )
        self.started = self.looked = time.monotonic()

    def update(self, sigma: float, at_once: bool = False) -> None:
        """Show what has been done so far, and the certified accuracy at `sigma`; no more often than there is news."""
        now = time.monotonic()
        if self.bar.disable or (now - self.looked < REFRESH_SECONDS and not at_once):
            return
        self.looked = now
        images = {one: self.before[one][0] + self.queue.total(f"images {one}") for one in self.before}
        right = self.before[sigma][1] + self.queue.total(f"right {sigma}")
        rate = self.queue.total("draws") / (now - self.started)
        share = f"{right / max(images[sigma], 1):.1%} {self.done} at radius {self.radius:g} (sigma {sigma:g})"
        self.bar.set_postfix_str(f"{rate:.0f} draws/s{f', {share}' if self.done else ''}", refresh=False)
        self.bar.update(sum(images.values()) - self.bar.n)
