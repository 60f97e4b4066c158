"""What the two-stage rule claims, how often it is wrong, and how its draws compare with a fixed number."""

import numpy as np
import pytest
from helpers.exact_outcomes import NOISE, sample, wrong_share
from scipy import stats

from hf_smoothing import ABSTAIN, FixedRule, GaussianNoise, LaplaceNoise, TwoStageRule
from hf_smoothing.core.rule_protocols import CleanPass
from hf_smoothing.core.two_stage_plan import Planner
from hf_smoothing.diagnostics.simulation import simulate


@pytest.mark.parametrize("p", [0.55, 0.7, 0.95])
def test_finding_the_radius_is_wrong_at_most_alpha(p):
    assert 0.005 < wrong_share(TwoStageRule(draws=60, alpha=0.05, max_draws=150), p) <= 0.05


def count_wrong(probabilities, alpha, images, head=None):
    clean = None if head is None else CleanPass(np.tile(head, (images, 1)), frequencies=True)
    rule = TwoStageRule(draws=150, alpha=alpha, max_draws=1000)
    outcomes, _ = simulate(rule, NOISE, np.tile(probabilities, (images, 1)), clean, np.random.default_rng(0))
    exact = NOISE.radius(probabilities[0], max(probabilities[1:]))
    return int(((outcomes.predictions > 0) | ((outcomes.predictions == 0) & (outcomes.radii > exact))).sum())


PLACES = {
    "tied": [0.5, 0.5],
    "barely above a half": [0.51, 0.49],
    "clear": [0.9, 0.05, 0.05],
    "nearly sure": [0.999, 0.001],
    "many rivals": [0.55, *[0.05] * 9],
}


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("place", PLACES)
def test_many_certificates_are_wrong_at_most_alpha(place, alpha):
    wrong = count_wrong(np.array(PLACES[place]), alpha, 30_000)  # 300,000 in all
    assert stats.binomtest(wrong, 30_000, alpha, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize("head", [[0.99, 0.01], [0.01, 0.99], [0.6, 0.4]])
def test_a_count_head_makes_no_wrong_claims(head):
    wrong = count_wrong(np.array([0.6, 0.4]), 0.05, 3000, np.array(head))
    assert stats.binomtest(wrong, 3000, 0.05, alternative="greater").pvalue > 1e-3


def population(images=1500):
    """Images of all kinds: quantiles of the top class's probability, the rest on one or on several rivals."""
    generator = np.random.default_rng(5)
    p = stats.norm.cdf(generator.normal(0.8, 1.2, images)).clip(0.12, 1 - 1e-6)
    rivals = generator.dirichlet(np.full(9, 0.3), images)
    probabilities = np.column_stack([p, (1 - p)[:, None] * rivals])
    return probabilities / probabilities.sum(1, keepdims=True)


def test_a_class_with_less_than_half_of_the_draws_is_certified_against_weak_rivals():
    probabilities = np.tile([0.4, *[0.1] * 6], (100, 1))
    outcomes, _ = simulate(TwoStageRule(draws=1000), NOISE, probabilities, None, np.random.default_rng(0))
    assert (outcomes.predictions == 0).mean() > 0.9


@pytest.mark.parametrize("n", [300, 3000])
def test_radii_of_a_fixed_number_of_draws_take_fewer(n):
    probabilities, generator = population(), np.random.default_rng(0)
    fixed, _ = simulate(FixedRule(n0=100, n=n), NOISE, probabilities, None, generator)
    outcomes, draws = simulate(TwoStageRule(draws=n // 2), NOISE, probabilities, None, generator)
    assert outcomes.radii.mean() > fixed.radii.mean()
    assert draws.mean() < 0.75 * (100 + n)


def test_images_that_cannot_be_certified_end_early():
    outcomes, draws = sample(TwoStageRule(), np.full(10, 0.1), np.random.default_rng(0), images=200)
    assert (outcomes.predictions == ABSTAIN).all()
    assert draws.mean() < 50


def test_more_draws_give_larger_radii_and_the_plan_keeps_its_mean():
    planner = Planner(NOISE, 0.001, 100_000)
    for draws in (100, 1000, 10_000):
        assert planner.plan(planner.price_for(draws)).mean_draws == pytest.approx(draws, rel=0.1)
    radii = [simulate(TwoStageRule(draws=draws), NOISE, population(300), None, np.random.default_rng(0))[0].radii.mean()
             for draws in (100, 1000, 10_000)]  # fmt: skip
    assert radii == sorted(radii)


def test_the_plan_does_not_depend_on_the_unit_of_the_radius():
    for noise in (GaussianNoise(0.25), GaussianNoise(2.0)):
        planner = Planner(noise, 0.001, 10_000)
        plan = planner.plan(planner.price_for(500))
        reference = Planner(NOISE, 0.001, 10_000)
        expected = reference.plan(reference.price_for(500))
        for actions, other in zip(plan.actions, expected.actions, strict=True):
            assert np.mean(actions == other) > 0.95


def test_a_head_that_knows_p_saves_draws_and_a_wrong_one_costs_few():
    probabilities = population(1000)
    generator = np.random.default_rng(0)
    frequencies = {"none": None, "right": probabilities, "wrong": np.roll(probabilities, 1, axis=1)}
    radii, draws = {}, {}
    for name, head in frequencies.items():
        clean = None if head is None else CleanPass(head, frequencies=True)
        outcomes, taken = simulate(TwoStageRule(draws=300), NOISE, probabilities, clean, generator)
        radii[name], draws[name] = outcomes.radii.mean(), taken.mean()
    assert radii["right"] / draws["right"] > radii["none"] / draws["none"]
    assert radii["wrong"] > 0.9 * radii["none"]


def test_other_noise():
    noise = LaplaceNoise(0.5)
    outcomes, _ = sample(
        TwoStageRule(draws=300), np.array([0.9, 0.1]), np.random.default_rng(0), noise=noise, images=50
    )
    assert 0.5 * noise.radius(0.9) < outcomes.radii.mean() < noise.radius(0.9)


def test_settings():
    with pytest.raises(ValueError, match=r"max_draws=9 must be 16 or more"):
        TwoStageRule(max_draws=9)
    with pytest.raises(ValueError, match=r"max_draws=16 draws can never certify radius 0: .* at least 19 draws"):
        TwoStageRule(max_draws=16).check(NOISE)
    TwoStageRule(max_draws=19).check(NOISE)


@pytest.mark.parametrize("max_draws", [19, 20, 40, 150, 1000])
def test_no_image_takes_more_than_its_most_draws(max_draws):
    _, draws = simulate(TwoStageRule(max_draws=max_draws), NOISE, population(300), None, np.random.default_rng(0))
    assert draws.max() == max_draws
