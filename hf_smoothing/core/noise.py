"""Smoothing distributions: which probability certifies which radius, and how their noise is drawn."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special

FloatArray = NDArray[np.float64]

LARGEST_SIGMA = 50.0
"""Up to here, 40 standard deviations stay below 2^24 steps of the lattice, the integers that float32 holds exactly."""


def _to_float64(values: ArrayLike) -> FloatArray:
    return np.asarray(values, np.float64)[()]  # scalars as scalars


@dataclass(frozen=True)
class SmoothingNoise(ABC):
    """
    Independent, symmetric noise on every pixel and channel.

    `radius` and `probability_needed` take scalars or arrays that broadcast together, and return float64.

    Args:
        sigma: standard deviation, in units of `[0, 1]` pixels.

    Raises:
        ValueError: for a sigma that is not positive, or above 50, where the exact sampler ends.
    """

    sigma: float

    name: ClassVar[str]
    norm: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.sigma, Real) or isinstance(self.sigma, bool) or not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma={self.sigma!r} must be positive and finite, in [0, 1] pixels: such as 0.25.")
        if self.sigma > LARGEST_SIGMA:
            raise ValueError(
                f"sigma={self.sigma:g} is above {LARGEST_SIGMA:g}: give it in [0, 1] pixels, such as 0.25."
            )

    @abstractmethod
    def radius(self, p_a: ArrayLike, p_b: ArrayLike | None = None) -> FloatArray:
        """See [`NoiseDistribution`]."""

    @abstractmethod
    def probability_needed(self, radius: ArrayLike, p_b: ArrayLike | None = None) -> FloatArray:
        """See [`NoiseDistribution`]; 1 if no probability suffices."""

    @abstractmethod
    def fill_array(self, generator: np.random.Generator, out: FloatArray) -> None:
        """Fill `out` with draws of standard deviation 1; however they are split into calls, the sequence is the same."""

    @abstractmethod
    def fill_tensor(self, generator: torch.Generator, out: torch.Tensor) -> None:
        """Fill `out` (float64, on the generator's device) with draws of standard deviation 1."""


@dataclass(frozen=True)
class GaussianNoise(SmoothingNoise):
    """
    Gaussian noise: l2 radii of `sigma/2 (Phi^-1(p_a) - Phi^-1(p_b))`.

    Source: Cohen et al. 2019 (arXiv 1902.02918), theorem 1.
    """

    name: ClassVar[str] = "gaussian"
    norm: ClassVar[str] = "l2"

    def radius(self, p_a: ArrayLike, p_b: ArrayLike | None = None) -> FloatArray:
        # fmax: a bound below 0 or above 1 has no quantile, and proves nothing
        if p_b is None:
            return np.fmax(0.0, self.sigma * special.ndtri(_to_float64(p_a)))
        difference = special.ndtri(_to_float64(p_a)) - special.ndtri(_to_float64(p_b))
        return np.fmax(0.0, self.sigma / 2 * difference)

    def probability_needed(self, radius: ArrayLike, p_b: ArrayLike | None = None) -> FloatArray:
        distance = _to_float64(radius) / self.sigma
        return special.ndtr(distance if p_b is None else 2 * distance + special.ndtri(_to_float64(p_b)))

    def fill_array(self, generator: np.random.Generator, out: FloatArray) -> None:
        generator.standard_normal(out=out)

    def fill_tensor(self, generator: torch.Generator, out: torch.Tensor) -> None:
        out.normal_(generator=generator)


@dataclass(frozen=True)
class UniformNoise(SmoothingNoise):
    """
    Uniform noise on `[-b, b]`, b = sqrt(3) sigma: l1 radii of `b (p_a - p_b)`.

    Source: Yang et al. 2020 (arXiv 2002.08118), the uniform distribution and l1; for two classes 2 b (p - 1/2).
    """

    name: ClassVar[str] = "uniform"
    norm: ClassVar[str] = "l1"

    def radius(self, p_a: ArrayLike, p_b: ArrayLike | None = None) -> FloatArray:
        p_a = _to_float64(p_a)
        return np.maximum(0.0, math.sqrt(3) * self.sigma * (p_a - (1 - p_a if p_b is None else _to_float64(p_b))))

    def probability_needed(self, radius: ArrayLike, p_b: ArrayLike | None = None) -> FloatArray:
        difference = _to_float64(radius) / (math.sqrt(3) * self.sigma)
        return np.minimum(1.0, (1 + difference) / 2 if p_b is None else _to_float64(p_b) + difference)

    def fill_array(self, generator: np.random.Generator, out: FloatArray) -> None:
        generator.random(out=out)
        out *= 2
        out -= 1
        out *= math.sqrt(3)

    def fill_tensor(self, generator: torch.Generator, out: torch.Tensor) -> None:
        out.uniform_(generator=generator).mul_(2).sub_(1).mul_(math.sqrt(3))


@dataclass(frozen=True)
class LaplaceNoise(SmoothingNoise):
    """
    Laplace noise of scale b = sigma / sqrt(2): l1 radii of the larger of `b/2 log(p_a / p_b)` and `-b log(1 - p_a + p_b)`.

    Source: Teng et al. 2020 ("l1 adversarial robustness certificates: a randomized smoothing approach"), theorem 1.
    """

    name: ClassVar[str] = "laplace"
    norm: ClassVar[str] = "l1"

    def radius(self, p_a: ArrayLike, p_b: ArrayLike | None = None) -> FloatArray:
        p_a = _to_float64(p_a)
        p_b = 1 - p_a if p_b is None else _to_float64(p_b)
        with np.errstate(divide="ignore", invalid="ignore"):  # infinite at p_b <= 0; nan where p_a <= p_b
            radius = np.maximum(np.log(p_a / np.maximum(p_b, 0.0)) / 2, -np.log(np.maximum(1 - p_a + p_b, 0.0)))
        return np.where(p_a > p_b, self.sigma / math.sqrt(2) * radius, 0.0)[()]

    def probability_needed(self, radius: ArrayLike, p_b: ArrayLike | None = None) -> FloatArray:
        factor = np.exp(-math.sqrt(2) * _to_float64(radius) / self.sigma)
        if p_b is None:
            return 1 - factor / 2
        p_b = _to_float64(p_b)
        with np.errstate(divide="ignore", invalid="ignore"):  # a factor of 0: no probability suffices
            return np.fmin(1.0, np.fmin(p_b / factor**2, 1 - factor + p_b))

    def fill_array(self, generator: np.random.Generator, out: FloatArray) -> None:
        out[...] = generator.laplace(scale=math.sqrt(0.5), size=out.shape)

    def fill_tensor(self, generator: torch.Generator, out: torch.Tensor) -> None:
        sign = torch.empty_like(out).uniform_(generator=generator).sub_(0.5)
        out.exponential_(generator=generator).copysign_(sign).mul_(math.sqrt(0.5))
