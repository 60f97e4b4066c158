"""Distributes images across processes and aggregates their progress through the process group's store."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from accelerate import Accelerator
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

Item = TypeVar("Item")
Found = TypeVar("Found")

REFRESH_SECONDS = 0.5
"""Seconds between two looks at what the other processes have done."""


class WorkQueue:
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
        if time.monotonic() - self.sent > REFRESH_SECONDS:
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
