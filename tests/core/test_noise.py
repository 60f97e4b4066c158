import numpy as np
import pytest
import torch
from scipy import stats

from hf_smoothing import GaussianNoise, LaplaceNoise, NoiseMixture, SmoothedClassifier, UniformNoise
from hf_smoothing.core.noise import LATTICE_STEPS, NoisyImage, image_key, snap_to_8_bits

NOISES = [GaussianNoise, UniformNoise, LaplaceNoise]
CUMULATIVE = {
    GaussianNoise: stats.norm.cdf,
    UniformNoise: stats.uniform(-np.sqrt(3), 2 * np.sqrt(3)).cdf,
    LaplaceNoise: stats.laplace(scale=np.sqrt(0.5)).cdf,
}


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


@pytest.mark.parametrize("sigma", [0.0, -0.25, float("nan"), float("inf")])
def test_a_sigma_that_is_no_noise_level(sigma):
    with pytest.raises(ValueError, match=rf"sigma={sigma}"):
        GaussianNoise(sigma)


class OtherDevice(NoisyImage):
    """How other devices than the CPU draw, run on the CPU: torch's generator in calls of one size."""

    def __init__(self, noise, image, key):
        super().__init__(noise, image, key)
        self.torch_generator = torch.Generator().manual_seed(key)
        self.ahead = image.new_empty((0, *image.shape))

    def draw(self, count):
        return self._draw_with_torch(count)


MAKE = [NoisyImage, OtherDevice]
IMAGES = {
    "lattice": torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255,
    "float": torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("sampling", ["lattice", "float"])
@pytest.mark.parametrize("kind", NOISES)
def test_noise_does_not_depend_on_how_many_draws_are_asked_for_at_a_time(make, sampling, kind):
    def noisy(key):
        return make(kind(0.25), IMAGES[sampling], key)

    assert noisy(7).sampling == sampling
    together = noisy(7).draw(100)
    stream = noisy(7)
    parts = torch.cat([stream.draw(count) for count in (1, 7, 64, 28)])
    torch.testing.assert_close(parts, together, rtol=0, atol=0)
    assert not torch.equal(noisy(8).draw(100), together)


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("sampling", ["lattice", "float"])
@pytest.mark.parametrize("kind", NOISES)
def test_noise_has_its_distribution_around_the_image(make, sampling, kind):
    image = IMAGES[sampling]
    noise = ((make(kind(0.25), image, 1).draw(300) - image) / 0.25).flatten().double().numpy()
    assert stats.kstest(noise, CUMULATIVE[kind]).pvalue > 1e-3
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert np.abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.015


@pytest.mark.parametrize("kind", NOISES)
def test_on_the_lattice_a_noisy_picture_tells_nothing_of_the_picture_it_came_from(kind):
    """Every value is a multiple of the step, in exactly the float32 that the multiple has for any picture."""
    drawn = kind(0.5).noisy_copies(IMAGES["lattice"], 3).draw(50)
    steps = (drawn.double() * 255 * LATTICE_STEPS).round()
    torch.testing.assert_close(steps.float() * (1 / (255 * LATTICE_STEPS)), drawn, rtol=0, atol=0)


def rounding_attack(noisy: torch.Tensor) -> torch.Tensor:
    """
    A base classifier that reads the picture off the last bits of floating-point sums.

    Around a pixel near 1/2, a sum that comes out small is a multiple of 2^-25, the last place of its parts; around a pixel
    near 0 it may have finer digits. Class 1 says that all small values are such multiples.
    """
    small = noisy.abs() < 2**-3
    coarse = (noisy * 2**25) % 1 == 0
    fits = (coarse | ~small).flatten(1).all(1)
    return torch.stack([~fits, fits], 1).double()


def test_the_rounding_attack_breaks_plain_floats_and_not_the_lattice():
    """
    In the spirit of Voracek and Hein (arXiv 2207.07209): at 128/255 the classifier always says 1 and is certified far beyond
    the picture at 1/255, where it says 0. On the lattice it has nothing to see.
    """
    here, there = torch.full((1, 16, 16), 128 / 255), torch.full((1, 16, 16), 1 / 255)
    distance = float((here - there).norm())
    for lattice in (False, True):
        smoothed = SmoothedClassifier(rounding_attack, GaussianNoise(5.0, lattice=lattice), batch_size=4096)
        at_here, at_there = smoothed.certify([here, there], max_draws=20_000, tolerance=0.01)
        assert at_here.sampling == ("lattice" if lattice else "float")
        broken = at_here.prediction == 1 and at_here.radius > distance and at_there.prediction == 0
        assert broken == (not lattice)


def test_the_samplers_error_is_subtracted_from_the_bound():
    noisy = GaussianNoise(0.25).noisy_copies(IMAGES["lattice"], 0)
    assert 0 < noisy.slack < 1e-6
    assert noisy.radius(0.9) < GaussianNoise(0.25).radius(0.9)
    assert noisy.radius(noisy.probability_needed(0.3)) == pytest.approx(0.3, abs=1e-15)
    assert GaussianNoise(0.25).noisy_copies(IMAGES["float"], 0).slack == 0
    assert GaussianNoise(0.25, lattice=False).noisy_copies(IMAGES["lattice"], 0).sampling == "float"
    assert GaussianNoise(100.0).noisy_copies(IMAGES["lattice"], 0).sampling == "float"


def test_eight_bit_pictures_are_found_on_their_grid():
    levels = torch.arange(256).view(1, 16, 16)
    exact = levels.float() / 255
    for almost in (levels * np.float32(1 / 255), exact + 5e-8):
        assert torch.equal(snap_to_8_bits(almost), exact)
    between = exact.clone()
    between[0, 0, 0] += 0.001
    assert torch.equal(snap_to_8_bits(between), between)


@pytest.mark.parametrize("kind", [UniformNoise, LaplaceNoise])
def test_l1_radii_are_exact_for_a_threshold_on_one_pixel(kind):
    """There the l1 theorems are tight: certified radii come close to the distance to the threshold, and do not pass it."""
    images = torch.randint(0, 256, (60, 1, 2, 2), generator=torch.Generator().manual_seed(2)) / 255

    def base(noisy):
        margin = noisy[:, 0, 0, 0] - 0.4
        return torch.stack([-margin, margin], 1)

    smoothed = SmoothedClassifier(base, kind(0.5), batch_size=4096)
    exact = (images[:, 0, 0, 0] - 0.4).abs()
    certificates = smoothed.certify(images, alpha=0.01, max_draws=4000, tolerance=0.05)
    wrong = sum(
        a.radius > r or a.prediction == int(x[0, 0, 0] <= 0.4)
        for a, r, x in zip(certificates, exact, images)
        if not a.abstains
    )
    assert wrong <= 60 * 0.01 + 3
    assert {a.norm for a in certificates} == {"l1"}
    assert np.mean([a.radius for a in certificates]) > 0.75 * exact.mean()


def test_the_key_of_an_image():
    image = torch.rand(3, 4, 4)
    assert image_key(image, 0) == image_key(image.clone(), 0)
    different = [image_key(image, 1), image_key(image + 1e-3, 0), image_key(image.view(3, 2, 8), 0)]
    assert len({image_key(image, 0), *different}) == 4


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
