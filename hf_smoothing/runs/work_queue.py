"""Distributes images across processes and aggregates their progress through the process group's store."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from accelerate import Accelerator
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from .settings import NoiseLevel

Item = TypeVar("Item")
REFRESH_SECONDS = 0.5
"""Seconds between two looks at the progress of the other processes."""


class WorkQueue:
    """
    The work queue of a run.

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

    def take(self, work: Iterable[Item], sigma: NoiseLevel) -> Iterator[Item]:
        """
        Take items of the work at one sigma, one at a time, until none is left.

        All processes walk through the same items in the same order; each takes the one whose turn the shared counter gives
        it. Asking the counter costs far less than certifying an image.
        """
        turn = self.store.add(f"turn {sigma}", 1) - 1
        for position, item in enumerate(work):
            if position == turn:
                yield item
                turn = self.store.add(f"turn {sigma}", 1) - 1

    def count(self, sigma: NoiseLevel, right: bool, draws: int) -> None:
        """Count a certified image. Counts are shared at most every [`REFRESH_SECONDS`]."""
        self.unsent.update({f"images {sigma}": 1, f"right {sigma}": int(right), "draws": draws})
        if time.monotonic() - self.sent > REFRESH_SECONDS:
            self._send()

    def _send(self) -> None:
        for name, amount in self.unsent.items():
            self.store.add(name, amount)
        self.unsent.clear()
        self.sent = time.monotonic()

    def total(self, name: str) -> int:
        """The sum over all processes of the counts `images SIGMA`, `right SIGMA` or `draws`."""
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
        """Whether every process has finished. Raises a `RuntimeError` where one has failed."""
        if self.store.check(["failure"]):
            raise RuntimeError(
                f"Another process failed ({self.store.get('failure').decode()}). Run the same command again to resume."
            )
        return self.store.add("finished", 0) == self.num_processes
