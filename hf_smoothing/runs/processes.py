"""The processes of a long run: who does what, how far they are, and whether all are well."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store
from tqdm.auto import tqdm

Item = TypeVar("Item")
Found = TypeVar("Found")

_REFRESH = 0.5
"""Seconds between two looks at what the other processes have done."""


def start_processes(**options: Any) -> Accelerator:
    """
    The processes that `accelerate launch` or `torchrun` started; one where neither did.

    Args:
        options: further ones of `Accelerator`.
    """
    return Accelerator(
        # untold, accelerate takes each of several processes on CPUs for the only one
        cpu=not torch.accelerator.is_available(),
        # A process may wait for another as long as one image takes; launchers end the others when one dies
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
        **options,
    )


def on_main_first(accelerator: Accelerator, call: Callable[[], Found]) -> Found:
    """What `call` returns on the main process, on all of them; or what it raises (OSError, ValueError), on all of them."""
    box: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            box = [call()]
        except (OSError, ValueError) as error:
            box = [error]
    broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


class Crew:
    """
    The processes of a run: hands images out among them, and adds up what they have done, through the store of their group.

    Args:
        accelerator: the processes.
        start: a name for this start of the run, the same on all of them.
    """

    def __init__(self, accelerator: Accelerator, start: str):
        self.num_processes = accelerator.num_processes
        # The name of this start keeps counters apart where a launcher starts processes again and its store lives on
        self.store = (
            distributed.PrefixStore(start, _get_default_store()) if self.num_processes > 1 else distributed.HashStore()
        )
        self.unsent: Counter[str] = Counter()
        self.sent = time.monotonic()

    def handed_out(self, work: Iterable[Item], sigma: float) -> Iterator[Item]:
        """
        The part of the work at one sigma that this process is to do.

        All processes walk through the same images in the same order; each takes the one whose turn the shared counter gives
        it. One at a time: that costs far less than an image does, and nobody holds work that another could begin.
        """
        turn = self.store.add(f"turn {sigma}", 1) - 1
        for position, item in enumerate(work):
            if position == turn:
                yield item
                turn = self.store.add(f"turn {sigma}", 1) - 1

    def count(self, sigma: float, right: bool, draws: int) -> None:
        """Count an image; the other processes know of it within about half a second of the next."""
        self.unsent.update({f"images {sigma}": 1, f"right {sigma}": int(right), "draws": draws})
        if time.monotonic() - self.sent > _REFRESH:
            self._send()

    def _send(self) -> None:
        for name, amount in self.unsent.items():
            self.store.add(name, amount)
        self.unsent.clear()
        self.sent = time.monotonic()

    def total(self, name: str) -> int:
        """What all processes have counted under a name."""
        return self.store.add(name, 0)

    def finish(self) -> None:
        """Say that this process has nothing left to do."""
        self._send()
        self.store.add("finished", 1)

    def fail(self, error: BaseException) -> None:
        """Say that this process ends before its work is done."""
        with suppress(RuntimeError):  # the store may have ended with the process that held it
            self.store.set("failure", f"{type(error).__name__}: {error}")

    def all_finished(self) -> bool:
        """
        Raises:
            RuntimeError: where a process has failed.
        """
        if self.store.check(["failure"]):
            raise RuntimeError(
                f"Another process failed ({self.store.get('failure').decode()}). Start the run again to go on with it."
            )
        return self.store.add("finished", 0) == self.num_processes


_WORDS = {"counts": ("counting", None), "surrogate": ("estimating", "claimed")}
"""What a method does, and what that makes of an image, where it is no certificate."""


class Progress:
    """
    A bar with images done, draws a second, accuracy so far of what is certified or claimed, and time left.

    Args:
        crew: the processes.
        before: for each sigma, the images that were done before, and how many of them were right.
        radius: the radius at which an answer is certified to count as right.
        total: images in all, or the most that there can be, if that is known.
        shown: whether this process shows the bar.
        method: of the certificates: an estimate is none, and counts claim nothing.
    """

    def __init__(
        self,
        crew: Crew,
        before: dict[float, tuple[int, int]],
        radius: float,
        total: int | None,
        shown: bool,
        method: str,
    ):
        self.crew = crew
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
        if self.bar.disable or (now - self.looked < _REFRESH and not at_once):
            return
        self.looked = now
        images = {one: self.before[one][0] + self.crew.total(f"images {one}") for one in self.before}
        right = self.before[sigma][1] + self.crew.total(f"right {sigma}")
        rate = self.crew.total("draws") / (now - self.started)
        share = f"{right / max(images[sigma], 1):.1%} {self.done} at radius {self.radius:g} (sigma {sigma:g})"
        self.bar.set_postfix_str(f"{rate:.0f} draws/s{f', {share}' if self.done else ''}", refresh=False)
        self.bar.update(sum(images.values()) - self.bar.n)
