"""Attacks on certificates: right ones stand, and wrong ones are found out."""

import pytest
import torch

from hf_smoothing import GaussianNoise, SmoothedClassifier
from hf_smoothing.diagnostics.attacks import AttackSettings, attack

SETTINGS = AttackSettings(steps=60, draws=4, restarts=1, directions=3, n=400)


@pytest.fixture
def image(linear):
    """Well inside of [0, 1], at a distance of 0.2 from the plane at which the linear classifier's answer changes."""
    grey = torch.full((3, 4, 4), 0.5)
    direction = linear.direction.view(3, 4, 4)
    return grey + direction * (0.2 - float(linear.margin(grey[None])))


def test_a_right_certificate_stands_and_a_wrong_one_falls(linear, image):
    smoothed = SmoothedClassifier(linear, GaussianNoise(0.25))
    exact = float(linear.exact_radius(image[None]))
    assert exact == pytest.approx(0.2, abs=1e-5)
    right = attack(smoothed, image, 1, 0.9 * exact, SETTINGS)
    assert right.violation is None
    assert right.smallest is not None
    assert exact <= right.smallest.norm < 1.8 * exact  # the gradient shows the way straight to the plane
    wrong = attack(smoothed, image, 1, 3 * exact, SETTINGS)
    assert wrong.violation is not None
    assert right.steps == SETTINGS.steps  # all that was asked for, and no more than it took
    assert 0 < wrong.steps < SETTINGS.steps
    assert wrong.violation.norm < 3 * exact
    assert wrong.violation.prediction == 0
    moved = image + wrong.violation.change
    assert float(linear.margin(moved[None])) < 0
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1


def test_the_nearest_other_image_shows_a_way_where_the_gradient_says_nothing(image):
    class Steps:
        """As the linear classifier, without a gradient."""

        def __init__(self, linear):
            self.linear = linear

        def __call__(self, images):
            side = (self.linear.margin(images) > 0).float() + 0 * images.sum()
            return torch.stack([1 - side, side], 1)

    from helpers.models import LinearClassifier

    direction = torch.ones(48) / 48**0.5
    linear = LinearClassifier(direction, -float(0.5 * direction.sum()) + 0.2)
    smoothed = SmoothedClassifier(Steps(linear), GaussianNoise(0.25))
    grey = torch.full((3, 4, 4), 0.5)
    others = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.3)])
    found = attack(smoothed, grey, 1, 0.4, SETTINGS, others)
    assert found.violation is not None
    assert found.violation.attack == "nearest other class"
    assert attack(smoothed, grey, 1, 0.19, SETTINGS, others).violation is None


def test_ways_that_lead_nowhere_are_passed_over(linear, image):
    """The picture itself among the others, which is no way at all, and a classifier without any gradient."""
    smoothed = SmoothedClassifier(linear, GaussianNoise(0.25))
    assert attack(smoothed, image, 1, 0.19, SETTINGS, image[None]).violation is None

    def same(images):
        return torch.zeros(len(images), 2) + torch.tensor([0.0, 1.0]) + 0 * images.sum()

    found = attack(SmoothedClassifier(same, GaussianNoise(0.25)), image, 1, 0.19, SETTINGS)
    assert found.violation is found.smallest is None
    assert found.steps == SETTINGS.steps


def test_settings_out_of_range(linear, image):
    for settings, message in (
        ({"n": 20}, "n=20 draws are too few"),
        ({"n": 21}, "takes at least 22 draws"),
        ({"steps": 0}, "steps=0"),
        ({"alpha": 2.0}, "alpha=2"),
        ({"reach": 0.5}, "reach=0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            AttackSettings(**settings)
    with pytest.raises(ValueError, match="nothing to attack"):
        attack(SmoothedClassifier(linear, GaussianNoise(0.25)), image, 1, 0.0, SETTINGS)
