"""One classifier of two noise levels: its certificates against what is known in closed form, and an attacker of the level.

Pictures have two pixels. At the primary level the classes depend on the first pixel only, at the fallback level on the side
of a straight line. So the level, the class and the distance to the nearest picture with another class are known exactly.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import special, stats

from hf_smoothing import ABSTAIN, GaussianNoise, SmoothedClassifier, TwoStageRule, UniformNoise
from hf_smoothing.core.agreement import ALPHA_SHARES, bound_agreement, radius_of_fallback, radius_of_primary
from hf_smoothing.core.fallback_classifier import FallbackClassifier
from hf_smoothing.core.fixed_rule import FixedRule

LEVELS = (0.5, 0.25)
ALPHA = 0.05
INSIDE = 1 - 1e-6
"""A certificate is about changes smaller than its radius."""


@dataclass(frozen=True)
class World:
    """
    At the primary level, the class is 0 where the first pixel is below `-half`, 2 where it is above `half`, and 1 between.
    At the fallback level, it is 2 where `direction @ x > offset`, else 0. With `half=0` there are two classes.

    Symmetric noise leaves the answers beyond a line as they are. The copies agree on class 2 where the first pixel is above
    `edge`, and on class 0 where it is below `-edge`.
    """

    half: float
    agreement: float
    angle: float
    offset: float

    @property
    def direction(self):
        return np.array([np.cos(self.angle), np.sin(self.angle)])

    @property
    def edge(self):
        return self.half + LEVELS[0] * special.ndtri(self.agreement)

    def strips(self, x):
        """0 and 2: the primary level is in use, with this class; 1: the fallback level."""
        return np.searchsorted([-self.edge, self.edge], x[:, 0])

    def classes(self, x):
        """The predictions of the system."""
        strips = self.strips(x)
        return np.where(strips == 1, 2 * (x @ self.direction > self.offset), strips)

    def distances(self, x):
        """How far the nearest picture with another class is: in each strip, beyond the line of its class."""
        edges = [-np.inf, -self.edge, self.edge, np.inf]
        classes, distances = self.classes(x), []
        sign = classes - 1
        for strip in range(3):
            to_strip = np.maximum(np.maximum(edges[strip] - x[:, 0], x[:, 0] - edges[strip + 1]), 0)
            if strip != 1:
                distances.append(np.where(classes == strip, np.inf, to_strip))
                continue
            to_class = sign * (x @ self.direction - self.offset)  # 0 or below: another class
            # the nearest point beyond the line, of those inside the strip: if the foot lies outside, one on an edge
            foot = x[:, 0] - np.maximum(to_class, 0) * sign * self.direction[0]
            best = np.where(np.abs(foot) <= self.edge, np.maximum(to_class, 0), np.inf)
            for edge in (-self.edge, self.edge):
                along = edge - x[:, 0]
                rest = sign * (x @ self.direction - self.offset + along * self.direction[0])
                up = np.where(rest <= 0, 0.0, rest / max(abs(self.direction[1]), 1e-12))
                best = np.minimum(best, np.hypot(along, up))
            distances.append(np.maximum(best, to_strip))
        return np.min(distances, 0)

    def system(self):
        def classify_primary(pixels):
            first = pixels.flatten(1)[:, 0]
            return torch.nn.functional.one_hot((first > -self.half).long() + (first > self.half).long(), 3).float()

        def classify_fallback(pixels):
            beyond = pixels.flatten(1) @ torch.tensor(self.direction, dtype=torch.float32) > self.offset
            return torch.nn.functional.one_hot(2 * beyond.long(), 3).float()

        at_levels = [
            SmoothedClassifier(classify, GaussianNoise(sigma), batch_size=16384)
            for classify, sigma in zip((classify_primary, classify_fallback), LEVELS)
        ]
        return FallbackClassifier(*at_levels, agreement=self.agreement)


WORLDS = {
    "two classes": World(0.0, 0.8, 0.7, 0.1),
    "three classes": World(0.15, 0.5, 0.4, -0.1),
    "three classes, most must agree": World(0.3, 0.74, -0.5, 0.2),
    "the other class at the fallback": World(0.0, 0.74, 2.8, 0.0),
}


def pictures(world, count, seed):
    """
    Many of them where certificates are weakest: at the edge where the level changes, at the line of the fallback, and where
    the fallback level is used.
    """
    generator = np.random.default_rng(seed)
    x = generator.uniform(-1.5, 1.5, (count, 2))
    place = generator.integers(4, size=count)
    x[:, 0] = np.where(
        place == 0, world.edge * generator.choice([-1, 1], count) + generator.normal(0, 0.01, count), x[:, 0]
    )
    x[:, 0] = np.where(place == 2, generator.uniform(-world.edge, world.edge, count), x[:, 0])
    gap = x @ world.direction - world.offset - generator.normal(0, 0.01, count)
    return np.where((place == 1)[:, None], x - gap[:, None] * world.direction, x).astype(np.float32)


RULE = TwoStageRule(alpha=ALPHA, draws=100, max_draws=400)


def certify(system, x, seed=0, rule=RULE):
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
    """Walk to both edges of the level, to the fallback's line, and about, inside the radius: whether the class changed."""
    x, changed = x.astype(np.float64), np.zeros(len(x), bool)
    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    ways = [np.array([1.0, 0.0]), np.array([-1.0, 0.0]), world.direction, -world.direction]
    for way in ways + [np.array([np.cos(angle), np.sin(angle)]) for angle in angles]:
        for part in (0.25, 0.5, 0.75, 1.0):
            changed |= world.classes(x + part * INSIDE * radii[:, None] * way) != predictions
    for edge in (-world.edge, world.edge):  # just across the edge, then along it
        along = np.abs(edge - x[:, 0]) + 1e-7
        rest = np.sqrt(np.maximum((INSIDE * radii) ** 2 - along**2, 0))
        for up in (-1, -0.5, 0, 0.5, 1):
            there = np.stack([edge + np.sign(edge - x[:, 0]) * 1e-7, x[:, 1] + up * rest], 1)
            changed |= (along < INSIDE * radii) & (world.classes(there) != predictions)
    return changed & (predictions != ABSTAIN)


@pytest.mark.parametrize("name", WORLDS)
def test_distances_are_the_smallest_that_an_attacker_finds(name):
    world = WORLDS[name]
    x = pictures(world, 300, 1).astype(np.float64)
    distances, classes = world.distances(x), world.classes(x)
    assert not attack_level(world, x, classes, distances).any()
    angles = np.linspace(0, 2 * np.pi, 2000)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    for picture, distance, label in zip(x, distances, classes):
        assert (world.classes(picture + (distance * 1.01 + 0.01) * circle) != label).any()


@pytest.mark.parametrize("name", WORLDS)
def test_both_base_classifiers_agree_as_the_world_says(name):
    """The probability of the most probable class is the agreement at the edge, above it beyond, and below it within."""
    world = WORLDS[name]
    for first in (world.edge, -world.edge, world.edge + 0.1, 0.0):
        upper, lower = special.ndtr((first - world.half) / LEVELS[0]), special.ndtr((-world.half - first) / LEVELS[0])
        most = max(upper, lower, 1 - upper - lower)
        assert (
            most == pytest.approx(world.agreement)
            if abs(first) == world.edge
            else ((most > world.agreement) == (abs(first) > world.edge))
        )


def check_certificates(name, count, seed):
    world = WORLDS[name]
    x = pictures(world, count, seed)
    predictions, radii, found = certify(world.system(), x, seed)
    wrong = is_wrong(world, x, predictions, radii)
    for uses_fallback in (True, False):
        part = (world.strips(x) == 1) == uses_fallback
        assert not is_too_many(wrong[part]), (uses_fallback, wrong[part].mean())
    assert not (attack_level(world, x, predictions, radii) & ~wrong).any()
    assert (radii > 0.1).mean() > 0.2
    assert {row.sigma for row in found if row.radius > 0.03} == set(LEVELS)


@pytest.mark.parametrize("name", WORLDS)
def test_no_more_certificates_are_wrong_than_alpha(name):
    check_certificates(name, 1000, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_no_more_of_100_000_certificates_are_wrong_than_alpha(name):
    for seed in range(5):
        check_certificates(name, 5000, seed)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("the other class at the fallback", "the level of the votes"),
        ("three classes", "the level of the votes"),
        ("two classes", "as if one half had to agree"),
        ("the other class at the fallback", "as if one half had to agree"),
    ],
)
def test_wrong_systems_are_caught(name, version):
    world = WORLDS[name]
    x = pictures(world, 1000, 0)
    predictions, radii, found = certify(world.system(), x)
    choices = [row.level_choice for row in found]
    in_use = np.array([LEVELS.index(row.sigma) for row in found])
    if version == "the level of the votes":
        predictions, radii = (
            np.array([getattr(choice, column)[level] for choice, level in zip(choices, in_use)])
            for column in ("predictions", "radii")
        )
    else:
        noise = GaussianNoise(LEVELS[0])
        stays_primary = [radius_of_primary(choice.p_lower, 0.5, noise) for choice in choices]
        stays_fallback = [radius_of_fallback(choice.p_upper, 0.5, noise) for choice in choices]
        same = np.array([choice.predictions for choice in choices]) == predictions[:, None]
        b = np.array([choice.radii for choice in choices]) * same
        radii = np.minimum(np.maximum(stays_fallback, b[:, 0]), np.maximum(stays_primary, b[:, 1]))
    wrong = is_wrong(world, x, predictions, radii)
    assert is_too_many(wrong)
    assert attack_level(world, x, predictions, radii).any()


def test_the_certificate_follows_from_what_it_records():
    world = WORLDS["three classes, most must agree"]
    *_, found = certify(world.system(), pictures(world, 300, 3))
    for row, choice in ((row, row.level_choice) for row in found):
        assert choice.levels == LEVELS
        assert choice.agreement == world.agreement
        assert sum(choice.alphas) == pytest.approx(row.alpha) == ALPHA
        assert sum(choice.num_samples) == row.num_samples
        b = [radius * (other == row.prediction) for radius, other in zip(choice.radii, choice.predictions)]
        a = [choice.radius * (row.sigma == level) for level in reversed(LEVELS)]
        assert row.radius == (0 if row.abstains else min(max(a[0], b[0]), max(a[1], b[1])))
    assert {choice.num_samples[2] for choice in (row.level_choice for row in found)} >= {0, 256}
    assert any(row.level_choice.num_samples[1] == 0 for row in found)  # the fallback could add nothing


def test_it_never_loses_against_the_primary_level_where_more_than_half_must_agree():
    world = WORLDS["three classes"]
    system, x = world.system(), pictures(world, 300, 2)
    for rule in (RULE, FixedRule(alpha=ALPHA, n0=20, n=300)):
        *_, found = certify(system, x, rule=rule)
        *_, primary = certify(system.primary, x, rule=replace(rule, alpha=ALPHA_SHARES[0] * ALPHA))
        used = np.array([row.sigma == LEVELS[0] for row in found])
        for row, single in ((row, single) for row, single, uses in zip(found, primary, used) if uses):
            proved = GaussianNoise(LEVELS[0]).radius(single.p_lower)  # without the runner-up
            assert row.prediction == single.prediction
            assert proved - 1e-6 <= row.radius <= single.radius
        assert 0.2 < used.mean() < 0.9


def test_counted_draws_of_the_primary_level_bound_the_agreement_where_they_are_enough():
    world, rule = WORLDS["three classes"], FixedRule(alpha=ALPHA, n0=20, n=1000)
    system, x = world.system(), pictures(world, 100, 0)
    *_, found = certify(system, x, rule=rule)
    *_, primary = certify(system.primary, x, rule=replace(rule, alpha=ALPHA_SHARES[0] * ALPHA))
    bounds = [row.level_choice.p_upper for row in found if row.sigma == LEVELS[1]]
    assert min(bounds) < 0.5
    expected = [bound_agreement(single.counts, ALPHA_SHARES[2] * ALPHA) for single in primary]
    assert all(row.level_choice.p_upper in (1, bound) for row, bound in zip(found, expected))
    assert {row.level_choice.num_samples[2] for row in found} == {0}


def test_the_bound_of_the_agreement_takes_no_more_draws_than_allowed():
    world = WORLDS["three classes, most must agree"]
    rule = TwoStageRule(alpha=ALPHA, draws=40, max_draws=100)
    *_, found = certify(world.system(), pictures(world, 200, 0), rule=rule)
    drawn = np.array([row.level_choice.num_samples for row in found])
    assert drawn.max() <= 100
    assert drawn[:, 2].any()


def test_any_callable_has_a_fallback(linear, small_images, noise):
    system = SmoothedClassifier(linear, noise, batch_size=512).with_fallback((0.5, 0.1), 0.9)
    for image, row in zip(small_images, system.certify(small_images, draws=100, seed=0)):
        exact = float(linear.exact_radius(image[None]))
        assert row.abstains or (row.prediction == int(linear.margin(image[None]) > 0) and row.radius < exact)
    assert system.certify(small_images, draws=100, seed=0)[3:5] == system.certify(small_images[3:5], draws=100, seed=0)
    assert set(system.predict(small_images)) <= {ABSTAIN, 0, 1}
    with pytest.raises(ValueError, match="method='sequential' has no meaning with sigma='auto'"):
        system.certify(small_images, radius=0.1)
    assert system.with_noise(GaussianNoise(0.3)).certify(small_images[:1], draws=100)[0].sigma == 0.3


def test_other_noise_is_refused(linear):
    with pytest.raises(ValueError, match="A fallback level takes Gaussian noise, not uniform"):
        SmoothedClassifier(linear, UniformNoise(0.5)).with_fallback()
