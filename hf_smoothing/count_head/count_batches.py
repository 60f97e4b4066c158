"""Measured counts as training data: one target per image, subsampled and in shuffled batches."""

from collections.abc import Iterator

import numpy as np
import torch

from ..training.training_images import Batch
from .measured_counts import MeasuredCounts


def group_counts_by_image(counts: MeasuredCounts) -> tuple[np.ndarray, torch.Tensor]:
    """
    Group counts by image. Images that lack a noise level, because they failed there, are left out.

    Args:
        counts: counts of any run.

    Returns:
        The images' positions in the split `(images,)`, and targets `(images, levels, 1 + classes)`: sigma, then the counts.
    """
    images, num_levels = np.unique(counts.indices, return_counts=True)
    images = images[num_levels == len(np.unique(counts.sigmas))]
    rows = np.lexsort((counts.sigmas, counts.indices))
    rows = rows[np.isin(counts.indices[rows], images)]
    targets = np.concatenate([counts.sigmas[rows, None], counts.counts[rows]], 1)
    return images, torch.from_numpy(targets).float().view(len(images), -1, targets.shape[1])


def subsample_counts(counts: torch.Tensor, max_draws: int, generator: np.random.Generator) -> torch.Tensor:
    """
    Keep a random choice of the draws of each row of counts: distributed as if no more draws had been made.

    Args:
        counts: `(..., classes)`, whole numbers.
        max_draws: draws to keep of each row; a row with fewer draws keeps all.
        generator: random generator of the choice.
    """
    rows = counts.long().flatten(0, -2).numpy()
    kept = [generator.multivariate_hypergeometric(row, min(max_draws, row.sum())) for row in rows]
    return torch.from_numpy(np.array(kept)).to(counts.dtype).view_as(counts)


class CountBatches:
    """
    Batches of images with their counts, for one process. Their order depends only on the seed and the epoch.

    Args:
        inputs: `(images, ...)`: pixels (uint8) or features.
        targets: `(images, levels, 1 + classes)`: sigma, then the counts.
        batch_size: images per batch.
        seed: seed of the order.
        process_index, num_processes: this process, and the number of processes.
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
        self.inputs, self.targets, self.seed = inputs, targets, seed
        self.batch_size, self.max_draws = batch_size, max_draws
        self.total: int | None = len(inputs)
        self.process_index, self.num_processes = process_index, num_processes
        if not len(self):
            raise ValueError(
                f"{self.total} images do not fill a batch of {batch_size} on {num_processes} processes: take a smaller "
                "per_device_train_batch_size."
            )

    def __len__(self) -> int:
        """Batches per epoch; a last batch that is not full is left out."""
        return len(self.inputs) // (self.batch_size * self.num_processes)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Inputs and targets of an epoch, from batch `first` on."""
        order = np.random.default_rng([self.seed, number]).permutation(len(self.inputs))
        order = order[: len(self) * self.num_processes * self.batch_size]
        for images in order.reshape(len(self), self.num_processes, self.batch_size)[first:, self.process_index]:
            targets = self.targets[images]
            if self.max_draws is not None:
                generator = np.random.default_rng([self.seed, number, int(images[0])])
                counts = subsample_counts(targets[..., 1:], self.max_draws, generator)
                targets = torch.cat([targets[..., :1], counts], -1)
            yield self.inputs[images], targets
