"""Whether what the page claims while it draws is right, whenever someone stops it."""

import numpy as np
import pytest
import torch
from scipy import stats

from hf_smoothing import ABSTAIN, GaussianNoise, SmoothedClassifier, clopper_pearson_lower
from hf_smoothing.core.rule_protocols import CleanPass
from hf_smoothing.space.live_claims import make_live_rule, watch_claims

NOISE = GaussianNoise(0.5)


def at_edge(radius, p_b, others):
    """Class 0 exactly at the edge of a radius, one rival, and other classes: a claim beyond the radius is wrong."""
    p_a = float(NOISE.probability_needed(radius, p_b))
    return np.array([p_a, p_b, *[(1 - p_a - p_b) / others] * others])


CASES = {
    "two tied": (0.0, np.array([0.5, 0.5])),
    "four tied": (0.0, np.full(4, 0.25)),
    "a small radius": (0.3 - 1e-9, at_edge(0.3 - 1e-9, 0.15, 6)),
    "a large radius": (1.0 - 1e-9, at_edge(1.0 - 1e-9, 0.008, 6)),
    "a rival with all the rest": (
        0.5 - 1e-9,
        np.array([NOISE.probability_needed(0.5), 1 - NOISE.probability_needed(0.5)]),
    ),
}


def watch_simulated(probabilities, alpha, max_draws, runs, generator):
    """The live rule on many images with known class probabilities; yields its outcomes after each batch of draws."""
    rows = np.arange(runs)
    rule = make_live_rule(NOISE, alpha, max_draws)
    claims = rule.start(NOISE, runs, len(probabilities))
    claims.start(rows, CleanPass(np.tile(np.log(probabilities), (runs, 1))))
    size = draws = 0
    while draws < max_draws:
        size = min(max(8, draws // 8), max_draws - draws)
        draws += size
        claims.update(rows, generator.multinomial(size, probabilities, size=runs))
        yield claims.counts, claims.outcomes(rows)


def claim_by_clopper_pearson(counts, alpha):
    """What a page would claim that bounds the leading class at every look as if it were the only one."""
    hits = counts.max(1)
    return counts.argmax(1), NOISE.radius(clopper_pearson_lower(hits, counts.sum(1), alpha))


def count_wrong(case, alpha, max_draws, runs, clopper_pearson=False):
    """How many of the runs show a wrong claim at any look."""
    radius, probabilities = CASES[case]
    most_probable = np.flatnonzero(probabilities == probabilities.max())
    wrong = np.zeros(runs, bool)
    generator = np.random.default_rng(7)
    for counts, outcomes in watch_simulated(probabilities, alpha, max_draws, runs, generator):
        predictions, radii = outcomes.predictions, outcomes.radii
        if clopper_pearson:
            predictions, radii = claim_by_clopper_pearson(counts, alpha)
            predictions = np.where(radii > 0, predictions, ABSTAIN)
        wrong |= (predictions != ABSTAIN) & (~np.isin(predictions, most_probable) | (radii > radius))
    return int(wrong.sum())


@pytest.mark.parametrize("case", CASES)
def test_few_runs_show_a_wrong_claim_at_any_look(case):
    runs, alpha = 1000, 0.02
    assert count_wrong(case, alpha, 400, runs) <= stats.binom.ppf(0.9999, runs, alpha)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_at_most_alpha_of_20_000_runs_shows_a_wrong_claim_at_any_look(case):
    runs, alpha = 20_000, 0.001
    assert count_wrong(case, alpha, 3000, runs) <= stats.binom.ppf(0.9999, runs, alpha)


@pytest.mark.parametrize("case", ["two tied", "a rival with all the rest"])
def test_the_simulation_notices_a_bound_that_may_be_looked_at_once_only(case):
    """Clopper-Pearson at every look is wrong far more often: the tests above can fail."""
    runs, alpha = 1000, 0.02
    assert count_wrong(case, alpha, 400, runs, clopper_pearson=True) > 2 * stats.binom.ppf(0.9999, runs, alpha)


def watch(smoothed, pixels, **settings):
    return list(watch_claims(smoothed, pixels, make_live_rule(smoothed.noise, **settings)))


def test_claims_grow_and_stay_below_the_true_radius(linear, small_images):
    smoothed = SmoothedClassifier(linear, NOISE, class_names=["dark", "bright"])
    image = small_images[int(linear.exact_radius(small_images).argmax())]
    claims = watch(smoothed, image, max_draws=2000)
    radii = [claim.radius for claim in claims]
    assert radii == sorted(radii)
    assert 0.5 * linear.exact_radius(image[None]) < radii[-1] < linear.exact_radius(image[None])
    assert claims[-1].prediction == int(linear(image[None]).argmax())
    assert [claim.is_final for claim in claims] == [False] * (len(claims) - 1) + [True]


def test_every_copy_is_counted_and_shown_with_its_class(linear, small_images):
    smoothed = SmoothedClassifier(linear, NOISE, batch_size=32)
    counts = np.zeros(2, np.int64)
    for claim in watch(smoothed, small_images[0], max_draws=200):
        assert claim.copies.shape[1:] == small_images[0].shape
        assert linear(claim.copies).argmax(1).tolist() == claim.classes.tolist()
        counts += np.bincount(claim.classes, minlength=2)
        assert claim.counts.tolist() == counts.tolist()
    assert counts.sum() <= 200
    assert claim.draws == counts.sum()


def test_draws_stop_early_where_no_class_leads():
    coin = SmoothedClassifier(
        lambda pixels: torch.stack([pixels.flatten(1)[:, 0] - 0.5, 0.5 - pixels.flatten(1)[:, 0]], 1), NOISE
    )
    claims = watch(coin, torch.full((3, 4, 4), 0.5))
    assert claims[-1].abstains
    assert claims[-1].radius == 0
    assert claims[-1].draws < 10_000


def test_logits_that_are_not_finite_are_refused(small_images):
    broken = SmoothedClassifier(lambda pixels: torch.where(pixels.flatten(1)[:, :2] > 1.2, torch.nan, 0.0), NOISE)
    with pytest.raises(ValueError, match="not finite"):
        watch(broken, small_images[0])


def test_radii_lie_between_0_and_what_the_draws_can_show():
    rule = make_live_rule(NOISE, 0.001, 1000)
    assert rule.radii[0] == 0
    assert max(rule.radii) < NOISE.radius(0.001 ** (1 / 1000))
    assert np.diff(rule.radii) == pytest.approx(0.01)
