"""A diffusion model of diffusers as denoiser, against the closed form where the best denoiser is known."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.models import NAMES, save_model

from hf_smoothing import DiffusionDenoiser, GaussianNoise, SmoothedClassifier
from hf_smoothing.runs.settings import RunSettings

diffusers = pytest.importorskip("diffusers")

CENTER, SPREAD = 0.4, 0.2
"""Mean and standard deviation of the toy's pixels, in units of `[0, 1]` pixels."""


class GaussianModel(torch.nn.Module):
    """
    The best predictor of the noise (the image, the velocity) for pixels that are independent and Gaussian: a linear function
    of its input, by the formula of the conditional mean.
    """

    def __init__(self, alphas_cumprod, prediction_type, learned_variance=False):
        super().__init__()
        self.alphas_cumprod, self.prediction_type, self.doubled = alphas_cumprod, prediction_type, learned_variance
        self.config = SimpleNamespace(sample_size=8, in_channels=3)

    def forward(self, sample, timestep):
        a = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        mean, variance = 2 * CENTER - 1, (2 * SPREAD) ** 2
        image = mean + a.sqrt() * variance / (a * variance + 1 - a) * (sample - a.sqrt() * mean)
        noise = (sample - a.sqrt() * image) / (1 - a).sqrt()
        predictions = {"epsilon": noise, "sample": image, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * image}
        predicted = predictions[self.prediction_type]
        return SimpleNamespace(sample=torch.cat([predicted, predicted + 9], 1) if self.doubled else predicted)


def gaussian_denoiser(prediction_type="epsilon", learned_variance=False, **options):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type, clip_sample=False, **options)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return DiffusionDenoiser(GaussianModel(scheduler.alphas_cumprod, prediction_type, learned_variance), scheduler)


def best_estimate(pixels, sigma):
    """The conditional mean of Gaussian pixels, given pixels with noise."""
    return CENTER + SPREAD**2 / (SPREAD**2 + sigma**2) * (pixels - CENTER)


def noisy_toy(sigma, count=4):
    torch.manual_seed(0)
    clean = CENTER + SPREAD * torch.randn(count, 3, 8, 8, dtype=torch.float64)
    return clean, clean + sigma * torch.randn_like(clean)


def save_unet(folder, as_pipeline=False, size=8, **options):
    """Save a tiny diffusion model with random weights, as on the Hub. Returns it and its scheduler."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=size,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **options,
    )
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    if as_pipeline:
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    else:
        unet.save_pretrained(folder)
        scheduler.save_pretrained(folder)
    return unet.eval(), scheduler


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    save_unet(folder)
    return folder


@pytest.mark.parametrize(
    ("prediction_type", "learned_variance"),
    [("epsilon", False), ("sample", False), ("v_prediction", False), ("epsilon", True)],
)
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_it_is_the_best_estimate_where_that_is_known(prediction_type, learned_variance, beta_schedule):
    denoiser = gaussian_denoiser(prediction_type, learned_variance, beta_schedule=beta_schedule)
    for timestep in (30, 200, 500):  # at the noise levels of the schedule, the closed form is met exactly
        sigma = denoiser.levels[timestep]
        assert denoiser.find_timestep(sigma) == timestep
        clean, noisy = noisy_toy(sigma)
        torch.testing.assert_close(denoiser(noisy, sigma), best_estimate(noisy, sigma), atol=1e-9, rtol=0)
    for sigma in (0.12, 0.25, 0.5, 1.0):  # between them, up to the step to the nearest one
        clean, noisy = noisy_toy(sigma)
        estimate = denoiser(noisy, sigma)
        torch.testing.assert_close(estimate, best_estimate(noisy, sigma), atol=0.02 * sigma, rtol=0)
        assert float((estimate - clean).square().mean()) == pytest.approx(
            SPREAD**2 * sigma**2 / (SPREAD**2 + sigma**2), rel=0.2
        )


def test_sigma_is_in_units_of_zero_to_one_pixels():
    """The noise levels of the linear schedule, from its definition: betas from 0.0001 to 0.02 in 1,000 steps."""
    denoiser = gaussian_denoiser()
    kept = 1.0
    for timestep in range(1000):
        kept *= 1 - (1e-4 + (0.02 - 1e-4) * timestep / 999)
        if timestep in (0, 99, 500, 999):
            assert denoiser.levels[timestep] == pytest.approx(math.sqrt((1 - kept) / kept) / 2, rel=1e-3)
    assert denoiser.levels == sorted(denoiser.levels)
    for timestep in (0, 10, 400, 999):
        for sigma in (denoiser.levels[timestep] * 1.0005, denoiser.levels[timestep] / 1.0005):
            if denoiser.levels[0] <= sigma <= denoiser.levels[-1]:
                assert denoiser.find_timestep(sigma) == timestep
    for sigma in (0.001, 100.0):
        with pytest.raises(ValueError, match=rf"sigma={sigma:g} is outside the noise levels .* from 0\.005 to 78"):
            denoiser(torch.zeros(1, 3, 8, 8), sigma)
    with pytest.raises(ValueError, match="prediction_type='flow_prediction' must be epsilon, sample or v_prediction"):
        gaussian_denoiser(prediction_type="flow_prediction")


def test_a_saved_model_is_loaded_and_asked_as_it_was_trained(unet_folder, tmp_path):
    """The same estimate as diffusers' own `pred_original_sample`, from both layouts of a repository."""
    unet, scheduler = save_unet(tmp_path, as_pipeline=True)
    denoiser = DiffusionDenoiser.from_pretrained(str(unet_folder))
    sigma = denoiser.levels[300]
    pixels = torch.rand(3, 3, 8, 8) + sigma * torch.randn(3, 3, 8, 8)
    sample = scheduler.alphas_cumprod[300].sqrt() * (2 * pixels - 1)
    with torch.no_grad():
        step = scheduler.step(unet(sample, 300).sample, 300, sample)
        estimate = denoiser(pixels, sigma)
        torch.testing.assert_close(estimate, (step.pred_original_sample + 1) / 2, atol=1e-4, rtol=0)
        assert float(estimate.min()) >= 0  # clipped, as its scheduler says
        assert float(estimate.max()) <= 1
        from_pipeline = DiffusionDenoiser.from_pretrained(str(tmp_path))
        assert torch.equal(from_pipeline(pixels, sigma), estimate)
        again = denoiser(pixels.flip(0), sigma).flip(0)  # deterministic, each row on its own
    torch.testing.assert_close(again, estimate, atol=1e-6, rtol=0)


def test_a_classifier_behind_it_is_certified_by_its_name(unet_folder, tmp_path):
    folder = save_model(tmp_path, NAMES)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    smoothed = SmoothedClassifier.from_pretrained(folder, GaussianNoise(0.25), denoiser=str(unet_folder))
    certificates = smoothed.certify(images, max_draws=60, seed=0)
    assert {certificate.denoiser for certificate in certificates} == {smoothed.base_classifier.denoiser_name}
    assert smoothed.base_classifier.denoiser_name.startswith("DiffusionDenoiser ")
    noisy = images + 0.25
    denoised = DiffusionDenoiser.from_pretrained(str(unet_folder)).eval()(noisy, 0.25)
    expected = SmoothedClassifier.from_pretrained(folder, GaussianNoise(0.25)).base_classifier([denoised], 0.25)
    torch.testing.assert_close(smoothed.base_classifier([noisy], 0.25), expected)
    RunSettings("a", "b", [0.25], denoiser=str(unet_folder))
    with pytest.raises(ValueError, match=r"sigma=1e-06 is outside the noise levels"):
        smoothed.with_noise(GaussianNoise(1e-6)).certify(images, max_draws=60)


def test_pictures_of_another_size_are_refused(unet_folder):
    denoiser = DiffusionDenoiser.from_pretrained(str(unet_folder))
    message = r"denoises pictures of 3 channels and 8x8 pixels, not {}: set noise_resolution=8"
    with pytest.raises(ValueError, match=message.format("3 channels and 16x16")):
        denoiser(torch.rand(1, 3, 16, 16), 0.25)
    with pytest.raises(ValueError, match=message.format("1 channels and 8x8")):
        denoiser(torch.rand(1, 1, 8, 8), 0.25)


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_other_models_are_refused(tmp_path):
    save_unet(tmp_path / "classes", num_class_embeds=10)
    with pytest.raises(ValueError, match="UNet2DModel for given classes: a denoiser is an unconditional UNet2DModel"):
        DiffusionDenoiser.from_pretrained(str(tmp_path / "classes"))
    save_unet(tmp_path / "kind")
    change_json(tmp_path / "kind" / "config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(ValueError, match="is a UNet2DConditionModel: a denoiser is"):
        DiffusionDenoiser.from_pretrained(str(tmp_path / "kind"))
    save_unet(tmp_path / "scheduler")
    change_json(tmp_path / "scheduler" / "scheduler_config.json", _class_name="ScoreSdeVeScheduler")
    with pytest.raises(ValueError, match="ScoreSdeVeScheduler, whose noise is scaled in another way"):
        DiffusionDenoiser.from_pretrained(str(tmp_path / "scheduler"))
    save_unet(tmp_path / "weights")
    change_json(tmp_path / "weights" / "config.json", layers_per_block=2)
    with pytest.raises(ValueError, match="are missing"):
        DiffusionDenoiser.from_pretrained(str(tmp_path / "weights"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot be loaded.*config\.json"):
        DiffusionDenoiser.from_pretrained(str(tmp_path / "empty"))


def test_a_revision_is_named_after_an_at_sign(monkeypatch, tmp_path):
    """The Hub is not asked: its cache holds one revision, and no other."""
    cached = tmp_path / "models--user--ddpm"
    commit = "0123456789abcdef0123456789abcdef01234567"
    save_unet(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "old").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    images = torch.rand(1, 3, 8, 8)
    smoothed = SmoothedClassifier(lambda pixels: pixels.mean((2, 3)), GaussianNoise(0.25), denoiser="user/ddpm@old")
    assert smoothed.certify(images, max_draws=20)[0].denoiser
    with pytest.raises(ValueError, match="'user/ddpm' cannot be loaded"):
        SmoothedClassifier(lambda pixels: pixels.mean((2, 3)), GaussianNoise(0.25), denoiser="user/ddpm")
