"""Batches to train on, and which images each process gets."""

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
        batch_size: rows per batch of one process.
        seed: seed of the order.
        process_index, num_processes: this process, and the number of processes; each gets different rows.

    Raises:
        ValueError: for fewer rows than one batch takes.
    """

    def __init__(self, total: int | None, batch_size: int, seed: int, process_index: int, num_processes: int):
        self.total, self.batch_size, self.seed = total, batch_size, seed
        self.process_index, self.num_processes = process_index, num_processes
        if total is not None and not len(self):
            raise ValueError(
                f"{total} images do not fill a batch of {batch_size} on {num_processes} processes: take a smaller "
                "per_device_train_batch_size."
            )

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
