"""Smoothing distributions: which probability certifies which radius, and how noisy copies are drawn.

Every image has its own counter-based generator, keyed by the seed and the image's pixels. Its noise is therefore the same
whatever the batch size, the order of the images or the number of processes. (CPUs and GPUs have different generators, so
this holds on the same kind of device.)

**The lattice.** In floating point, `x + noise` is not quite smoothing: the sums that can occur depend on the bits of x, and
a base classifier can read x off them (Voracek and Hein, arXiv 2207.07209). 8-bit pictures lie on the grid k/255. For them
the noise is rounded to a finer grid of step h = 1/(255 * 16) and added as integers, which float32 holds exactly. The
rounding of x + noise then *is* x + the rounded noise, for every picture on the grid. So the classifier that is smoothed is a
rounding followed by the base classifier, and the theorem holds for it as stated.

One error remains: the noise comes from float64 arithmetic on 52 or 53 random bits, so its distribution is not exact. The
probability of any event `noise <= b`, at the boundary b of a lattice cell, is off by at most 2^-50: 2^-52 for the
granularity of the uniforms, as much for the rounding of the transformed value (its density times its size is below 1), and
a margin of two. A cell has two boundaries, and all but 2^-50 of the mass lies within 40 standard deviations on either side.
The total-variation distance of one rounded coordinate is therefore at most 2^-50 (80 sigma/h + 2), and that of d coordinates
at most d times as much. No probability under the sampler differs by more from that of the theorem, so [`NoisyImage`]
subtracts it from every lower bound (about 2e-7 at 3x32x32 and sigma 0.25).
"""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy import special

LATTICE_STEPS = 16
"""Lattice points from one 8-bit level to the next: h = 1/(255 * LATTICE_STEPS)."""

_LARGEST_LATTICE_SIGMA = 50.0
"""Up to here 40 standard deviations stay below 2^24 lattice steps, the integers that float32 holds exactly."""

Sampling = Literal["lattice", "float"]


def snap_to_8_bits(image: torch.Tensor) -> torch.Tensor:
    """Move `image` (float32 in `[0, 1]`) to the exact grid k/255 if only float32 rounding keeps it off; else keep it."""
    exact = (image * 255).round() / 255
    return exact if bool(((image - exact).abs() <= 2**-23).all()) else image


def image_key(image: torch.Tensor, seed: int) -> int:
    """128-bit key of an image's noise: a hash of the seed, the shape and the pixels (`image` on the CPU)."""
    digest = hashlib.blake2b(f"{seed} {tuple(image.shape)} {image.dtype}".encode(), digest_size=16)
    digest.update(image.contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class SmoothingNoise(ABC):
    """
    Independent, symmetric noise on every pixel and channel.

    Args:
        sigma: standard deviation, in units of `[0, 1]` pixels.
        lattice: draw 8-bit images on the exact lattice (see the top of this file). Other images are drawn in plain floats.

    Raises:
        ValueError: for a sigma that is not positive and finite.
    """

    sigma: float
    lattice: bool = True

    name: ClassVar[str]
    norm: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.sigma, Real) or isinstance(self.sigma, bool) or not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma={self.sigma!r} must be positive and finite, in [0, 1] pixels: such as 0.25.")

    @abstractmethod
    def radius(self, p_a: float, p_b: float | None = None) -> float:
        """See [`NoiseDistribution`]."""

    @abstractmethod
    def probability_needed(self, radius: float, p_b: float | None = None) -> float:
        """See [`NoiseDistribution`]; 1 if no probability suffices."""

    @abstractmethod
    def standard_numpy(self, generator: np.random.Generator, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Draws of standard deviation 1; however they are split into calls, the sequence is the same."""

    @abstractmethod
    def standard_torch(self, generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Draws of standard deviation 1 on the generator's device."""

    def total_variation(self, coordinates: int) -> float:
        """The largest difference of a probability under the lattice sampler from that under this distribution."""
        return coordinates * 2.0**-50 * (80 * self.sigma * 255 * LATTICE_STEPS + 2)

    def noisy_copies(self, image: torch.Tensor, key: int) -> "NoisyImage":
        """The noisy copies of an image (as [`to_pixels`] returns them); the key of its generator is [`image_key`]'s."""
        return NoisyImage(self, image, key)


class NoisyImage:
    """
    The noisy copies of one image in a fixed order, and the radii that probabilities under them certify.

    They are drawn on the image's device if that is the CPU or CUDA. Radii and probabilities needed are those of the
    distribution, corrected for the error of the sampler.

    Attributes:
        sampling: `"lattice"` where sums are exact, `"float"` where they are not (pixels between the 8-bit levels).
        slack: subtracted from lower bounds for the distance of the sampler from its distribution; 0 for `"float"`, where no
            bound holds.
    """

    block = 32
    """Draws per call of torch's generator, whose output depends on the size of the call."""

    def __init__(self, noise: SmoothingNoise, image: torch.Tensor, key: int):
        self.noise = noise
        self.sigma = noise.sigma
        self.image = image
        levels = (image * 255).round()
        exact = noise.lattice and noise.sigma <= _LARGEST_LATTICE_SIGMA and torch.equal(levels / 255, image)
        self.sampling: Sampling = "lattice" if exact else "float"
        self.slack = noise.total_variation(image.numel()) if exact else 0.0
        self.steps = levels * LATTICE_STEPS
        self.on_cuda = image.device.type == "cuda"
        if self.on_cuda:
            self.torch_generator = torch.Generator(image.device).manual_seed(key & (2**63 - 1))
            self.ahead = image.new_empty((0, *image.shape))
        else:  # other devices draw on the CPU too: some have no float64
            self.numpy_generator = np.random.Generator(np.random.Philox(key=key))

    def radius(self, p_a: float, p_b: float | None = None) -> float:
        return self.noise.radius(p_a - self.slack, (1 - p_a if p_b is None else p_b) + self.slack)

    def probability_needed(self, radius: float, p_b: float | None = None) -> float:
        return self.noise.probability_needed(radius, None if p_b is None else p_b + self.slack) + self.slack

    def draw(self, count: int) -> torch.Tensor:
        """The next `count` copies, `(count, channels, height, width)`."""
        if self.on_cuda:
            return self._draw_with_torch(count)
        dtype = np.float64 if self.sampling == "lattice" else np.float32
        standard = self.noise.standard_numpy(self.numpy_generator, (count, *self.image.shape), dtype)
        return self._add(torch.from_numpy(standard))

    def _draw_with_torch(self, count: int) -> torch.Tensor:
        parts = [self.ahead]
        shape = (self.block, *self.image.shape)
        dtype = torch.float64 if self.sampling == "lattice" else torch.float32
        while sum(map(len, parts)) < count:
            parts.append(self._add(self.noise.standard_torch(self.torch_generator, shape, dtype)))
        drawn = torch.cat(parts)
        self.ahead = drawn[count:]
        return drawn[:count]

    def _add(self, standard: torch.Tensor) -> torch.Tensor:
        device = self.image.device
        if self.sampling == "float":
            return standard.mul_(self.noise.sigma).to(device).add_(self.image)
        # integers below 2^24: their sum is exact in float32, and the scaling depends on the sum only
        steps = standard.mul_(self.noise.sigma * 255 * LATTICE_STEPS).round_().to(device, torch.float32)
        return steps.add_(self.steps).mul_(1 / (255 * LATTICE_STEPS))


@dataclass(frozen=True)
class GaussianNoise(SmoothingNoise):
    """
    Gaussian noise: l2 radii of `sigma/2 (Phi^-1(p_a) - Phi^-1(p_b))`.

    Source: Cohen et al. 2019 (arXiv 1902.02918), theorem 1.
    """

    name: ClassVar[str] = "gaussian"
    norm: ClassVar[str] = "l2"

    def radius(self, p_a: float, p_b: float | None = None) -> float:
        if p_b is None:
            return max(0.0, self.sigma * float(special.ndtri(p_a)))
        return max(0.0, self.sigma / 2 * float(special.ndtri(p_a) - special.ndtri(p_b)))

    def probability_needed(self, radius: float, p_b: float | None = None) -> float:
        if p_b is None:
            return float(special.ndtr(radius / self.sigma))
        return float(special.ndtr(2 * radius / self.sigma + special.ndtri(p_b)))

    def standard_numpy(self, generator: np.random.Generator, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return generator.standard_normal(shape, dtype=dtype)  # type: ignore[call-overload]

    def standard_torch(self, generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)


@dataclass(frozen=True)
class UniformNoise(SmoothingNoise):
    """
    Uniform noise on `[-b, b]`, b = sqrt(3) sigma: l1 radii of `b (p_a - p_b)`.

    Source: Yang et al. 2020 (arXiv 2002.08118), the uniform distribution and l1; for two classes 2 b (p - 1/2).
    """

    name: ClassVar[str] = "uniform"
    norm: ClassVar[str] = "l1"

    def radius(self, p_a: float, p_b: float | None = None) -> float:
        return max(0.0, math.sqrt(3) * self.sigma * (p_a - (1 - p_a if p_b is None else p_b)))

    def probability_needed(self, radius: float, p_b: float | None = None) -> float:
        apart = radius / (math.sqrt(3) * self.sigma)
        return min(1.0, (1 + apart) / 2 if p_b is None else p_b + apart)

    def standard_numpy(self, generator: np.random.Generator, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        uniform = generator.random(shape, dtype=dtype)  # type: ignore[call-overload]
        return (uniform * 2 - 1) * dtype(math.sqrt(3))

    def standard_torch(self, generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=dtype)
        return uniform.mul_(2).sub_(1).mul_(math.sqrt(3))


@dataclass(frozen=True)
class LaplaceNoise(SmoothingNoise):
    """
    Laplace noise of scale b = sigma / sqrt(2): l1 radii of the larger of `b/2 log(p_a / p_b)` and `-b log(1 - p_a + p_b)`.

    Source: Teng et al. 2020 ("l1 adversarial robustness certificates: a randomized smoothing approach"), theorem 1.
    """

    name: ClassVar[str] = "laplace"
    norm: ClassVar[str] = "l1"

    def radius(self, p_a: float, p_b: float | None = None) -> float:
        p_b = 1 - p_a if p_b is None else p_b
        if p_a <= p_b:
            return 0.0
        if p_b <= 0 or p_a - p_b >= 1:
            return math.inf
        return self.sigma / math.sqrt(2) * max(math.log(p_a / p_b) / 2, -math.log(1 - p_a + p_b))

    def probability_needed(self, radius: float, p_b: float | None = None) -> float:
        shrunk = math.exp(-math.sqrt(2) * radius / self.sigma)
        return 1 - shrunk / 2 if p_b is None else min(1.0, p_b / shrunk**2, 1 - shrunk + p_b)

    def standard_numpy(self, generator: np.random.Generator, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return generator.laplace(scale=math.sqrt(0.5), size=shape).astype(dtype, copy=False)

    def standard_torch(self, generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = torch.empty(shape, device=generator.device, dtype=dtype).exponential_(generator=generator)
        sign = torch.rand(shape, generator=generator, device=generator.device, dtype=dtype).sub_(0.5)
        return torch.copysign(size, sign).mul_(math.sqrt(0.5))
