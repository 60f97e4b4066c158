"""Rules that the benchmark of certification compares with, and the limit of rules that find radii.

Each simulates many images at once from their class probabilities `(images, classes)`.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

from hf_smoothing import GaussianNoise
from hf_smoothing.core.bounds import clopper_pearson_lower
from hf_smoothing.core.two_stage_plan import prove

Floats = NDArray[np.float64]
Decisions = tuple[NDArray[np.bool_], NDArray[np.int64]]
"""Which images claim the radius, and the draws of each."""

SELECTION_DRAWS = 100
LIMIT_SELECTION_DRAWS = 32
BUDGET = 100_000
STAGES = (100, 1_000, 10_000, BUDGET)
_SIZE_RATIO = 1.15
_PRICES = np.geomspace(1e-6, 1e-2, 41)
"""Radii per draw, in units of sigma."""
_SHARES = np.linspace(0, 1, 21)
"""Levels of the runner-up's share of the draws that miss the class."""


def select(p: Floats, generator: np.random.Generator) -> NDArray[np.int64]:
    return generator.multinomial(SELECTION_DRAWS, p).argmax(1)


def decide_fixed(
    p: Floats, radius: float, noise: GaussianNoise, alpha: float, generator: np.random.Generator
) -> Decisions:
    """The usual protocol: all draws of the budget for every image."""
    top, rows = select(p, generator), np.arange(len(p))
    hits = generator.multinomial(BUDGET, p)[rows, top]
    claims = clopper_pearson_lower(hits, BUDGET, alpha) > noise.probability_needed(radius)
    return claims, np.full(len(p), SELECTION_DRAWS + BUDGET)


def decide_uncut(
    p: Floats, radius: float, noise: GaussianNoise, alpha: float, generator: np.random.Generator
) -> Decisions:
    """100 draws select the class; then an e-process with the Jeffreys prior (Krichevsky-Trofimov) on all of (0, 1)."""
    p_needed = float(noise.probability_needed(radius))
    top_probability = p[np.arange(len(p)), select(p, generator)]
    hits, total_draws, claims = np.zeros(len(p), np.int64), np.zeros(len(p), np.int64), np.zeros(len(p), bool)
    running, draws, step = np.arange(len(p)), 0, 8
    while len(running) and draws < BUDGET:
        hits[running] += generator.binomial(step, top_probability[running])
        draws += step
        seen = hits[running]
        log_e = special.betaln(0.5 + seen, 0.5 + draws - seen) - special.betaln(0.5, 0.5)
        log_e = log_e - special.xlogy(seen, p_needed) - special.xlog1py(draws - seen, -p_needed)
        above = seen > p_needed * draws
        ends = (log_e >= np.log(1 / alpha)) | (~above & (log_e >= np.log(100)))
        total_draws[running] = draws
        claims[running[ends & above]] = True
        running = running[~ends]
        step = max(8, draws // 64)
    return claims, SELECTION_DRAWS + total_draws


def decide_in_stages(
    p: Floats, radius: float, noise: GaussianNoise, alpha: float, generator: np.random.Generator
) -> Decisions:
    """100 draws select the class; then Clopper-Pearson at each stage, with a share of alpha (Horvath et al. 2022)."""
    p_needed, alpha = float(noise.probability_needed(radius)), alpha / len(STAGES)
    top_probability = p[np.arange(len(p)), select(p, generator)]
    hits, total_draws, claims = np.zeros(len(p), np.int64), np.zeros(len(p), np.int64), np.zeros(len(p), bool)
    running, draws = np.arange(len(p)), 0
    for stage in STAGES:
        hits[running] += generator.binomial(stage - draws, top_probability[running])
        draws, seen = stage, hits[running]
        total_draws[running] = draws
        above = clopper_pearson_lower(seen, draws, alpha) > p_needed
        below = clopper_pearson_lower(draws - seen, draws, alpha) > 1 - p_needed
        claims[running[above]] = True
        running = running[~above & ~below]
    return claims, SELECTION_DRAWS + total_draws


def find_fixed(
    p: Floats, n: int, noise: GaussianNoise, alpha: float, generator: np.random.Generator
) -> tuple[Floats, Floats]:
    """Radii of the usual protocol: with its one-sided bound, and with the two bounds of the two-stage rule."""
    selected, rows = select(p, generator), np.arange(len(p))
    counts = generator.multinomial(n, p)
    hits = counts[rows, selected]
    counts[rows, selected] = 0
    one_sided = noise.radius(clopper_pearson_lower(hits, n, alpha))
    return one_sided, noise.radius(*prove(hits, counts.max(1), n, alpha))


def limit(p: Floats, noise: GaussianNoise, alpha: float) -> tuple[Floats, Floats]:
    """
    What no allocation of draws exceeds: class and probabilities are known, and n per image is chosen so that all images pay
    the same price per draw. 32 selection draws are added.

    Returns:
        For the one-sided bound and for the two bounds of the two-stage rule: `(prices, 2)`, mean radius and mean draws.
    """
    sizes = [8]
    while sizes[-1] < BUDGET:
        sizes.append(max(sizes[-1] + 1, round(sizes[-1] * _SIZE_RATIO)))
    choices = np.array([0, *sizes])
    nothing = np.zeros((len(p), 1))
    one_sided, two_sided = zip(*(_mean_radii(p, size, noise, alpha) for size in sizes))
    curves = []
    for radii in (one_sided, two_sided):
        gains = np.concatenate([nothing, np.stack(radii, axis=1)], axis=1)
        best = [(gains - price * noise.sigma * choices).argmax(1) for price in _PRICES]
        rows = np.arange(len(p))
        points = [(gains[rows, b].mean(), LIMIT_SELECTION_DRAWS + choices[b].mean()) for b in best]
        curves.append(np.array(points)[::-1])
    return curves[0], curves[1]


def _mean_radii(p: Floats, size: int, noise: GaussianNoise, alpha: float) -> tuple[Floats, Floats]:
    """The mean radius that `size` draws of the true class prove for each image, with each of the two bounds."""
    nodes = [0]
    while nodes[-1] < size:  # numbers of misses, with gaps of .4 standard deviations
        gap = 0.4 * math.sqrt(nodes[-1])
        nodes.append(nodes[-1] + (2 * int(gap / 2) + 1 if gap > 1 else 1))
    misses = np.array(nodes)
    misses = misses[misses <= size]
    second, first = np.sort(p, axis=1)[:, -2:].T
    edges = np.append((misses[:-1] + misses[1:] - 1) // 2, size)
    chances = np.diff(special.bdtr(edges, size, (1 - first)[:, None]), axis=1, prepend=0.0)
    one_sided = noise.radius(clopper_pearson_lower(size - misses, size, alpha))
    two_sided = noise.radius(*prove(size - misses, np.outer(_SHARES, misses), size, alpha))
    share = np.rint(second / np.maximum(1 - first, 1e-12) * (len(_SHARES) - 1)).astype(np.int64)
    by_level = chances @ two_sided.T
    return chances @ one_sided, by_level[np.arange(len(p)), share]
