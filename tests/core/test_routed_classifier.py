"""One classifier for all noise levels: its certificates against what is known in closed form, and an attacker of the level.

Pictures have two pixels. The router's levels and the classes at each level are separated by straight lines, so that
for every picture the level, the class and the distance to the nearest picture with another class are known exactly.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats

from hf_smoothing import ABSTAIN, GaussianNoise, SmoothedClassifier, TwoStageRule
from hf_smoothing.core.routed_classifier import RoutedClassifier

LEVELS = (0.25, 0.5, 1.0)
ALPHA = 0.05
INSIDE = 1 - 1e-6
"""A certificate is about changes smaller than its radius."""


@dataclass(frozen=True)
class Lines:
    """
    A router that goes up a level at each of its `steps` along the first pixel, and at each level l a line: the class
    is 1 where `directions[l] @ x > offsets[l]`. All under noise have the same answers as without: the noise is
    symmetric.
    """

    steps: tuple[float, float]
    angles: tuple[float, float, float]
    offsets: tuple[float, float, float]

    @property
    def directions(self):
        return np.stack([np.cos(self.angles), np.sin(self.angles)], 1)

    def levels(self, x):
        return np.searchsorted(self.steps, x[:, 0])

    def classes(self, x):
        """The predictions of the system."""
        return (x @ self.directions.T > self.offsets)[np.arange(len(x)), self.levels(x)].astype(int)

    def distances(self, x):
        """How far the nearest picture with another class is: in each level's strip, beyond the line of its class."""
        edges = [-np.inf, *self.steps, np.inf]
        distances = []
        for level, (direction, offset) in enumerate(zip(self.directions, self.offsets)):
            sign = 2 * self.classes(x) - 1
            to_class = sign * (x @ direction - offset)  # 0 or below: the level has another class there
            to_strip = np.maximum(np.maximum(edges[level] - x[:, 0], x[:, 0] - edges[level + 1]), 0)
            # the nearest point beyond the line, of those inside the strip: if the foot lies outside, one on an edge
            foot = x[:, 0] - np.maximum(to_class, 0) * sign * direction[0]
            inside = (foot >= edges[level]) & (foot <= edges[level + 1])
            best = np.where(inside, np.maximum(to_class, 0), np.inf)
            for edge in edges[level : level + 2]:
                if np.isfinite(edge):
                    along = edge - x[:, 0]
                    rest = sign * (x @ direction - offset + along * direction[0])
                    up = np.where(rest <= 0, 0.0, rest / max(abs(direction[1]), 1e-12))
                    best = np.minimum(best, np.hypot(along, up))
            distances.append(np.maximum(best, to_strip))
        return np.min(distances, 0)

    def system(self, **settings):
        def classify(direction, offset):
            def call(pixels):
                margin = pixels.flatten(1) @ torch.tensor(direction, dtype=torch.float32) - offset
                return torch.stack([-margin, margin], 1)

            return call

        at_level = [
            SmoothedClassifier(classify(direction, offset), GaussianNoise(sigma), batch_size=16384)
            for direction, offset, sigma in zip(self.directions, self.offsets, LEVELS)
        ]
        return RoutedClassifier(at_level, self.route, GaussianNoise(1.0), **settings)

    def route(self, pixels):
        levels = torch.bucketize(pixels.flatten(1)[:, 0].contiguous(), torch.tensor(self.steps))
        return torch.nn.functional.one_hot(levels, 3).float()


WORLDS = {
    "the class changes with the level": Lines((0.0, 1.5), (0, 0, 0), (-5.0, 5.0, -5.0)),
    "the class changes a little beyond the level": Lines((0.0, 1.0), (0, 0, 0), (-5.0, 0.3, 1.4)),
    "neighbours agree": Lines((0.0, 0.4), (0, 0.5, 1.2), (-0.3, -0.5, 0.6)),
    "classes across levels": Lines((-0.3, 0.5), (np.pi / 2, 0.4, -1.0), (0.1, 0.2, -0.2)),
}


def pictures(count, seed):
    return np.random.default_rng(seed).uniform(-1.5, 2.0, (count, 2)).astype(np.float32)


def certify(system, x, seed=0):
    rule = TwoStageRule(alpha=ALPHA, draws=100, max_draws=400)
    stream = dict(system.certify_stream(torch.from_numpy(x).view(-1, 1, 1, 2), rule, seed=seed))
    found = [stream[position] for position in range(len(x))]
    return np.array([row.prediction for row in found]), np.array([row.radius for row in found]), found


def is_wrong(world, x, predictions, radii):
    """Whether a certificate claims more than is true."""
    x = x.astype(np.float64)
    return (predictions != ABSTAIN) & ((predictions != world.classes(x)) | (radii > world.distances(x) + 1e-5))


def is_too_many(wrong):
    return bool(stats.binom.sf(wrong.sum() - 1, len(wrong), ALPHA) < 1e-4)


def attack_level(world, x, predictions, radii):
    """Walk to the router's boundaries, to the classes' lines, and about, inside the radius: whether the class changed."""
    x, changed = x.astype(np.float64), np.zeros(len(x), bool)
    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    ways = [np.array([1.0, 0.0]), np.array([-1.0, 0.0]), *world.directions, *-world.directions]
    for way in ways + [np.array([np.cos(angle), np.sin(angle)]) for angle in angles]:
        for part in (0.25, 0.5, 0.75, 1.0):
            changed |= world.classes(x + part * INSIDE * radii[:, None] * way) != predictions
    for step in world.steps:  # just across the boundary, then along it
        along = np.abs(step - x[:, 0]) + 1e-7
        rest = np.sqrt(np.maximum((INSIDE * radii) ** 2 - along**2, 0))
        for up in (-1, -0.5, 0, 0.5, 1):
            there = np.stack([step + np.sign(step - x[:, 0]) * 1e-7, x[:, 1] + up * rest], 1)
            changed |= (along < INSIDE * radii) & (world.classes(there) != predictions)
    return changed & (predictions != ABSTAIN)


@pytest.mark.parametrize("name", WORLDS)
def test_distances_are_the_smallest_that_an_attacker_finds(name):
    world, x = WORLDS[name], pictures(300, 1).astype(np.float64)
    distances, classes = world.distances(x), world.classes(x)
    assert not attack_level(world, x, classes, distances).any()
    angles = np.linspace(0, 2 * np.pi, 2000)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    for picture, distance, label in zip(x[distances < 2], distances[distances < 2], classes[distances < 2]):
        there = picture + (distance * 1.01 + 0.01) * circle
        assert (world.classes(there) != label).any()


def check_certificates(name, count, seed):
    world, x = WORLDS[name], pictures(count, seed)
    predictions, radii, found = certify(world.system(), x, seed)
    wrong = is_wrong(world, x, predictions, radii)
    assert not is_too_many(wrong), wrong.mean()
    assert not (attack_level(world, x, predictions, radii) & ~wrong).any()
    assert (radii > 0.1).mean() > 0.3
    return world, x, found


@pytest.mark.parametrize("name", WORLDS)
def test_no_more_certificates_are_wrong_than_alpha(name):
    check_certificates(name, 1000, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_no_more_of_100_000_certificates_are_wrong_than_alpha(name):
    for seed in range(5):
        check_certificates(name, 5000, seed)


@pytest.mark.parametrize("version", ["unsmoothed router", "default level in doubt"])
def test_wrong_systems_are_caught(version):
    world, x = WORLDS["the class changes with the level"], pictures(1000, 0)
    predictions, radii, found = certify(world.system(), x)
    at_level = [certify(smoothed, x) for smoothed in world.system().at_level]
    level = world.levels(x)
    if version == "default level in doubt":
        doubt = np.array([row.routing.kept != (row.sigma,) or row.radius == 0 for row in found])
        level = np.where(doubt, 1, level)
        predictions, radii = (
            np.where(doubt, at_level[1][0], predictions),
            np.where(doubt, at_level[1][1], radii),
        )
    else:
        predictions, radii = (
            np.array([column[which] for column in at_level])[level, np.arange(len(x))] for which in (0, 1)
        )
    wrong = is_wrong(world, x, predictions, radii)
    assert is_too_many(wrong)
    assert attack_level(world, x, predictions, radii).any()
