"""Bounds on the draws of tests."""

import numpy as np
import pytest
from scipy import special

from hf_smoothing import GaussianNoise, LaplaceNoise, UniformNoise
from hf_smoothing.diagnostics.simulation import joint_draws, wald_draws


@pytest.mark.parametrize(
    "noise", [GaussianNoise(0.5), LaplaceNoise(0.5), UniformNoise(0.5)], ids=lambda noise: noise.name
)
def test_the_joint_bound_is_that_to_the_nearest_null(noise):
    radius, p = 0.15, np.array([0.62, 0.1, 0.2, 0.08])
    # all nulls of the runner-up on a grid; the others keep their proportions
    p_a, p_b = np.meshgrid(np.linspace(0.001, 0.998, 998), np.linspace(0.001, 0.998, 998))
    null = (p_a + p_b < 1) & (p_a <= noise.probability_needed(radius, np.minimum(p_b, 0.5)))
    rest = np.where(null, 1 - p_a - p_b, 1.0)
    divergence = special.rel_entr(p[0], p_a) + special.rel_entr(p[2], p_b) + special.rel_entr(p[1] + p[3], rest)
    (bound,) = joint_draws([p], noise, radius, 0.001)
    assert bound == pytest.approx(np.log(1000) / divergence[null].min(), rel=0.01)


def test_with_two_classes_the_joint_bound_is_that_of_wald():
    noise, p = GaussianNoise(0.5), np.array([0.6, 0.8, 0.99])
    joint = joint_draws(np.stack([p, 1 - p], axis=1), noise, 0.25, 0.01)
    wald = wald_draws(p, float(noise.probability_needed(0.25)), 0.01)
    assert np.isinf(joint[0])
    assert np.isinf(wald[0])
    np.testing.assert_allclose(joint[1:], wald[1:], rtol=1e-6)


def test_at_radius_0_the_joint_bound_is_that_of_the_sign_test():
    # of the draws that hit one of the two classes, two thirds hit the first
    sign = wald_draws(2 / 3, 0.5, 0.001) / 0.6
    (bound,) = joint_draws([[0.4, 0.2, *[0.05] * 8]], GaussianNoise(1.0), 0.0, 0.001)
    assert bound == pytest.approx(float(sign), rel=1e-6)
