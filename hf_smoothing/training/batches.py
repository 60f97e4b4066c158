"""Batches to train on, and which images each process gets."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs, such as pixels, uint8 `(batch, channels, height, width)`, and targets, such as labels `(batch,)`."""


def move_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor of the CPU to a device, without waiting for the work that is queued on a GPU."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from other memory the copy waits
    return tensor.to(device, non_blocking=True)


class Batches(ABC):
    """
    The batches of one process, epoch by epoch. Their order depends only on the seed and the epoch.

    Args:
        total: rows in all; `None` for a stream.
        batch_size: rows per batch of one process. Where there are fewer rows, batches are as large as these allow, and a
            line on standard error says so.
        seed: seed of the order.
        process_index, num_processes: this process, and the number of processes; each gets different rows.

    Raises:
        ValueError: for fewer rows than processes.
    """

    def __init__(self, total: int | None, batch_size: int, seed: int, process_index: int, num_processes: int):
        self.total, self.batch_size, self.seed = total, batch_size, seed
        self.process_index, self.num_processes = process_index, num_processes
        if total is not None and not len(self):
            self._shrink(total)

    def _shrink(self, total: int) -> None:
        """Take smaller batches, so that all rows make one for each process."""
        share = total // self.num_processes
        if share == 0:
            raise ValueError(
                f"{total} images are fewer than the {self.num_processes} processes: start fewer processes."
            )
        smaller = share - share % 2 or 1  # even where possible: mixup pairs images
        if self.process_index == 0:
            each = "" if self.num_processes == 1 else f" on each of {self.num_processes} processes"
            print(
                f"{total} images do not fill a batch of {self.batch_size}{each}: training takes batches of {smaller}.",
                file=sys.stderr,
            )
        self.batch_size = smaller

    def __len__(self) -> int:
        """Batches per epoch; a last batch that is not full is left out."""
        if self.total is None:
            raise TypeError("a stream has no length")
        return self.total // (self.batch_size * self.num_processes)

    @abstractmethod
    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Inputs and targets of an epoch, from batch `first` on; every call gives the same batches."""

    def shuffle(self, number: int) -> np.ndarray:
        """The rows of this process in an epoch: `(batches, batch_size)`."""
        order = np.random.default_rng([self.seed, number]).permutation(self.total or 0)
        order = order[: len(self) * self.num_processes * self.batch_size]
        return order.reshape(len(self), self.num_processes, self.batch_size)[:, self.process_index]
