"""A router learns which noise level certifies which picture, seen through its own noise."""

import json

import pytest
import torch
from helpers.paths import DEMO_IMAGES, SHIPPED_MODEL
from huggingface_hub.errors import StrictDataclassError

from hf_smoothing.core.modeling_level_router import LevelRouter, LevelRouterConfig, load_router
from hf_smoothing.count_head.router_training import (
    RADII,
    RouterSettings,
    _compute_shares,
    evaluate_router,
    soft_certified_share,
)


def test_the_loss_counts_what_the_certificate_proves():
    """Sure of a level, the system has its radius; unsure, the smallest of the levels in question."""
    radii = torch.tensor([[0.6, 1.1]])
    sure = soft_certified_share(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), radii.expand(2, 2), 1.0)
    unsure = soft_certified_share(torch.tensor([[0.5, 0.5]]), radii, 1.0)
    reached = [sum(radius > step for step in RADII) / len(RADII) for radius in (0.6, 1.1)]
    assert float(sure) == pytest.approx(sum(reached) / 2, abs=0.05)
    assert float(unsure) == pytest.approx(reached[0], abs=0.05)


def test_a_router_beats_every_level_alone_where_brightness_tells_the_level(tmp_path):
    """Dark pictures are certified at the low level only, bright ones at the high level only."""
    generator = torch.Generator().manual_seed(0)
    bright = torch.arange(120) % 2 == 1
    pixels = (255 * torch.rand(120, 3, 8, 8, generator=generator) * 0.2 + 150.0 * bright[:, None, None, None]).byte()
    radii = torch.where(bright[:, None], torch.tensor([0.0, 1.3]), torch.tensor([0.6, 0.0]))
    gains = (radii[..., None] >= torch.tensor(RADII)).logical_and(radii[..., None] > 0).float().mean(-1)
    router = LevelRouter(LevelRouterConfig(levels=[0.25, 0.5], noise_sigma=1.0, grid=2, hidden_size=16))
    optimizer = torch.optim.AdamW(router.parameters(), 1e-2)
    for _ in range(60):
        shares = _compute_shares(router, pixels, 1.0, 8)
        loss = -(shares * gains).sum(1).mean() - soft_certified_share(shares, radii, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    figures = evaluate_router(router, pixels[:40], radii[:40])
    assert figures["system"] > max(figures["alone_0.25"], figures["alone_0.5"]) + 0.05
    router.save_pretrained(tmp_path / "router")
    for folder in (tmp_path, tmp_path / "router"):  # in the folder of a count head, or alone
        assert torch.equal(load_router(folder)(pixels.float()), router(pixels.float()))


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="eval_share=1 must be above 0 and below 1"):
        RouterSettings(count_head="head", dataset_name="images", eval_share=1)
    with pytest.raises(StrictDataclassError, match="must be different noise levels above 0, in ascending order"):
        LevelRouterConfig(levels=[0.5, 0.25])


def test_the_script_trains_a_router_that_loads(processes, tmp_path):
    head = SHIPPED_MODEL.parent / "mixed-noise-vit-nano-cifar10-counts"
    done = processes.run(
        "scripts/train_router.py", "--count_head", head, "--dataset_name", DEMO_IMAGES, "--max_train_samples", 40,
        "--per_device_train_batch_size", 12, "--max_train_steps", 4, "--output_dir", tmp_path / "router",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_router(tmp_path).config.levels == [0.25, 0.5, 1.0]
    results = json.loads((tmp_path / "router" / "training.json").read_text())
    assert results["evaluation"].keys() == {"alone_0.25", "alone_0.5", "alone_1", "envelope", "system"}
