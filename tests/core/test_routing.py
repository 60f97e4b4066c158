"""What the votes of a router prove, and how radii of several levels combine."""

import numpy as np
import pytest
from scipy import special, stats

from hf_smoothing import GaussianNoise
from hf_smoothing.core.routing import combine_radii, exclusion_radii, median_levels

NOISE = GaussianNoise(2.0)


def true_radii(probabilities):
    """Within which the median is not each level: from P(h < l) and P(h > l), whichever is above one half."""
    at_most = np.cumsum(probabilities, -1)
    below, above = at_most - probabilities, 1 - at_most
    return NOISE.sigma * np.maximum(0, special.ndtri(np.clip(np.maximum(below, above), 0, 1)))


def test_the_level_is_the_median_of_the_votes():
    votes = np.array([[10, 0, 0], [0, 0, 10], [3, 3, 4], [5, 0, 5], [4, 2, 4], [5, 5, 0]])
    assert median_levels(votes).tolist() == [0, 2, 1, 0, 1, 0]


def test_far_levels_are_excluded_farther_than_near_ones():
    votes = np.array([[150, 80, 26], [26, 80, 150], [10, 236, 10], [128, 0, 128], [256, 0, 0]])
    radii = exclusion_radii(votes, NOISE, 0.001)
    assert (radii[np.arange(5), median_levels(votes)] == 0).all()
    assert radii[0, 2] > radii[0, 1] >= 0
    assert radii[0].tolist() == radii[1, ::-1].tolist()
    assert radii[2, 0] == radii[2, 2] > 0
    assert (radii[3] == 0).all()  # the votes do not tell: no level is excluded
    assert radii[4, 1] == radii[4, 2] == pytest.approx(NOISE.radius((0.001 / 4) ** (1 / 256)))


def test_one_level_needs_no_votes():
    assert exclusion_radii(np.array([[256]]), NOISE, 0.001).tolist() == [[0.0]]


@pytest.mark.parametrize(
    "probabilities",
    [(0.5, 0.0, 0.5), (0.3, 0.3, 0.4), (0.52, 0.3, 0.18), (0.1, 0.85, 0.05), (0.96, 0.03, 0.01), (0.4, 0.1, 0.2, 0.3)],
)
def test_all_radii_hold_at_once(probabilities):
    """Of 100,000 pictures, no more have any radius that is too large than alpha, and the bounds are not far from it."""
    alpha, draws = 0.05, 64
    votes = np.random.default_rng(0).multinomial(draws, probabilities, 100_000)
    radii = exclusion_radii(votes, NOISE, alpha)
    wrong = (radii > true_radii(np.array(probabilities))).any(1)
    assert stats.binom.sf(wrong.sum() - 1, len(wrong), alpha) > 1e-4
    assert wrong.mean() > alpha / 50 or max(probabilities) > 0.9  # so many votes prove no more


def test_the_theorem_on_random_radii():
    """The system keeps its class up to the radius, and no farther where every level does its worst."""
    generator = np.random.default_rng(0)
    excluded, agreed = generator.uniform(0, 2, (2, 1000, 3))
    excluded[np.arange(1000), generator.integers(3, size=1000)] = 0  # the level of the picture
    radii = combine_radii(excluded, agreed)
    for distance in np.linspace(0, 2.2, 23):
        reachable = excluded <= distance
        changes = (reachable & (agreed <= distance)).any(1)
        assert (changes == (radii <= distance)).all()


def test_a_majority_inside_a_set_does_not_keep_the_most_frequent_level_in_it():
    """Why the level is the median: of .3, .3, .4, six tenths lie in the first two levels, and the third is most frequent."""
    votes = np.array([30, 30, 40])
    assert votes.argmax() == 2
    assert median_levels(votes) == 1
