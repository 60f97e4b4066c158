"""Denoisers in front of a classifier, each part of the base classifier that is certified (arXiv 2003.01908)."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .diffusion_denoiser import DiffusionDenoiser, require_diffusers

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
    """Raise a `ValueError` for an unknown name, an `ImportError` for a diffusion model without diffusers."""
    if not isinstance(denoiser, str) or denoiser in DENOISERS:
        return
    if not _names_a_repository(denoiser):
        raise ValueError(
            f"denoiser={denoiser!r} is unknown: use {', '.join(DENOISERS)}, a diffusion model (a name on the Hub such as "
            "google/ddpm-cifar10-32, or a folder), or pass a callable."
        )
    require_diffusers()


def load_denoiser(denoiser: str) -> Denoiser:
    """
    The denoiser of a name: one of [`DENOISERS`], or a diffusion model, see [`DiffusionDenoiser.from_pretrained`]; `@`
    separates it from a revision, as in `google/ddpm-cifar10-32@main`. Raises errors as [`check_denoiser`].
    """
    check_denoiser(denoiser)
    if denoiser in DENOISERS:
        return DENOISERS[denoiser]
    name, _, revision = (denoiser, "", "") if Path(denoiser).is_dir() else denoiser.partition("@")
    return DiffusionDenoiser.from_pretrained(name, revision=revision or None)


def _names_a_repository(name: str) -> bool:
    return "/" in name or Path(name).is_dir()
