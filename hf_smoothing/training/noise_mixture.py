"""The mixture of noise levels that a model is trained on (arXiv 2312.09020)."""

import math
from dataclasses import dataclass

import torch

from .batches import move_to_device


@dataclass(frozen=True)
class NoiseMixture:
    """
    The training mixture: each image gets Gaussian noise of its own, randomly drawn level (arXiv 2312.09020).

    Args:
        sigmas: noise levels (standard deviations) in units of `[0, 1]` pixels; 0 is a clean image.
        weights: their relative frequencies; equal by default.

    Raises:
        ValueError: for no levels, a negative or non-finite level, or weights that do not match the levels.
    """

    sigmas: tuple[float, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.sigmas or not all(0 <= sigma < math.inf for sigma in self.sigmas):
            raise ValueError(f"sigmas={self.sigmas} must be one or more finite numbers, 0 or above.")
        if self.weights is not None and (
            len(self.weights) != len(self.sigmas)
            or not all(0 <= weight < math.inf for weight in self.weights)
            or sum(self.weights) <= 0
        ):
            raise ValueError(f"weights={self.weights} must be {len(self.sigmas)} numbers, 0 or above, not all 0.")

    def add_to(self, images: torch.Tensor, copies: int = 1) -> torch.Tensor:
        """
        Add noise to images.

        Args:
            images: clean images `(batch, channels, height, width)` in `[0, 1]`.
            copies: noisy copies of each image; they share its noise level.

        Returns:
            Pixels `(copies * batch, channels, height, width)`, not clipped: the first copy of every image, then the second.
        """
        # on the CPU: drawn on a GPU, they would make this process wait for all work that is queued there
        weights = torch.tensor(self.weights or [1.0] * len(self.sigmas), dtype=torch.float)
        levels = torch.multinomial(weights, len(images), replacement=True)
        sigmas = move_to_device(torch.tensor(self.sigmas, dtype=images.dtype)[levels], images.device).repeat(copies)
        images = images.repeat(copies, 1, 1, 1)
        return images + sigmas.view(-1, 1, 1, 1) * torch.randn_like(images)
