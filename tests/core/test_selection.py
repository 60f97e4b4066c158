"""Conformal selection, with heads whose errors are known: few of the claims are wrong, whatever the head says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.simulated_heads import simulate_head

from hf_smoothing import GaussianNoise, SmoothedClassifier
from hf_smoothing.core.calibration import Calibration, estimate_lower_bound
from hf_smoothing.core.rule_protocols import probabilities_proving
from hf_smoothing.core.selection import count_selected_radii

NOISE = GaussianNoise(0.5)
RADII = (0.0, 0.25, 0.5)
NEEDED = probabilities_proving(RADII, NOISE)


def select(calibration_images, test_images, false_claims):
    """How many radii each test image may claim, and the share of wrong claims among those at each radius."""
    predicted, allowed = calibration_images
    calibration = Calibration({0.5: predicted}, {0.5: allowed}, 1000, 0.001, "", "")
    test_calibration = Calibration({0.5: test_images[0]}, {0.5: test_images[1]}, 1000, 0.001, "", "")
    p_lower = estimate_lower_bound(1 / (1 + np.exp(-np.array(test_images[0]))), 1000, 0.001)
    number = count_selected_radii(calibration, 0.5, p_lower, NEEDED, false_claims)
    claims = number[:, None] > np.arange(len(RADII))
    wrong = claims & ~test_calibration.proves(0.5, NEEDED)
    return claims.sum(0), wrong.sum(0) / np.maximum(claims.sum(0), 1)


@pytest.mark.parametrize("kind", ["good", "useless", "adversarial", "sure"])
@pytest.mark.parametrize("false_claims", [0.1, 0.2])
def test_at_most_this_share_of_the_claims_is_wrong(kind, false_claims):
    generator = np.random.default_rng(3)
    shares, claims = [], []
    for _ in range(120):
        predicted, allowed = simulate_head(kind, 400, generator)
        halves = [(tuple(predicted[part]), tuple(allowed[part])) for part in (slice(200), slice(200, 400))]
        number, wrong = select(*halves, false_claims)
        shares.append(wrong)
        claims.append(number)
    mean, error = np.mean(shares, 0), np.std(shares, 0) / np.sqrt(120)
    assert (mean <= false_claims + 3 * error).all()
    if kind == "good":
        assert (np.mean(claims, 0)[1:] > (60, 20)).all()
        assert (mean[1:] > false_claims / 4).all()  # the test has something to see
    if kind == "adversarial":
        assert (np.mean(claims, 0)[1:] < 2).all()


def test_by_hand():
    """Four calibration images, of which the one with the second largest estimate is wrong."""
    calibration = Calibration({0.5: (1.0, 2.0, 3.0, 4.0)}, {0.5: (9.0, 9.0, 0.0, 9.0)}, 1000, 0.001, "", "")

    def select_at(log_odds, false_claims):
        bounds = estimate_lower_bound(1 / (1 + np.exp(-np.array(log_odds))), 1000, 0.001)
        return count_selected_radii(calibration, 0.5, bounds, [0.5], false_claims).tolist()

    # p-values 1/5, 2/5, 2/5: above the wrong image's estimate there is no wrong one, at or below it one
    assert select_at([3.5, 3.0, 1.0], 0.2) == [0, 0, 0]
    assert select_at([3.5, 3.0, 1.0], 0.39) == [0, 0, 0]
    assert select_at([3.5, 3.0, 1.0], 0.4) == [1, 1, 1]
    assert select_at([3.5, 3.5, 1.0], 0.31) == [1, 1, 0]  # two of three p-values are 0.2 < 0.31 * 2 / 3
    assert count_selected_radii(calibration, 0.5, np.array([0.0, 0.9]), [0.5], 0.99).tolist()[0] == 0


def linear_head(linear):
    def head(pixels, sigma):
        share = torch.special.ndtr(linear.margin(pixels).double() / sigma)
        return torch.stack([1 - share, share], 1)

    return head


def test_the_engine_selects_among_all_images(linear, small_images):
    calibration = Calibration(
        {0.5: tuple(np.linspace(-1, 8, 40))}, {0.5: tuple(np.linspace(-2, 9, 40))}, 1000, 0.001, "forty", "linear"
    )
    smoothed = SmoothedClassifier(linear, NOISE, count_head=linear_head(linear), calibration=calibration)
    settings = {"method": "surrogate", "radii": list(RADII), "false_claims": 0.2}
    claims, estimates = smoothed.certify(small_images, **settings), smoothed.certify(small_images, method="surrogate")
    p_lower = np.array([estimate.p_lower for estimate in smoothed.certify(small_images, "surrogate", n=1000)])
    number = count_selected_radii(calibration, 0.5, p_lower, NEEDED, 0.2)
    assert number.sum() > 0
    for claim, estimate, radii in zip(claims, estimates, number):
        assert (claim.guarantee, claim.false_claims, claim.delta) == ("selected", 0.2, None)
        assert claim.calibration == "forty; Monte-Carlo with n = 1,000"
        assert claim.radius >= (RADII[radii - 1] if radii else 0.0)
        assert claim.prediction == (estimate.prediction if radii else -1)
        assert claim.num_samples == 1  # the pass of the head
    for broken, said in (
        ({"radii": None}, "give radii"),
        ({"delta": 0.1}, "not both"),
        ({"false_claims": 1.0}, "false_claims=1"),
    ):
        with pytest.raises(ValueError, match=said):
            smoothed.certify(small_images, **{**settings, **broken})
    with pytest.raises(ValueError, match="as one list"):
        smoothed.certify(iter(small_images), **settings)
    other = SmoothedClassifier(
        linear,
        NOISE,
        count_head=linear_head(linear),
        calibration=replace(calibration, conditions={"noise": "laplace"}),
    )
    with pytest.raises(ValueError, match="another noise"):
        other.certify(small_images, **settings)
    with pytest.raises(ValueError, match="takes a calibrated count head"):
        SmoothedClassifier(linear, NOISE, count_head=linear_head(linear)).certify(small_images, **settings)
