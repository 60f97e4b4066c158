"""The look at a model before anything is certified."""

from dataclasses import replace

import pytest
import timm
import torch
from helpers.paths import SHIPPED_MODEL
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification, ViTImageProcessor
from typer.testing import CliRunner

from hf_smoothing import GaussianNoise, SmoothedClassifier, clopper_pearson_lower
from hf_smoothing.cli.app import app
from hf_smoothing.diagnostics.model_check import check_model


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    return str(folder)


def test_the_shipped_model_is_worth_smoothing():
    smoothed = SmoothedClassifier.from_pretrained(SHIPPED_MODEL, GaussianNoise(0.25), batch_size=32)
    found = check_model(smoothed, sigmas=(0.0, 0.25), count=30, draws=2)
    assert found.batch_statistics == []
    assert any("LayerNorm" in kind for kind in found.norm_layers)
    clean, noisy = found.levels
    assert clean["same_answer"] == 1
    assert noisy["accuracy"] > 0.35
    assert noisy["largest_radius"] == pytest.approx(
        GaussianNoise(0.25).radius(clopper_pearson_lower(100_000, 100_000, 0.001))
    )
    assert found.all_faults == []  # a doctor that finds something in everybody is none
    assert "worth smoothing there" in " ".join(found.advice())


def test_batch_statistics_are_warned_of(resnet):
    done = CliRunner().invoke(app, ["check", resnet, "--n", "1000"])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "BatchNorm" in said
    assert "Prefer a model with LayerNorm" in said
    assert "unknown" in said  # three classes of its own: nobody knows what is right
    assert "is it trained?" in said  # chance weights answer everything alike, which is no robustness
    assert "worth smoothing there" not in said


def test_answers_that_guessing_may_give_are_not_worth_smoothing(resnet):
    smoothed = SmoothedClassifier.from_pretrained(SHIPPED_MODEL, GaussianNoise(0.25), batch_size=32)
    found = check_model(smoothed, sigmas=(0.0, 0.25), count=20, draws=1)
    levels = [{**level, "accuracy": 0.2, "same_answer": 1.0} for level in found.levels]
    said = " ".join(replace(found, levels=levels, images=20).advice())
    assert "about 20% of 20 clean images, which guessing could be too" in said
    assert "worth smoothing there" not in said
    # answers kept that are wrong are worth nothing either
    levels[0]["accuracy"] = 0.8
    said = " ".join(replace(found, levels=levels, images=20).advice())
    assert "Not worth smoothing as it is" in said


def test_norms_of_timm_have_an_activation_inside():
    """And are of a class of their own."""
    network = timm.create_model("test_efficientnet", num_classes=4)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    smoothed = SmoothedClassifier(network, GaussianNoise(0.25), image_processor=processor, batch_size=8)
    found = check_model(smoothed, sigmas=(0.25,), count=2, draws=1)
    assert found.batch_statistics == ["BatchNormAct2d"]
    assert found.norm_layers["BatchNormAct2d"] == sum(
        isinstance(layer, torch.nn.BatchNorm2d) for layer in network.modules()
    )
    assert smoothed.noise.sigma == 0.25


def test_asked_levels_are_checked_too():
    smoothed = SmoothedClassifier.from_pretrained(SHIPPED_MODEL, GaussianNoise(0.25), batch_size=32)
    found = check_model(smoothed, sigmas=(0.0,), sigma=0.4, count=4, draws=1)
    assert [level["sigma"] for level in found.levels] == [0, 0.1, 0.2, 0.4]


def test_a_model_that_is_not_there():
    done = CliRunner().invoke(app, ["check", "nobody/nothing"])
    assert done.exit_code == 2
    assert "cannot be loaded" in " ".join(done.stderr.split())
