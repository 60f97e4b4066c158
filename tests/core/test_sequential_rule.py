"""What the sequential rule claims, how often it is wrong, and how many draws it takes."""

import numpy as np
import pytest
from helpers.exact_outcomes import NOISE, sample, wrong_share
from scipy import special, stats

from hf_smoothing import ABSTAIN, GaussianNoise, LaplaceNoise, SequentialRule, UniformNoise
from hf_smoothing.core import sequential_rule
from hf_smoothing.core.bets import BetGrid
from hf_smoothing.core.lattice import SampledNoise
from hf_smoothing.core.rule_protocols import CleanPass
from hf_smoothing.diagnostics.simulation import simulate

HALF = GaussianNoise(0.5)


@pytest.fixture
def never_hopeless(monkeypatch):
    """No radius is given up, so that wrong claims are as frequent as they can be."""
    monkeypatch.setattr(sequential_rule, "_FUTILITY_MOST", 100.0)
    monkeypatch.setattr(sequential_rule, "_FUTILITY_LATE", 100.0)


@pytest.mark.parametrize("noise", [NOISE, HALF, UniformNoise(0.5), LaplaceNoise(0.5), SampledNoise(HALF, 4096)])
@pytest.mark.parametrize("radius", [0.0, 0.01, 0.25, 0.8])
def test_no_bet_has_a_mean_payoff_above_1_under_the_null(noise, radius):
    """The mean payoff is linear in p: its maximum over the null lies where the top class is as likely as the null allows."""
    grid = BetGrid.for_radius(noise, radius, 10_000, 0.001)
    p_b = np.concatenate([np.geomspace(1e-12, 0.5, 2000), np.linspace(0, 1, 2001)[1:-1]])
    p_a = np.minimum(noise.probability_needed(radius, p_b), 1 - p_b)
    payoffs = np.exp(grid.log_payoffs)
    means = np.outer(p_a, payoffs[0]) + np.outer(p_b, payoffs[1]) + np.outer(1 - p_a - p_b, payoffs[2])
    assert means.max() <= 1 + 1e-12
    assert means.max() > 1 - 1e-3  # and the bets touch the null
    assert np.exp(grid.log_weights).sum() == pytest.approx(1)


@pytest.mark.parametrize("below", [1e-9, 0.003])
def test_deciding_a_radius_is_wrong_at_most_alpha(below, never_hopeless):
    """p just under the threshold, where a wrong claim is likeliest."""
    p = NOISE.probability_needed(1.0) - below
    assert 0.01 < wrong_share(SequentialRule(radii=(1.0,), alpha=0.05, max_draws=100), p) <= 0.05


def test_deciding_several_radii_is_wrong_at_most_alpha_together(never_hopeless):
    p = NOISE.probability_needed(0.5) - 1e-9  # 0.25 is true, 0.5 and 1 are false
    assert 0.005 < wrong_share(SequentialRule(radii=(0.25, 0.5, 1.0), alpha=0.05, max_draws=60), p) <= 0.05


@pytest.mark.parametrize("scores", [np.arange(10.0), -np.arange(10.0)], ids=["misleading", "right"])
def test_the_answer_is_wrong_at_most_alpha(scores, never_hopeless):
    """Class 1 is barely likelier than class 0, so class 0 is a wrong answer; eight further classes take no draws."""
    rule = SequentialRule(radii=(0.0,), alpha=0.05, max_draws=60)
    wrong = wrong_share(rule, 0.5 - 1e-9, lambda outcomes: outcomes.predictions == 0, scores=scores)
    assert wrong <= 0.05
    assert wrong > 0.005 or scores[0] < 1  # ranked last, it takes too long within this budget


def edge(noise, radius, p_b, rivals, others):
    """Class 0 exactly at the edge of a radius against `rivals` classes of probability `p_b`, beside `others` small ones."""
    p_a = float(noise.probability_needed(radius, p_b))
    rest = max(0.0, 1 - p_a - rivals * p_b)
    return np.array([p_a, *[p_b] * rivals, *[rest / others if others else 0.0] * others])


CASES = {
    "two tied": (HALF, (0.0,), np.array([0.5, 0.5])),
    "two tied of ten": (HALF, (0.0,), np.array([0.35, 0.35, *[0.3 / 8] * 8])),
    "all ten tied": (HALF, (0.0,), np.full(10, 0.1)),
    "one rival": (HALF, (0.25,), edge(HALF, 0.25, 1 - HALF.probability_needed(0.25), 1, 0)),
    "one rival of nine": (HALF, (0.25,), edge(HALF, 0.25, 0.15, 1, 8)),
    "three rivals": (HALF, (0.25,), edge(HALF, 0.25, 0.1, 3, 5)),
    "nine rivals": (HALF, (0.25,), edge(HALF, 0.25, 0.0655, 9, 0)),
    "a large radius": (HALF, (1.0,), edge(HALF, 1.0, 0.008, 1, 8)),
    "a tiny radius": (HALF, (0.01,), edge(HALF, 0.01, 0.4, 1, 3)),
    "several radii": (HALF, (0.1, 0.25, 0.5), edge(HALF, 0.25, 0.15, 1, 8)),
    "radius 0 with others": (HALF, (0.0, 0.25), edge(HALF, 0.25, 0.15, 1, 8)),
    "uniform noise": (UniformNoise(0.5), (0.3,), edge(UniformNoise(0.5), 0.3, 0.2, 1, 8)),
    "laplace noise": (LaplaceNoise(0.5), (0.3,), edge(LaplaceNoise(0.5), 0.3, 0.1, 1, 8)),
    "sampled noise": (SampledNoise(HALF, 4096), (0.25,), edge(SampledNoise(HALF, 4096), 0.25, 0.15, 1, 8)),
}


def count_wrong(noise, radii, probabilities, alpha, images, head=None):
    """Wrong certificates: another class than 0, or a radius of the edge's or above. Class 0 is ranked last."""
    scores = np.arange(len(probabilities), dtype=np.float64) if head is None else head
    clean = CleanPass(np.tile(scores, (images, 1)), frequencies=head is not None)
    rule = SequentialRule(radii, alpha=alpha, max_draws=600)
    outcomes, _ = simulate(rule, noise, np.tile(probabilities, (images, 1)), clean, np.random.default_rng(len(radii)))
    exact = float(noise.radius(probabilities[0], probabilities[1:].max()))
    too_large = (outcomes.predictions == 0) & (outcomes.radii >= exact - 1e-9) & (max(radii) > 0)
    return int(((outcomes.predictions > 0) | too_large).sum())


def check_validity(name, alpha, images):
    noise, radii, probabilities = CASES[name]
    wrong = count_wrong(noise, radii, probabilities, alpha, images)
    assert stats.binomtest(wrong, images, alpha, alternative="greater").pvalue > 1e-3, (wrong, images)


@pytest.mark.parametrize("name", CASES)
def test_at_the_weakest_places_certificates_are_wrong_at_most_alpha(name, never_hopeless):
    check_validity(name, 0.05, 1500)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("name", CASES)
def test_at_the_weakest_places_many_certificates_are_wrong_at_most_alpha(name, alpha, never_hopeless):
    check_validity(name, alpha, 12_000)  # 336,000 in all


def test_a_wrong_share_of_alpha_is_noticed(never_hopeless):
    """The same simulation rejects a rule that spends three times its alpha."""
    noise, radii, probabilities = CASES["one rival"]
    wrong = count_wrong(noise, radii, probabilities, 0.15, 1500)
    assert stats.binomtest(wrong, 1500, 0.05, alternative="greater").pvalue < 1e-3


@pytest.mark.parametrize("frequencies", [[0.9, *[0.1 / 9] * 9], [0.1 / 9] * 9 + [0.9], [0.1] * 10])
def test_a_wrong_count_head_makes_no_wrong_claims(frequencies, never_hopeless):
    noise, radii, probabilities = CASES["one rival of nine"]
    wrong = count_wrong(noise, radii, probabilities, 0.05, 1500, np.array(frequencies))
    assert stats.binomtest(wrong, 1500, 0.05, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize(("first", "second"), [(0.4, 0.2), (0.25, 0.15)])
def test_the_answer_takes_little_more_than_the_joint_bound(first, second):
    """ln(1/alpha) over the divergence from the nearest distribution under which the second class is as likely."""
    share = first / (first + second)
    divergence = (first + second) * (special.rel_entr(share, 0.5) + special.rel_entr(1 - share, 0.5))
    probabilities = np.array([first, second, *[(1 - first - second) / 8] * 8])
    rule = SequentialRule((0.0,), max_draws=100_000)
    outcomes, draws = sample(rule, probabilities, np.random.default_rng(1), images=3000)
    assert (outcomes.predictions == 0).all()
    assert draws.mean() <= 1.3 * np.log(1000) / divergence


@pytest.mark.parametrize(("radius", "p"), [(0.5, 0.9), (1.0, 0.95), (2.0, 0.999)])
def test_deciding_takes_little_more_than_walds_bound(radius, p):
    p0 = NOISE.probability_needed(radius)
    divergence = special.rel_entr(p, p0) + special.rel_entr(1 - p, 1 - p0)
    rule = SequentialRule(radii=(radius,), max_draws=100_000)
    outcomes, draws = sample(rule, np.array([p, *[(1 - p) / 9] * 9]), np.random.default_rng(0), images=2000)
    assert np.mean(outcomes.radii >= radius) > 0.97
    assert draws.mean() <= 1.35 * np.log(1000) / divergence


def test_a_radius_is_claimed_that_the_top_class_alone_could_not_prove():
    five = np.array([0.5, 0.2, 0.1, 0.1, 0.1])  # half of the draws: no radius without a look at the runner-up
    radius = 0.7 * NOISE.radius(0.5, 0.2)
    outcomes, draws = sample(SequentialRule((radius,)), five, np.random.default_rng(0), images=50)
    claimed = outcomes.predictions == 0
    assert claimed.mean() > 0.8
    assert (outcomes.radii[claimed] == radius).all()
    assert (outcomes.p_lower < 0.6).all()
    proved = NOISE.radius(outcomes.p_lower[claimed], outcomes.p_upper[claimed])
    np.testing.assert_allclose(proved, radius, rtol=1e-9)
    assert draws.mean() < 2000


def test_a_hopeless_radius_is_given_up_early_and_the_claim_before_it_is_kept():
    rule = SequentialRule(radii=(0.5, 2.0), max_draws=100_000)
    outcomes, draws = sample(rule, np.array([0.8, 0.2]), np.random.default_rng(0), images=50)
    assert (outcomes.predictions == 0).all()
    assert (outcomes.radii == 0.5).all()
    assert np.median(draws) < 1000


def test_a_claim_stands_when_later_draws_speak_less_clearly():
    runs, row = SequentialRule(radii=(0.5, 1.0)).start(NOISE, 1, 2), np.array([0])
    draws = runs.start(row, CleanPass(np.zeros((1, 2))))[0]
    while runs.outcomes(row).predictions != 0:
        draws = runs.update(row, np.array([[draws, 0]]))[0]
    assert runs.outcomes(row).radii == 0.5
    while draws:
        draws = runs.update(row, np.array([[draws // 2, draws - draws // 2]]))[0]
    assert (runs.outcomes(row).predictions, runs.outcomes(row).radii) == (0, 0.5)


def test_two_equal_classes_end_in_abstention():
    outcomes, draws = sample(
        SequentialRule((0.1,), max_draws=1000), np.array([0.35, 0.35, 0.3]), np.random.default_rng(0)
    )
    assert (outcomes.predictions, outcomes.radii, outcomes.p_lower, outcomes.p_upper) == (ABSTAIN, 0, 0, 1)
    assert draws < 1000  # the remaining draws cannot change it


def test_one_class_alone_is_always_the_answer():
    outcomes, _ = sample(SequentialRule((0.0, 0.5)), [1.0], np.random.default_rng(0))
    assert (outcomes.predictions, outcomes.radii) == (0, 0.5)


def test_a_thousand_classes_cost_no_more_than_ten():
    draws = {}
    for classes in (10, 1000):
        probabilities = np.array([0.5, *[0.5 / (classes - 1)] * (classes - 1)])
        outcomes, taken = sample(SequentialRule((0.0,)), probabilities, np.random.default_rng(0), images=50)
        assert (outcomes.predictions == 0).all()
        draws[classes] = taken.mean()
    assert draws[1000] < 1.1 * draws[10]
