"""Progress bars: on a terminal, in a notebook, and as lines of a log; and the bar of a certification."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm.auto import notebook_tqdm, std_tqdm, tqdm  # type: ignore[attr-defined]  # the stubs lack them

from .certificates import format_radius

LINE_SECONDS = 30.0
"""Seconds between two lines of a bar that is not on a terminal."""


def open_bar(*args: Any, **options: Any) -> Any:
    """A progress bar with the arguments of `tqdm`. Without a terminal, such as in a log, it is a line now and then."""
    if notebook_tqdm is not std_tqdm:
        return tqdm(*args, **options)
    if not sys.stderr.isatty():
        return _Lines(*args, **{"mininterval": LINE_SECONDS, "delay": LINE_SECONDS} | options)
    if os.get_terminal_size(sys.stderr.fileno()).columns == 0:  # some terminals do not know their width
        options.setdefault("ncols", 80)
    return tqdm(*args, **options)


class _Lines(std_tqdm):
    """A bar that writes lines below each other: returning to the start of one would make a log one endless line."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        self._shown = self.n
        self.fp.write(f"{str(self).strip() if msg is None else msg}\n")
        self.fp.flush()
        return True

    def clear(self, *args: Any, **options: Any) -> None:
        """A line that is written stays."""

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> bool | None:
        return None if nolock else super().refresh(nolock, lock_args)  # `tqdm.write` restores a bar without a lock

    def close(self) -> None:
        if not self.disable:  # type: ignore[has-type]
            if self.leave and getattr(self, "_shown", None) != self.n:
                self.display()
            self.disable = True
            self._decr_instances(self)


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
        self.bar = open_bar(total=total, desc="certifying", bar_format="{desc} " + counts + "{postfix}")
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
