"""Denoisers in front of a classifier, each part of the base classifier that is certified (arXiv 2003.01908)."""

from collections.abc import Callable

import torch
from torch import nn

Denoiser = Callable[[torch.Tensor, float], torch.Tensor]
"""Maps noisy pixels `(batch, channels, height, width)` and sigma to pixels of the same shape, each image on its own."""


def wiener(pixels: torch.Tensor, sigma: float, window: int = 5) -> torch.Tensor:
    """
    Denoise without training: move every pixel towards the mean of its window, the more so the less the window varies beyond
    what noise explains.

    Takes the arguments of a [`Denoiser`] and the side of the window, odd.

    Source: Lee, IEEE Transactions on Pattern Analysis and Machine Intelligence 2 (1980).
    """

    def average(values: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(values, [window // 2] * 4, mode="reflect")
        return nn.functional.avg_pool2d(padded, window, stride=1)

    mean = average(pixels)
    variance = average(pixels**2) - mean**2
    kept = (variance - sigma**2).clamp(min=0) / variance.clamp(min=1e-12)
    return mean + kept * (pixels - mean)


DENOISERS: dict[str, Denoiser] = {"wiener": wiener}
"""Denoisers by name, for the command line."""


def check_denoiser(denoiser: Denoiser | str | None) -> None:
    """Raise a `ValueError` for an unknown name."""
    if isinstance(denoiser, str) and denoiser not in DENOISERS:
        raise ValueError(f"denoiser={denoiser!r} is unknown: use {', '.join(DENOISERS)}, or pass a callable.")
