"""Audits of runs in which a router chose the noise level: the attack moves the level and the class."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.models import LinearClassifier
from helpers.routers import save_router

from hf_smoothing import GaussianNoise, SmoothedClassifier
from hf_smoothing.core.routed_classifier import RoutedClassifier
from hf_smoothing.diagnostics.attacks import AttackSettings, attack
from hf_smoothing.diagnostics.audit import audit

SETTINGS = AttackSettings(steps=60, draws=4, restarts=1, directions=3, n=400)


@pytest.fixture
def across():
    """
    Levels on either side of the plane where the mean is 0.5. Below it the class is 0 far and wide, above it the class is 1,
    so only a change of the level changes the class.
    """
    direction = torch.full((48,), 48**-0.5)
    at_level = [
        SmoothedClassifier(LinearClassifier(direction, offset), GaussianNoise(sigma), batch_size=512)
        for offset, sigma in ((-50.0, 0.25), (50.0, 0.5))
    ]
    return RoutedClassifier(at_level, LinearClassifier(direction, -0.5 * 48**0.5), GaussianNoise(0.5))


def test_an_attack_on_the_level_finds_what_the_class_alone_does_not_show(across):
    image = torch.full((3, 4, 4), 0.45)
    (certificate,) = across.certify(image[None], draws=300)
    distance = 0.05 * 48**0.5
    assert 0 < certificate.radius < distance
    attempt = attack(across, image, certificate.prediction, certificate.radius, SETTINGS)
    assert attempt.violation is None
    (alone,) = across.at_level[0].certify(image[None], "fixed", n=20_000)  # as if the level could not be moved
    assert alone.radius > 2.4 * distance
    wrong = attack(across, image, alone.prediction, 2.4 * distance, SETTINGS)
    assert wrong.violation is not None
    assert wrong.violation.prediction == 1


def test_an_audit_of_a_routed_run(certify, model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    save_router(folder)
    run = {"sigmas": (0.25, "auto"), "split": "train", "every": 5, "draws": 40, "max_draws": 300}
    certify(model_name_or_path=str(folder), **run)
    settings = AttackSettings(steps=12, draws=2, n=200, directions=2)
    summary = audit(tmp_path / "run", tmp_path / "audit", settings, images=3)
    assert [row["sigma"] for row in summary.rows] == [0.25] * 3 + ["auto"] * 3
    assert not summary.violations
    results = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert [row["sigma"] for row in results["by_sigma"]] == [0.25, "auto"]
    assert audit(tmp_path / "run", tmp_path / "audit", settings, images=3).rows == summary.rows
    weights = folder / "router" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    with pytest.raises(
        ValueError, match="The router is not the one that was certified: it has another router_weights"
    ):
        audit(tmp_path / "run", tmp_path / "other", settings, images=3)
    assert np.isfinite([row["radius"] for row in summary.rows]).all()
