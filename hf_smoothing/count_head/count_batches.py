"""Measured counts as training data: one target per image, subsampled and in shuffled batches."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ..core.progress_bar import open_bar
from ..data.labelled_images import ModelInputs
from ..training.batches import Batch, Batches
from .measured_counts import MeasuredCounts


def group_counts_by_image(counts: MeasuredCounts) -> tuple[np.ndarray, torch.Tensor]:
    """
    Group counts by image. Images that lack a noise level, because they failed there, are left out.

    Returns:
        The images' positions in the split `(images,)`, and targets `(images, levels, 1 + classes)`: sigma, then the counts.
    """
    images, num_levels = np.unique(counts.indices, return_counts=True)
    images = images[num_levels == len(np.unique(counts.sigmas))]
    rows = np.lexsort((counts.sigmas, counts.indices))
    rows = rows[np.isin(counts.indices[rows], images)]
    targets = np.concatenate([counts.sigmas[rows, None], counts.counts[rows]], 1)
    return images, torch.from_numpy(targets).float().view(len(images), -1, targets.shape[1])


def read_pixels(inputs: ModelInputs, indices: NDArray[np.int64], show_progress: bool = True) -> torch.Tensor:
    """Read images, many of them in a process per CPU core: uint8 `(images, channels, height, width)`."""
    num_workers = min(os.cpu_count() or 1, len(indices) // 2000)  # to start one takes longer than to read a few images
    batches = DataLoader(_Pixels(inputs, indices.tolist()), batch_size=200, num_workers=num_workers)
    # copied: a batch of another process holds a file open
    return torch.cat([batch.clone() for batch in open_bar(batches, "reading images", disable=not show_progress)])


@dataclass(eq=False)
class _Pixels(Dataset):
    inputs: ModelInputs
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> torch.Tensor:
        return (self.inputs[self.indices[position]][0] * 255).round().byte()


def subsample_counts(counts: torch.Tensor, max_draws: int, generator: np.random.Generator) -> torch.Tensor:
    """
    Keep `max_draws` random draws of each row of counts `(..., classes)`: distributed as if no more draws had been made. A
    row with fewer draws keeps all.
    """
    rows = counts.long().flatten(0, -2).numpy()
    kept = [generator.multivariate_hypergeometric(row, min(max_draws, row.sum())) for row in rows]
    return torch.from_numpy(np.array(kept)).to(counts.dtype).view_as(counts)


class CountBatches(Batches):
    """
    Batches of images with their counts, for one process.

    Args:
        inputs: `(images, ...)`: pixels (uint8) or features.
        targets: `(images, levels, 1 + classes)`: sigma, then the counts.
        batch_size, seed, process_index, num_processes: see [`Batches`].
        max_draws: draws per image and noise level; with more draws, each epoch keeps another random choice.

    Raises:
        ValueError: for fewer images than one batch takes.
    """

    def __init__(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        max_draws: int | None = None,
    ):
        super().__init__(len(inputs), batch_size, seed, process_index, num_processes)
        self.inputs, self.targets, self.max_draws = inputs, targets, max_draws

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        for images in self.shuffle(number)[first:]:
            targets = self.targets[images]
            if self.max_draws is not None:
                generator = np.random.default_rng([self.seed, number, int(images[0])])
                counts = subsample_counts(targets[..., 1:], self.max_draws, generator)
                targets = torch.cat([targets[..., :1], counts], -1)
            yield self.inputs[images], targets
