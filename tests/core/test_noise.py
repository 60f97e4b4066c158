import numpy as np
import pytest
import torch

from hf_smoothing import GaussianNoise, LaplaceNoise, NoiseMixture, SmoothedClassifier, UniformNoise

NOISES = [GaussianNoise, UniformNoise, LaplaceNoise]


@pytest.mark.parametrize("kind", NOISES)
def test_radius_and_probability_are_inverse(kind):
    noise = kind(0.5)
    for probability in (0.5, 0.7, 0.999, 1 - 1e-9):
        assert noise.probability_needed(noise.radius(probability)) == pytest.approx(probability, abs=1e-15)
        assert noise.radius(probability, 1 - probability) == pytest.approx(noise.radius(probability), rel=1e-6)
    for p_a, p_b in ((0.6, 0.3), (0.4, 0.1), (0.9, 0.02)):
        assert noise.probability_needed(noise.radius(p_a, p_b), p_b) == pytest.approx(p_a, abs=1e-12)
    assert noise.radius(0.3, 0.4) == 0
    assert noise.radius(0.3) == 0
    assert GaussianNoise(0.5).radius(0.8413447460685429) == pytest.approx(0.5)


@pytest.mark.parametrize("sigma", [0.0, -0.25, float("nan"), float("inf"), 64])
def test_a_sigma_that_is_no_noise_level(sigma):
    with pytest.raises(ValueError, match=rf"sigma={sigma}"):
        GaussianNoise(sigma)


@pytest.mark.parametrize("kind", [UniformNoise, LaplaceNoise])
def test_l1_radii_are_exact_for_a_threshold_on_one_pixel(kind):
    """There the l1 theorems are tight: certified radii come close to the distance to the threshold, and do not pass it."""
    images = torch.randint(0, 256, (60, 1, 2, 2), generator=torch.Generator().manual_seed(2)) / 255

    def base(noisy):
        margin = noisy[:, 0, 0, 0] - 0.4
        return torch.stack([-margin, margin], 1)

    smoothed = SmoothedClassifier(base, kind(0.5), batch_size=4096)
    exact = (images[:, 0, 0, 0] - 0.4).abs()
    certificates = smoothed.certify(images, alpha=0.01, draws=4000, seed=0)
    wrong = sum(
        a.radius > r or a.prediction == int(x[0, 0, 0] <= 0.4)
        for a, r, x in zip(certificates, exact, images)
        if not a.abstains
    )
    assert wrong <= 60 * 0.01 + 3
    assert {a.norm for a in certificates} == {"l1"}
    assert np.mean([a.radius for a in certificates]) > 0.75 * exact.mean()


def test_the_mixture_draws_a_level_for_each_image():
    torch.manual_seed(0)
    noisy = NoiseMixture((0.0, 0.5, 1.0), (2, 1, 1)).add_to(torch.zeros(4000, 1, 8, 8))
    levels = noisy.flatten(1).std(1)
    shares = [float(((levels - sigma).abs() < 0.25).float().mean()) for sigma in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=0.03)


def test_copies_of_an_image_share_its_level_but_not_its_noise():
    torch.manual_seed(0)
    images = torch.arange(200.0).view(200, 1, 1, 1).expand(200, 1, 16, 16)
    first, second = NoiseMixture((0.0, 1.0)).add_to(images, copies=2).split(200)
    levels = [(one - images).flatten(1).std(1).round(decimals=0) for one in (first, second)]
    assert torch.equal(*levels)
    assert set(levels[0].tolist()) == {0.0, 1.0}
    assert not torch.equal(first[levels[0] == 1], second[levels[0] == 1])


@pytest.mark.parametrize(
    ("sigmas", "weights"), [((), None), ((-1.0,), None), ((0.1, float("nan")), None), ((0.1,), (1, 2))]
)
def test_invalid_mixtures(sigmas, weights):
    with pytest.raises(ValueError, match="must be"):
        NoiseMixture(sigmas, weights)
