"""Count heads in the engine: what they may steer, and what they must not be able to break."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import special

from hf_smoothing import GaussianNoise, SequentialRule, SmoothedClassifier
from hf_smoothing.core.bets import BetGrid
from hf_smoothing.core.calibration import Calibration
from hf_smoothing.core.rule_protocols import CleanPass
from hf_smoothing.diagnostics.simulation import simulate

NOISE = GaussianNoise(0.5)


def right_head(linear):
    """Knows the linear classifier's frequencies in closed form."""

    def head(pixels, sigma):
        share = torch.special.ndtr(linear.margin(pixels).double() / sigma)
        return torch.stack([1 - share, share], 1)

    return head


def wrong_head(linear):
    def head(pixels, sigma):
        wrong = (linear.margin(pixels) < 0).double() * 0.998 + 0.001
        return torch.stack([1 - wrong, wrong], 1)

    return head


@pytest.mark.parametrize("predicted", [[0.999, 0.001], [0.001, 0.999], [0.7, 0.3]])
def test_a_wrong_head_makes_no_wrong_claims(predicted):
    """p just under what the radius takes, where a wrong claim is likeliest."""
    generator, needed = np.random.default_rng(1), NOISE.probability_needed(0.5)
    rule = SequentialRule(radii=(0.5,), alpha=0.05, max_draws=60)
    outcomes, draws = simulate_many(rule, [needed, 1 - needed], np.array(predicted), generator, 1500)
    wrong = np.mean((outcomes.radii >= 0.5) & (outcomes.predictions == 0))
    assert wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1500)
    assert draws.max() <= 60
    if predicted[0] > 0.5:
        assert wrong > 0.005  # the test has something to see


def simulate_many(rule, probabilities, predicted, generator, images, frequencies=True):
    """Many images of one kind, for which a count head predicts the frequencies (or whose logits are) `predicted`."""
    clean = CleanPass(np.tile(predicted, (images, 1)), frequencies)
    return simulate(rule, NOISE, np.tile(probabilities, (images, 1)), clean, generator)


def sure(of, classes=10):
    return np.where(np.arange(classes) == of, 0.999, 0.001 / (classes - 1))


@pytest.mark.parametrize("lie", ["permuted", "sure", "sure of another", "sure of the runner-up"])
def test_a_wrong_head_makes_no_wrong_claims_of_ten_classes(lie):
    """p_A and p_B such that the exact radius is the one asked for, which must not be proved; and the budget is kept."""
    top = 0.8
    runner_up = special.ndtr(special.ndtri(top) - 2 * 0.5 / NOISE.sigma)
    probabilities = np.array([top, runner_up, *[(1 - top - runner_up) / 8] * 8])
    predicted = {
        "permuted": np.roll(probabilities, 1),
        "sure": sure(0),
        "sure of another": sure(5),
        "sure of the runner-up": sure(1),
    }[lie]
    rule = SequentialRule(radii=(0.5,), alpha=0.05, max_draws=100)
    generator = np.random.default_rng(3)
    outcomes, draws = simulate_many(rule, probabilities, predicted, generator, 300)
    wrong = np.mean((outcomes.radii >= 0.5) | (outcomes.predictions > 0))
    assert wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)
    assert draws.max() <= 100
    # and what is true is proved all the same, within the budget
    clear = np.array([0.97, *[0.03 / 9] * 9])
    rule = SequentialRule(radii=(0.5,), max_draws=1500)
    outcomes, _ = simulate_many(rule, clear, predicted, generator, 100)
    assert np.mean(outcomes.radii >= 0.5) > 0.95


def test_a_head_that_knows_p_saves_draws_and_a_wrong_one_costs_few():
    probabilities = np.array([0.97, 0.03])
    rule = SequentialRule(radii=(0.5,), max_draws=10_000)
    spent = {}
    for name, predicted in (
        ("none", np.array([2.0, 0.0])),
        ("right", probabilities),
        ("wrong", np.array([0.85, 0.15])),
        ("permuted", np.array([0.001, 0.999])),
    ):
        generator = np.random.default_rng(2)
        outcomes, draws = simulate_many(rule, probabilities, predicted, generator, 1000, frequencies=name != "none")
        assert np.mean(outcomes.radii >= 0.5) > 0.95
        spent[name] = draws.mean()
    assert spent["right"] < 0.98 * spent["none"]
    assert spent["wrong"] < 1.2 * spent["none"]
    assert spent["permuted"] < 1.6 * spent["none"]


def test_bets_move_to_where_p_is_expected():
    grid = BetGrid.for_radius(NOISE, 0.25, 10_000, 0.001)
    p_c, p_j = np.array([0.7, 0.99]), np.array([0.2, 0.005])
    moved = grid.reweight(p_c, p_j)
    assert np.exp(moved).sum(1) == pytest.approx(1)
    # never more than log(1/floor) behind, wherever p is
    assert (moved >= grid.log_weights + np.log(0.5) - 1e-12).all()
    # the bets that grow fastest where p is as predicted gain weight
    growth = np.stack([p_c, p_j, 1 - p_c - p_j], axis=1) @ grid.log_payoffs
    for weights, rates in zip(np.exp(moved), growth):
        assert weights @ rates > np.exp(grid.log_weights) @ rates


def test_the_surrogate_takes_the_heads_word_and_draws_nothing(linear, small_images):
    smoothed = SmoothedClassifier(linear, NOISE, count_head=right_head(linear), batch_size=5)
    found = smoothed.certify(small_images, method="surrogate")
    exact = linear.exact_radius(small_images)
    for certificate, radius, margin in zip(found, exact.tolist(), linear.margin(small_images).tolist()):
        assert (certificate.guarantee, certificate.num_samples, sum(certificate.counts)) == ("none", 1, 0)
        assert certificate.prediction == (-1 if certificate.radius == 0 else int(margin > 0))
        assert radius - 0.1 < certificate.radius + 0.01 * (certificate.radius == 0) or radius < 0.02
        assert certificate.radius <= radius + 1e-6
    assert [one.radius for one in smoothed.certify(small_images[3:], method="surrogate")] == [
        one.radius for one in found[3:]
    ]


def test_a_calibrated_surrogate_says_what_it_rests_on(linear, small_images):
    calibration = Calibration({0.5: (1.5,) * 19}, {0.5: (1.0,) * 19}, 100_000, 0.001, "nineteen images", "linear")
    smoothed = SmoothedClassifier(linear, NOISE, count_head=right_head(linear), calibration=calibration)
    claims = smoothed.certify(small_images, method="surrogate", delta=0.05)
    for one, estimate in zip(claims, smoothed.certify(small_images, method="surrogate")):
        assert (one.guarantee, one.delta, one.calibration) == (
            "marginal",
            0.05,
            "nineteen images; Monte-Carlo with n = 100,000",
        )
        assert (estimate.guarantee, estimate.delta, estimate.calibration) == ("none", None, None)
        assert one.radius < estimate.radius or estimate.radius == 0
    # of another noise, resolution or model it says nothing
    for conditions, named in (
        ({"noise": "laplace"}, "noise"),
        ({"noise_resolution": "native", "denoiser": "wiener"}, "noise_resolution, denoiser"),
        ({"model_weights": "others"}, "model_weights"),
    ):
        other = replace(calibration, conditions=conditions)
        smoothed = SmoothedClassifier(linear, NOISE, count_head=right_head(linear), calibration=other)
        with pytest.raises(ValueError, match=f"calibrated under another {named}"):
            smoothed.certify(small_images, method="surrogate", delta=0.05)
        assert smoothed.certify(small_images, method="surrogate")[0].guarantee == "none"
    with pytest.raises(ValueError, match="takes a count head"):
        SmoothedClassifier(linear, NOISE).certify(small_images, method="surrogate")


@pytest.mark.parametrize("make_head", [right_head, wrong_head])
def test_certificates_hold_whatever_the_head_says(linear, small_images, make_head):
    found, again = (
        SmoothedClassifier(linear, NOISE, count_head=make_head(linear), batch_size=batch_size).certify(
            small_images, radii=[0.1, 0.3], max_draws=2000, seed=0
        )
        for batch_size in (50, 7)
    )
    assert found == again
    for certificate, radius in zip(found, linear.exact_radius(small_images).tolist()):
        assert certificate.guarantee == "per_input"
        assert certificate.radius <= radius
        if radius > 0.5:
            assert certificate.radius >= 0.3


def test_a_head_that_returns_no_frequencies_is_refused(linear, small_images):
    smoothed = SmoothedClassifier(linear, NOISE, count_head=lambda pixels, sigma: linear(pixels))
    with pytest.raises(ValueError, match="must return class frequencies"):
        smoothed.certify(small_images, radius=0.3)
