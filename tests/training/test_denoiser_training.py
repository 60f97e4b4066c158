"""Training a diffusion model as denoiser: what it is asked, what it learns, what is saved; and the study that uses it."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from hf_smoothing import DiffusionDenoiser
from hf_smoothing.training.denoiser_training import (
    DenoiserSettings,
    _create_loss,
    create_denoiser,
    train_denoiser,
)
from hf_smoothing.training.training_loop import TrainingSettings

TINY = {"image_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1}


def test_the_loss_is_zero_for_the_true_noise_at_timesteps_of_the_noise_levels():
    settings = DenoiserSettings("images", sigma_min=0.1, sigma_max=1.0, **TINY)
    denoiser = create_denoiser(settings)
    asked, whiteness = [], {255: 1.0, 0: -1.0}

    def perfect(sample, timesteps):
        """White pixels are 1 for a diffusion model, black ones -1; the rest of its input is the noise."""
        asked.append(timesteps)
        a = denoiser.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return SimpleNamespace(sample=(sample - a.sqrt() * whiteness[value]) / (1 - a).sqrt())

    compute_loss = _create_loss(denoiser, settings)
    for value in whiteness:
        pixels = torch.full((400, 3, 8, 8), value, dtype=torch.uint8)
        assert float(compute_loss(perfect, pixels, torch.empty(0))) < 1e-6
    timesteps = torch.cat(asked)
    levels = torch.tensor(denoiser.levels)[timesteps]
    assert 0.09 < float(levels.min()) < 0.12
    assert 0.95 < float(levels.max()) < 1.01
    middle = (denoiser.find_timestep(0.1) + denoiser.find_timestep(1.0)) / 2
    assert float(timesteps.float().mean()) == pytest.approx(middle, rel=0.05)


def test_a_trained_denoiser_is_loaded_by_its_folder_and_removes_noise(parquet, demo_images, tmp_path):
    settings = TrainingSettings(
        str(tmp_path / "denoiser"), max_train_steps=80, per_device_train_batch_size=32, learning_rate=3e-3,
        weight_decay=0.0,
    )  # fmt: skip
    results = train_denoiser(DenoiserSettings(parquet, **TINY), settings, settings.create_accelerator())
    assert results == json.loads((tmp_path / "denoiser" / "results" / "training.json").read_text())
    assert results["steps"] == 80
    denoiser = DiffusionDenoiser.from_pretrained(str(tmp_path / "denoiser")).eval()
    pictures = [row["image"].resize((8, 8)) for row in demo_images.select(range(32))]
    clean = torch.stack([torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures])
    clean = clean.view(-1, 8, 8, 3).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        for sigma in (0.25, 1.0):
            noisy = clean + sigma * torch.randn(clean.shape)
            error, before = (
                (pixels - clean).square().mean() for pixels in (denoiser(noisy, sigma), noisy.clamp(0, 1))
            )
            assert float(error) < 0.8 * float(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_min": 1.5}, r"sigma_min=1\.5 must be above 0 and below sigma_max=1\.2"),
        ({"hflip": 2.0}, "hflip=2 must be a probability"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid' must be one of linear"),
        ({"image_size": 30}, "image_size=30 must be a multiple of 4"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DenoiserSettings("images", **options)


@pytest.mark.slow
def test_the_script_trains_and_the_study_compares_on_the_same_images(processes, parquet, model, tmp_path):
    done = processes.run(
        "scripts/train_denoiser.py", "--dataset_name", parquet, "--image_size", 8, "--block_out_channels", 8, 16,
        "--per_device_train_batch_size", 32, "--max_train_steps", 4, "--output_dir", tmp_path / "denoiser",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"Wrote the denoiser and results/training.json to {tmp_path / 'denoiser'}." in done.stdout
    done = processes.run(
        "scripts/studies/denoiser_study.py", "--model", model, "--denoiser", tmp_path / "denoiser", "--dataset", parquet,
        "--split", "train", "--max_samples", 4, "--draws", 30, "--output_dir", tmp_path / "study",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    assert [row["denoiser_kind"] for row in study["results"]] == ["none", "wiener", "diffusion"]
    assert {row["num_images"] for row in study["results"]} == {4}
    assert "| diffusion model, one step |" in done.stdout
