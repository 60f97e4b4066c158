"""Smoothing distributions: which probability certifies which radius, how draws are made, and the training mixture.

Every image draws from a counter-based generator of its own, keyed by the seed and the image's pixels. Its noise is
therefore the same whatever the batch size, the order of the images or the number of processes.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from scipy import special


class NoiseStream(Protocol):
    """The noisy copies of one image, in a fixed order however many are asked for at a time."""

    def draw(self, count: int) -> torch.Tensor:
        """The next `count` copies, `(count, channels, height, width)`."""
        ...


def image_key(image: torch.Tensor, seed: int) -> int:
    """128-bit key of an image's noise: a hash of the seed, the shape and the pixels (`image` on the CPU)."""
    digest = hashlib.blake2b(f"{seed} {tuple(image.shape)} {image.dtype}".encode(), digest_size=16)
    digest.update(image.contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class GaussianNoise:
    """
    Isotropic Gaussian noise: l2 radii of `sigma * Phi^-1(p)`.

    Args:
        sigma: standard deviation in units of `[0, 1]` pixels.

    Raises:
        ValueError: for a sigma that is not positive and finite.

    Source: Cohen et al. 2019 (arXiv 1902.02918), theorem 1, with the runner-up's probability bounded by 1 - p.
    """

    sigma: float

    name: ClassVar[str] = "gaussian"
    norm: ClassVar[str] = "l2"

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(
                f"sigma={self.sigma} must be a positive, finite number: the standard deviation of the noise in units of "
                "[0, 1] pixels, such as 0.25."
            )

    def radius(self, probability: float) -> float:
        """The l2 radius certified by a lower bound of the top class's probability; 0 for 1/2 and below."""
        return max(0.0, self.sigma * float(special.ndtri(probability)))

    def probability_needed(self, radius: float) -> float:
        """The probability that the top class must exceed to be certified at an l2 `radius`."""
        return float(special.ndtr(radius / self.sigma))

    def stream(self, image: torch.Tensor, key: int) -> NoiseStream:
        """Noisy copies of `image`, `(channels, height, width)` in `[0, 1]`, made on its device."""
        if image.device.type == "cpu":
            return _NumpyGaussianStream(image, self.sigma, key)
        return _TorchGaussianStream(image, self.sigma, key)


class _NumpyGaussianStream:
    """numpy's Philox fills in sequence, so that draws do not depend on how many are asked for at a time."""

    def __init__(self, image: torch.Tensor, sigma: float, key: int):
        self.image = image
        self.sigma = sigma
        self.generator = np.random.Generator(np.random.Philox(key=key))

    def draw(self, count: int) -> torch.Tensor:
        noise = self.generator.standard_normal((count, *self.image.shape), dtype=np.float32)
        return torch.from_numpy(noise).mul_(self.sigma).add_(self.image)


class _TorchGaussianStream:
    """torch's own (Philox on CUDA) generator. What it returns depends on the size of a call, so calls are of one size."""

    block = 32

    def __init__(self, image: torch.Tensor, sigma: float, key: int):
        self.image = image
        self.sigma = sigma
        self.generator = torch.Generator(image.device).manual_seed(key & (2**63 - 1))
        self.ahead = image.new_empty((0, *image.shape))

    def draw(self, count: int) -> torch.Tensor:
        parts = [self.ahead]
        while sum(map(len, parts)) < count:
            shape = (self.block, *self.image.shape)
            noise = torch.randn(shape, generator=self.generator, device=self.image.device, dtype=self.image.dtype)
            parts.append(noise.mul_(self.sigma).add_(self.image))
        drawn = torch.cat(parts)
        self.ahead = drawn[count:]
        return drawn[:count]


@dataclass(frozen=True)
class NoiseMixture:
    """
    The training mixture: each image gets Gaussian noise of a level drawn for it alone (arXiv 2312.09020).

    Args:
        sigmas: noise levels (standard deviations) in units of `[0, 1]` pixels; 0 is a clean image.
        weights: their relative frequencies; equal by default.

    Raises:
        ValueError: for no levels, a negative or non-finite one, or weights that do not match them.
    """

    sigmas: tuple[float, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.sigmas or not all(0 <= sigma < math.inf for sigma in self.sigmas):
            raise ValueError(f"sigmas={self.sigmas} must be one or more finite numbers, 0 or above.")
        if self.weights is not None and (
            len(self.weights) != len(self.sigmas) or min(self.weights) < 0 or sum(self.weights) <= 0
        ):
            raise ValueError(f"weights={self.weights} must be {len(self.sigmas)} numbers, 0 or above, not all 0.")

    def add_to(self, images: torch.Tensor) -> torch.Tensor:
        """Noisy copies of `images`, `(batch, channels, height, width)` in `[0, 1]`; not clipped."""
        weights = torch.tensor(self.weights or [1.0] * len(self.sigmas), device=images.device)
        levels = torch.multinomial(weights, len(images), replacement=True)
        sigmas = torch.tensor(self.sigmas, device=images.device, dtype=images.dtype)[levels]
        return images + sigmas.view(-1, 1, 1, 1) * torch.randn_like(images)
