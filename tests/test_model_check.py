"""The look at a model before anything is certified."""

import pytest
import torch
from conftest import SHIPPED_MODEL
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification
from typer.testing import CliRunner

from hf_smoothing import GaussianNoise, SmoothedClassifier, clopper_pearson_lower
from hf_smoothing.cli import app
from hf_smoothing.model_check import check_model


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
    found = check_model(smoothed, sigmas=(0.0, 0.25), count=30, draws=2, seconds=10)
    assert found.batch_statistics == []
    assert any("LayerNorm" in kind for kind in found.norm_layers)
    clean, noisy = found.levels
    assert clean["same_answer"] == 1
    assert noisy["accuracy"] > 0.35
    assert noisy["largest_radius"] == pytest.approx(
        GaussianNoise(0.25).radius(clopper_pearson_lower(100_000, 100_000, 0.001))
    )
    assert "worth smoothing there" in " ".join(found.advice())
    assert found.seconds(10) == pytest.approx(10 * 100_000 / found.draws_per_second)


def test_batch_statistics_are_warned_of(resnet):
    done = CliRunner().invoke(app, ["check", resnet, "--n", "1000"])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "BatchNorm" in said
    assert "Prefer a model with LayerNorm" in said
    assert "unknown" in said  # three classes of its own: nobody knows what is right
    assert "draws/s" in said
    assert "is it trained?" in said  # chance weights answer everything alike, which is no robustness
    assert "worth smoothing there" not in said


def test_a_model_that_is_not_there():
    done = CliRunner().invoke(app, ["check", "nobody/nothing"])
    assert done.exit_code == 2
    assert "cannot be loaded" in " ".join(done.stderr.split())
