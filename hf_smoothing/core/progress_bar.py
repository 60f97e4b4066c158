"""The progress bar of a certification."""

import time
from collections.abc import Sequence

from tqdm.auto import tqdm

from .certificates import format_radius


class ProgressBar:
    """
    Shows finished images, draws per second, radii and the time left. An image in progress counts by the part of its draws
    that is done. `total` is the number of images, if known.
    """

    def __init__(self, total: int | None):
        self.finished = 0
        self.draws_of_finished = 0
        self.radii_of_finished = 0.0
        # without the bar's own counts: images in progress make them fractions
        counts = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}" if total else "{elapsed}"
        self.bar = tqdm(total=total, desc="certifying", bar_format="{desc} " + counts + "{postfix}")
        self._shown = time.monotonic()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._shown >= self.bar.mininterval

    def finish(self, draws: Sequence[int], radii: Sequence[float]) -> None:
        """Count images that have finished, by their draws and radii."""
        self.finished += len(draws)
        self.draws_of_finished += sum(draws)
        self.radii_of_finished += sum(radii)

    def show(self, draws: int = 0, done: float = 0.0, radius: float = 0.0) -> None:
        """
        Show the images finished and those in progress.

        Args:
            draws: draws of the images in progress so far.
            done: the sum of their parts that are done, as a number of images.
            radius: where there is only one image, the radius that its draws so far would prove.
        """
        elapsed = self.bar.format_dict["elapsed"] or 1e-9
        text = f"{(self.draws_of_finished + draws) / elapsed:.0f} draws/s"
        name = "radius so far"
        if self.finished:
            radius, name = self.radii_of_finished / self.finished, "radius" if self.bar.total == 1 else "mean radius"
        if self.bar.total != 1:
            text = f"{self.finished} image{'' if self.finished == 1 else 's'}, {text}"
        if radius > 0:
            text += f", {name} {format_radius(radius)}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.n = self.finished + done
        self.bar.refresh()
        self._shown = time.monotonic()

    def close(self) -> None:
        self.show()
        self.bar.close()
