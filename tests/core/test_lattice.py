from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from hf_smoothing import GaussianNoise, LaplaceNoise, SmoothedClassifier, UniformNoise
from hf_smoothing.core.lattice import (
    STEPS_PER_UNIT,
    NumpyLatticeSampler,
    SampledNoise,
    TorchLatticeSampler,
    place_on_lattice,
    round_to_lattice,
)
from hf_smoothing.core.preprocessing import to_pixels

CPU = torch.device("cpu")
NOISES = [GaussianNoise, UniformNoise, LaplaceNoise]
CUMULATIVE = {
    GaussianNoise: stats.norm.cdf,
    UniformNoise: stats.uniform(-np.sqrt(3), 2 * np.sqrt(3)).cdf,
    LaplaceNoise: stats.laplace(scale=np.sqrt(0.5)).cdf,
}
SAMPLERS = [NumpyLatticeSampler, TorchLatticeSampler]
"""The second is how CUDA draws, here on the CPU."""
IMAGES = {
    "8 bits": torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255,
    "between": torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)),
}


def draw(sampler, image, *counts):
    noisy = sampler.start(image)
    return torch.cat([sampler.draw([noisy], [count]) for count in counts])


@pytest.mark.parametrize("make", SAMPLERS)
@pytest.mark.parametrize("picture", IMAGES)
@pytest.mark.parametrize("kind", NOISES)
def test_noise_does_not_depend_on_how_many_draws_are_asked_for_at_a_time(make, picture, kind):
    image, other = IMAGES[picture], IMAGES["8 bits"].flip(0)

    def sampler(seed=7, method="fixed", sigma=0.25):
        return make(kind(sigma), method, seed, CPU)

    together = draw(sampler(), image, 1000)  # more than one block
    torch.testing.assert_close(draw(sampler(), image, 1, 7, 340, 628, 24), together, rtol=0, atol=0)
    shared = sampler()
    first, second = shared.start(image), shared.start(other)
    batches = [shared.draw([first, second], counts) for counts in ((100, 50), (600, 1), (300, 400))]
    parts = torch.cat([batches[0][:100], batches[1][:600], batches[2][:300]])
    torch.testing.assert_close(parts, together, rtol=0, atol=0)
    for another in (sampler(seed=8), sampler(method="counts"), sampler(sigma=0.2500001)):
        assert not torch.equal(draw(another, image, 1000), together)


@pytest.mark.parametrize("make", SAMPLERS)
@pytest.mark.parametrize("picture", IMAGES)
@pytest.mark.parametrize("kind", NOISES)
def test_noise_has_its_distribution_around_the_image(make, picture, kind):
    image = IMAGES[picture]
    noise = ((draw(make(kind(0.25), "fixed", 1, CPU), image, 700) - image) / 0.25).double().numpy()
    assert stats.kstest(noise[:300].ravel(), CUMULATIVE[kind]).pvalue > 1e-3
    assert noise.std() == pytest.approx(1, abs=0.02)
    for shifted in (noise.ravel()[1:], np.roll(noise, 1, axis=0).ravel()[:-1]):
        assert np.abs(np.corrcoef(noise.ravel()[:-1], shifted)[0, 1]) < 0.015


def test_generators_of_finished_images_are_used_again():
    sampler = NumpyLatticeSampler(GaussianNoise(0.25), "fixed", 0, CPU)
    expected = draw(sampler, IMAGES["between"], 500)
    for count in (1, 400, 800):
        noisy = sampler.start(IMAGES["8 bits"])
        sampler.draw([noisy], [count])
        sampler.finish(noisy)
        torch.testing.assert_close(draw(sampler, IMAGES["between"], 500), expected, rtol=0, atol=0)
    assert len(sampler._free) <= 5


def test_threads_change_nothing(monkeypatch):
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = draw(NumpyLatticeSampler(GaussianNoise(0.25), "fixed", 0, CPU), image, 5, 200)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    threaded = draw(NumpyLatticeSampler(GaussianNoise(0.25), "fixed", 0, CPU), image, 5, 200)
    torch.testing.assert_close(threaded, expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", SAMPLERS)
@pytest.mark.parametrize("picture", IMAGES)
def test_a_noisy_picture_tells_nothing_of_the_picture_it_came_from(make, picture):
    """Every value is a multiple of the step, in exactly the float32 that the multiple has for any picture."""
    drawn = draw(make(GaussianNoise(0.5), "fixed", 3, CPU), IMAGES[picture], 50)
    steps = (drawn.double() * STEPS_PER_UNIT).round()
    torch.testing.assert_close(steps.float() * (1 / STEPS_PER_UNIT), drawn, rtol=0, atol=0)
    torch.testing.assert_close(round_to_lattice(drawn), drawn, rtol=0, atol=0)


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


@pytest.mark.parametrize("offset", [0.0, 0.3 / 255], ids=["8 bits", "between"])
def test_the_rounding_attack_breaks_plain_floats_and_not_the_lattice(offset):
    """
    In the spirit of Voracek and Hein (arXiv 2207.07209): in plain floats the classifier says 1 at 128/255 and would be
    certified far beyond the picture at 1/255, where it says 0. On the lattice it has nothing to see.
    """
    here, there = (torch.full((1, 16, 16), level / 255 + offset) for level in (128, 1))
    generator = torch.Generator().manual_seed(0)
    plain = [rounding_attack(image + 5 * torch.randn(5000, 1, 16, 16, generator=generator)) for image in (here, there)]
    assert plain[0].argmax(1).float().mean() > 0.999
    assert plain[1].argmax(1).float().mean() < 0.5
    smoothed = SmoothedClassifier(rounding_attack, GaussianNoise(5.0), batch_size=4096)
    at_here, at_there = smoothed.certify([here, there], "fixed", n=20_000, seed=0)
    assert at_here.sampling == at_there.sampling == "lattice"
    assert not (at_here.prediction == 1 and at_here.radius > (here - there).norm() and at_there.prediction == 0)


def test_pictures_are_the_same_however_a_device_divides_by_255(demo_images):
    """CUDA multiplies by a reciprocal: 126 of 256 levels differ from k/255 in the last place."""
    pictures = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in demo_images["image"]]
    sampler = NumpyLatticeSampler(GaussianNoise(0.25), "fixed", 0, CPU)
    same = 0
    for levels in pictures:
        divided = to_pixels(levels)
        multiplied = to_pixels(levels.float() * torch.tensor(1 / 255))
        assert not torch.equal(divided, multiplied)
        same += torch.equal(draw(sampler, divided, 2), draw(sampler, multiplied, 2))
    assert (same, len(pictures)) == (200, 200)


def test_only_pictures_within_rounding_of_their_levels_are_moved():
    exact = place_on_lattice(IMAGES["8 bits"])
    np.testing.assert_array_equal(place_on_lattice((IMAGES["8 bits"] * 255).round() * (1 / 255)), exact)
    assert (exact % 16 == 0).all()
    for value in (0.5, float(IMAGES["8 bits"][0, 0, 0]) + 1e-6):
        between = IMAGES["8 bits"].clone()
        between[0, 0, 0] = value
        np.testing.assert_array_equal(place_on_lattice(between), between.double().numpy().ravel() * STEPS_PER_UNIT)


@pytest.mark.parametrize("kind", NOISES)
def test_bounds_are_corrected_for_the_sampler(kind):
    noise = kind(0.25)
    sampled = SampledNoise(noise, 3 * 32 * 32)
    assert 1e-7 < sampled.slack < 3e-7
    # no 8-bit picture moves further
    levels = torch.arange(256) / 255
    moves = place_on_lattice(levels) / STEPS_PER_UNIT - levels.double().numpy()
    assert np.linalg.norm(np.tile(moves, 12), 2 if noise.norm == "l2" else 1) <= sampled.moved < 1e-3
    assert sampled.radius(0.9) == pytest.approx(noise.radius(0.9 - sampled.slack) - sampled.moved, abs=1e-15)
    np.testing.assert_allclose(sampled.radius(sampled.probability_needed(0.3)), 0.3, atol=1e-12)
    np.testing.assert_allclose(sampled.radius(sampled.probability_needed(0.1, 0.2), 0.2), 0.1, atol=1e-12)
    assert sampled.radius(0.5) == 0
    assert SampledNoise(noise, 3 * 32 * 32) == sampled  # plans are kept by it


@pytest.mark.parametrize("sigma", [0.01, 0.25, 50.0])
def test_the_error_of_the_sampler_is_below_its_bound(sigma):
    """
    The rounded sum against exact arithmetic, for z on a fine grid around the boundaries of cells.

    A draw lands in another cell than it should only where z is within the rounding error of a boundary. The bound allows for
    these z; here none of them is further away from a boundary than it says.
    """
    scale, generator = sigma * STEPS_PER_UNIT, np.random.default_rng(0)
    x = generator.random(2000, np.float32).astype(np.float64) * STEPS_PER_UNIT
    z = generator.standard_normal(2000)
    boundaries = np.rint(x + scale * z) + 0.5
    z = (boundaries - x) / scale * (1 + generator.uniform(-8, 8, 2000) * 2.0**-53)
    computed = np.rint(x + scale * z)
    differing = 0
    for a, b, boundary, cell in zip(x.tolist(), z.tolist(), boundaries.tolist(), computed.tolist()):
        total = Fraction(a) + Fraction(scale) * Fraction(b)
        if cell != round(total):
            differing += 1
            assert abs(total - Fraction(boundary)) <= 2 * (STEPS_PER_UNIT + 40 * scale) * 2.0**-53
    assert differing > 0  # there is something to see


def test_sigmas_beyond_the_lattice_are_refused():
    with pytest.raises(ValueError, match=r"sigma=64 is above 50"):
        GaussianNoise(64)
    assert 40 * GaussianNoise(50).sigma * STEPS_PER_UNIT + STEPS_PER_UNIT < 2**24


def test_gradients_pass_the_rounding():
    pixels = torch.rand(2, 3, requires_grad=True)
    rounded = round_to_lattice(pixels)
    torch.testing.assert_close(rounded, round_to_lattice(pixels.detach()), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad((rounded * torch.arange(3.0)).sum(), pixels)
    assert gradient.tolist() == [[0, 1, 2]] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(demo_images):
    device = torch.device("cuda")
    image = to_pixels(torch.from_numpy(np.array(demo_images["image"][0])).permute(2, 0, 1))
    sampler = TorchLatticeSampler(GaussianNoise(0.25), "fixed", 0, device)
    drawn = draw(sampler, image, 1000)
    torch.testing.assert_close(round_to_lattice(drawn.cpu()), drawn.cpu(), rtol=0, atol=0)
    again = TorchLatticeSampler(GaussianNoise(0.25), "fixed", 0, device)
    torch.testing.assert_close(draw(again, image, 3, 500, 497), drawn, rtol=0, atol=0)
    assert stats.kstest(((drawn.cpu() - image) / 0.25).double().numpy().ravel()[: 10**6], stats.norm.cdf).pvalue > 1e-3
