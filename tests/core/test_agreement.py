"""What the agreement of noisy copies proves about the noise level."""

import numpy as np
import pytest
from scipy import special, stats

from hf_smoothing import GaussianNoise
from hf_smoothing.core.agreement import bound_agreement, check_agreement, radius_of_fallback, radius_of_primary

NOISE = GaussianNoise(0.5)


def quantile(probability):
    return 0.5 * special.ndtri(probability)


@pytest.mark.parametrize("agreement", [0.5, 0.74])
def test_radii_within_which_the_level_cannot_change(agreement):
    threshold = quantile(agreement)
    assert radius_of_primary(0.9, agreement, NOISE) == pytest.approx(quantile(0.9) - threshold)
    assert radius_of_fallback(0.3, agreement, NOISE) == pytest.approx(threshold - quantile(0.3))
    assert radius_of_primary(agreement, agreement, NOISE) == radius_of_fallback(agreement, agreement, NOISE) == 0
    assert radius_of_primary(0.3, agreement, NOISE) == radius_of_fallback(0.9, agreement, NOISE) == 0
    assert (
        radius_of_primary(0.0, agreement, NOISE) == radius_of_fallback(1.0, agreement, NOISE) == 0
    )  # nothing is known


@pytest.mark.parametrize("probabilities", [(0.5, 0.5), (0.34, 0.33, 0.33), (0.1,) * 10, (0.74, 0.2, 0.06)])
def test_the_bound_of_the_largest_count_holds_for_the_most_probable_class(probabilities):
    """Although alpha is not split over classes, of which any may be drawn most often."""
    counts = np.random.default_rng(0).multinomial(256, probabilities, 20_000)
    _, first, found = np.unique(counts.max(1), return_index=True, return_counts=True)
    bounds = [bound_agreement(row, 0.05) for row in counts[first]]  # the smaller counts do not matter
    wrong = found[np.array(bounds) < max(probabilities)].sum()
    assert stats.binom.sf(wrong - 1, 20_000, 0.05) > 1e-4


def test_a_bound_that_sees_more_draws_until_it_is_small_enough_is_wrong_too_often():
    """Why the number of draws must not depend on them."""
    draws = np.random.default_rng(0).random((20_000, 4096)) < 0.74
    sizes = [64, 128, 256, 512, 1024, 2048, 4096]
    hits = np.cumsum(draws, axis=1)[:, np.array(sizes) - 1]
    small_enough = np.zeros(len(draws), bool)
    for column, size in enumerate(sizes):
        bounds = np.array([bound_agreement([most, size - most], 0.05) for most in range(size + 1)])
        wrong = np.maximum(bounds, 0)[hits[:, column]] < 0.74
        assert stats.binom.sf(wrong.sum() - 1, len(draws), 0.05) > 1e-4  # at each number alone, it holds
        small_enough |= wrong
    assert stats.binom.sf(small_enough.sum() - 1, len(draws), 0.05) < 1e-12


@pytest.mark.parametrize("levels", [(0.5,), (0.5, 0.5), (1.0, 0.5, 0.25), ()])
def test_levels_must_be_two(levels):
    with pytest.raises(ValueError, match="must be two noise levels, the primary and the fallback"):
        check_agreement(levels, 0.5)


@pytest.mark.parametrize("agreement", [0.49, 1.0, float("nan")])
def test_an_agreement_below_one_half_or_of_all_copies_is_refused(agreement):
    with pytest.raises(ValueError, match="must be a share of the noisy copies from"):
        check_agreement((0.5, 0.12), agreement)
