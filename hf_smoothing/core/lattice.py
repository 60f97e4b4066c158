"""
The noisy copies of pictures, drawn on a lattice.

**Why.** In floating point, `x + noise` is not quite smoothing: the sums that can occur depend on the bits of x, and a base
classifier can read x off them (Voracek and Hein, arXiv 2207.07209). Here every copy of every picture is a point of the
lattice `h * integer` with `h = 1/4080`, a sixteenth of an 8-bit level, in the one float32 that stands for this point. So the
classifier that is smoothed is a rounding to the lattice followed by the base classifier, and the theorems hold for it.

**The error that is left.** A coordinate is `round(X + s z)`, computed in float64, with `X = x/h` (exact: 24 bits times
4080), `s = sigma/h`, and z of standard deviation 1. Two things differ from the theorem.

- z comes from 52 or 53 random bits. The probability of `z <= b` is off by at most 2^-50: 2^-52 for the granularity of the
  uniforms, as much for the rounding of the transformed value (its density times its size is below 1), and a margin of two. A
  cell has two boundaries, and all but 2^-50 of the mass lies within 40 standard deviations on either side. Half of the sum
  of the differences over the `80 s` cells, and the tails, give `2^-50 (80 s + 2)`.
- The product and the sum are rounded. Both are below `M = 4080 + 40 s < 2^24` in size, and rounding is monotone, so it moves
  the boundary of a cell by at most `2 M 2^-53`. The densities at boundaries that are one step apart sum up to at most
  `1 + 1/s` (the integral of a unimodal density and its maximum, which is below 1/s for all distributions here). This gives
  `2 M 2^-53 (1 + 1/s)`.

[`total_variation`] is the sum of the two, times the number of coordinates: about 2e-7 at 3x32x32 and sigma 0.25. No
probability under the sampler differs by more from that of the theorem, and [`SampledNoise`] subtracts it from every bound.

**8-bit pictures.** A picture that is within float32 rounding of 8-bit levels is moved to them, so that its copies are the
same however it was divided by 255. This moves the centre of the certified ball by at most 2^-23 per value, which is deducted
from every radius (7e-6 in l2 at 3x32x32).

**Keys.** The noise of an image depends on a key (seed, method, distribution, pixels) and the number of the draw only, not on
batch sizes, other images or processes. It comes in blocks, each from a generator of its own, so that several threads draw at
once. (CPUs and GPUs have different generators: this holds on the same kind of device.)
"""

import hashlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .noise import FloatArray, SmoothingNoise

STEPS_PER_UNIT = 255 * 16
"""Points of the lattice per unit of `[0, 1]` pixels; 16 from one 8-bit level to the next."""

_BLOCK_VALUES = 2**16
"""Roughly how many values a block of noise holds."""
_THREAD_VALUES = 2**14
"""How many values are worth a further thread."""
_LEVEL = STEPS_PER_UNIT // 255
_ROUNDING = 2**-11
"""How far rounding in float32 may take k/255 from its level, in steps of the lattice: 2^-23 of a unit."""


def total_variation(noise: SmoothingNoise, coordinates: int) -> float:
    """The largest difference of a probability under the sampler from that under `noise`, see the top of this file."""
    scale = noise.sigma * STEPS_PER_UNIT
    rounding = 2 * (STEPS_PER_UNIT + 40 * scale) * 2.0**-53 * (1 + 1 / scale)
    return coordinates * (2.0**-50 * (80 * scale + 2) + rounding)


def round_to_lattice(pixels: torch.Tensor) -> torch.Tensor:
    """The nearest points of the lattice, float32, as the base classifier sees them. Gradients pass through unchanged."""
    return _RoundToLattice.apply(pixels)  # type: ignore[no-untyped-call]


class _RoundToLattice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.double() * STEPS_PER_UNIT).round_().float().mul_(1 / STEPS_PER_UNIT)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def choose_seed() -> int:
    """A seed from the operating system, which nobody knew when the model was trained or the picture was made."""
    return secrets.randbits(52)  # JSON readers hold such integers exactly


def place_on_lattice(image: torch.Tensor) -> FloatArray:
    """
    An image (float32 on the CPU) in steps of the lattice, `(values,)`. A picture within rounding of 8-bit levels is moved to
    them, see the top of this file.
    """
    steps = image.numpy().astype(np.float64).ravel() * STEPS_PER_UNIT
    levels = np.rint(steps * (1 / _LEVEL)) * _LEVEL
    return levels if np.abs(levels - steps).max(initial=0.0) <= _ROUNDING else steps


@dataclass(eq=False)
class NoisyImage:
    """One image `(channels, height, width)` on the device, and the place in the sequence of its noisy copies."""

    image: torch.Tensor
    key: bytes
    steps: Any
    """The image in steps of the lattice, float64: an array `(values,)`, or a tensor on the device that draws."""
    block_size: int
    drawn: int = 0
    remainder: Any = None
    """The rest of the last block: the generator that continues it, or the values."""

    def next_parts(self, count: int) -> Iterator[tuple[int, int, int]]:
        """For the next `count` draws: number of the block, first draw in it, and the number of draws."""
        while count:
            block, first = divmod(self.drawn, self.block_size)
            draws = min(count, self.block_size - first)
            yield block, first, draws
            self.drawn += draws
            count -= draws

    def block_digest(self, block: int) -> bytes:
        return hashlib.blake2b(block.to_bytes(8, "little"), key=self.key, digest_size=32).digest()


@dataclass(frozen=True)
class SampledNoise:
    """
    A distribution as the sampler draws it for images of up to `coordinates` values: radii and probabilities are corrected
    for the sampler's error, and for moving 8-bit pictures to their levels.
    """

    noise: SmoothingNoise
    coordinates: int

    @property
    def sigma(self) -> float:
        return self.noise.sigma

    @cached_property
    def slack(self) -> float:
        return total_variation(self.noise, self.coordinates)

    @cached_property
    def moved(self) -> float:
        return self.coordinates ** (0.5 if self.noise.norm == "l2" else 1.0) * _ROUNDING / STEPS_PER_UNIT

    def radius(self, p_a: ArrayLike, p_b: ArrayLike | None = None) -> FloatArray:
        p_a = np.asarray(p_a, np.float64)[()]
        others = 1 - p_a if p_b is None else np.asarray(p_b, np.float64)[()]
        radius = self.noise.radius(p_a - self.slack, others + self.slack)
        return np.maximum(0.0, radius - self.moved)

    def probability_needed(self, radius: ArrayLike, p_b: ArrayLike | None = None) -> FloatArray:
        radius = np.asarray(radius, np.float64)[()]
        others = None if p_b is None else np.asarray(p_b, np.float64)[()] + self.slack
        # the ball around the moved image must hold the ball around the image, at radius 0 the image itself
        return self.noise.probability_needed(radius + self.moved, others) + self.slack


class LatticeSampler(ABC):
    """
    Draws the noisy copies of several images at once.

    Args:
        noise: the distribution.
        method: name of the rule that gets the draws; another rule gets other noise.
        seed: seed of the noise.
        device: where the base classifier wants its pixels.
    """

    def __init__(self, noise: SmoothingNoise, method: str, seed: int, device: torch.device):
        self.noise = noise
        self.device = device
        self.scale = noise.sigma * STEPS_PER_UNIT
        self._key = f"{seed} {method} {noise.name} {float(noise.sigma)!r}"

    @staticmethod
    def on_device(noise: SmoothingNoise, method: str, seed: int, device: torch.device) -> "LatticeSampler":
        """The sampler for a device. CUDA draws there; for other devices the CPU draws, since some have no float64."""
        kind = TorchLatticeSampler if device.type == "cuda" else NumpyLatticeSampler
        return kind(noise, method, seed, device)

    def start(self, image: torch.Tensor) -> NoisyImage:
        """Start the copies of an image, `(channels, height, width)`, float32 on the CPU."""
        steps = place_on_lattice(image)
        settings = hashlib.blake2b(f"{self._key} {tuple(image.shape)}".encode()).digest()
        key = hashlib.blake2b(steps.tobytes(), key=settings).digest()
        block_size = max(1, _BLOCK_VALUES // image.numel())
        return NoisyImage(image.to(self.device), key, self._store(steps, image.shape), block_size)

    @abstractmethod
    def _store(self, steps: FloatArray, shape: torch.Size) -> Any:
        """The image in steps of the lattice, where and as `draw` needs it."""

    @abstractmethod
    def draw(self, images: Sequence[NoisyImage], counts: Sequence[int]) -> torch.Tensor:
        """The next `counts[i]` copies of each image, `(sum of counts, channels, height, width)`; images of one shape."""

    def finish(self, image: NoisyImage) -> None:  # noqa: B027 (only some samplers keep something)
        """Say that an image needs no further copies."""


@dataclass(eq=False)
class _Part:
    """Consecutive draws of one image from one generator, for the rows from `first_row` on."""

    generator: np.random.Generator
    steps: FloatArray
    first_row: int
    rows: int


class NumpyLatticeSampler(LatticeSampler):
    """Draws on the CPU, in as many threads as torch uses."""

    def __init__(self, noise: SmoothingNoise, method: str, seed: int, device: torch.device):
        super().__init__(noise, method, seed, device)
        self._free: list[np.random.Generator] = []  # making one costs more than a small batch of noise
        self._threads: ThreadPoolExecutor | None = None

    def _store(self, steps: FloatArray, shape: torch.Size) -> FloatArray:
        return steps

    def draw(self, images: Sequence[NoisyImage], counts: Sequence[int]) -> torch.Tensor:
        pixels = torch.empty((sum(counts), *images[0].image.shape))
        rows = pixels.numpy().reshape(len(pixels), -1)
        parts, finished = self._plan(images, counts)
        num_threads = min(torch.get_num_threads(), rows.size // _THREAD_VALUES)
        if num_threads > 1:
            self._threads = self._threads or ThreadPoolExecutor(torch.get_num_threads())
            list(self._threads.map(lambda share: self._fill(share, rows), _split(parts, len(rows), num_threads)))
        else:
            self._fill(parts, rows)
        self._free += finished
        return pixels.to(self.device)

    def _plan(
        self, images: Sequence[NoisyImage], counts: Sequence[int]
    ) -> tuple[list[_Part], list[np.random.Generator]]:
        """The parts that fill the rows, in order, and the generators that are free after that."""
        parts, finished, row = [], [], 0
        for image, count in zip(images, counts):
            for block, first, draws in image.next_parts(count):
                if first == 0:
                    image.remainder = self._make_generator(image.block_digest(block))
                parts.append(_Part(image.remainder, image.steps, row, draws))
                row += draws
                if first + draws == image.block_size:
                    finished.append(image.remainder)
        return parts, finished

    def _make_generator(self, digest: bytes) -> np.random.Generator:
        """A generator whose state is a digest, as uniform as the hash that numpy's seeding would make of it."""
        generator = self._free.pop() if self._free else np.random.Generator(np.random.SFC64(0))
        words = np.frombuffer(digest, np.uint64).copy()
        words[3] = 1  # SFC64's counter
        state = {"bit_generator": "SFC64", "state": {"state": words}, "has_uint32": 0, "uinteger": 0}
        generator.bit_generator.state = state
        return generator

    def finish(self, image: NoisyImage) -> None:
        if image.drawn % image.block_size:
            self._free.append(image.remainder)

    def _fill(self, parts: Sequence[_Part], rows: NDArray[np.float32]) -> None:
        """Fill the rows of these parts, as many at a time as stay in the processor's cache."""
        most = max(1, _BLOCK_VALUES // rows.shape[1])
        cached: list[_Part] = []
        num_rows = 0
        for part in parts:
            if cached and num_rows + part.rows > most:
                self._fill_cached(cached, rows)
                cached, num_rows = [], 0
            cached.append(part)
            num_rows += part.rows
        self._fill_cached(cached, rows)

    def _fill_cached(self, parts: Sequence[_Part], rows: NDArray[np.float32]) -> None:
        first, last = parts[0].first_row, parts[-1].first_row + parts[-1].rows
        values = np.empty((last - first, rows.shape[1]))
        pieces = [values[part.first_row - first : part.first_row - first + part.rows] for part in parts]
        for part, piece in zip(parts, pieces):
            self.noise.fill_array(part.generator, piece)
        values *= self.scale
        for part, piece in zip(parts, pieces):
            piece += part.steps
        out = rows[first:last]
        out[...] = np.rint(values, out=values)  # integers below 2^24: exact in float32
        out *= np.float32(1 / STEPS_PER_UNIT)


def _split(parts: list[_Part], num_rows: int, shares: int) -> list[list[_Part]]:
    """The parts in order, in shares of about as many rows each."""
    split: list[list[_Part]] = [[] for _ in range(shares)]
    for part in parts:
        split[min(shares - 1, part.first_row * shares // num_rows)].append(part)
    return [share for share in split if share]


class TorchLatticeSampler(LatticeSampler):
    """Draws with torch's generator on the device, in complete blocks, since its output depends on the size of a call."""

    def _store(self, steps: FloatArray, shape: torch.Size) -> torch.Tensor:
        return torch.from_numpy(steps).view(shape).to(self.device)

    def draw(self, images: Sequence[NoisyImage], counts: Sequence[int]) -> torch.Tensor:
        device = self.device
        generator = torch.Generator(device)
        values = torch.empty((sum(counts), *images[0].image.shape), dtype=torch.float64, device=device)
        row = 0
        for image, count in zip(images, counts):
            for block, first, draws in image.next_parts(count):
                if first == 0:
                    generator.manual_seed(int.from_bytes(image.block_digest(block)[:8], "little") >> 1)
                    shape = (image.block_size, *image.image.shape)
                    image.remainder = torch.empty(shape, dtype=torch.float64, device=device)
                    self.noise.fill_tensor(generator, image.remainder)
                copies = image.remainder[first : first + draws]
                torch.add(image.steps, copies, alpha=self.scale, out=values[row : row + draws])
                row += draws
        return values.round_().float().mul_(1 / STEPS_PER_UNIT)
