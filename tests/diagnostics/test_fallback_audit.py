"""Audits of a classifier of two noise levels: the attack moves the level and the class."""

import json

import pytest
import torch
from helpers.models import LinearClassifier

from hf_smoothing import GaussianNoise, SmoothedClassifier
from hf_smoothing.core.fallback_classifier import FallbackClassifier
from hf_smoothing.diagnostics.attacks import AttackSettings, attack
from hf_smoothing.diagnostics.audit import audit

SETTINGS = AttackSettings(steps=60, draws=4, restarts=1, directions=3, n=400)
AGREEMENT = 0.8
EDGE = 0.4 * 0.8416
"""From the plane where the mean is 0.5 to the two planes where 80 % of the copies at sigma 0.4 agree."""


def image_at(distance):
    """A picture at a distance from the plane, on the side of class 1 if positive."""
    return torch.full((3, 4, 4), 0.5 + distance * 48**-0.5)


@pytest.fixture
def across():
    """Two classes at sigma 0.4, divided by the plane where the mean is 0.5; one class far and wide at the fallback level."""
    direction = torch.full((48,), 48**-0.5)
    at_levels = [
        SmoothedClassifier(LinearClassifier(direction, offset), GaussianNoise(sigma), batch_size=512)
        for offset, sigma in ((-0.5 * 48**0.5, 0.4), (-50.0, 0.2))
    ]
    return FallbackClassifier(*at_levels, agreement=AGREEMENT)


@pytest.mark.parametrize(
    ("place", "label", "level"),
    [
        (EDGE + 0.4, 1, 0),  # the fallback says 0, long before the class changes at the primary level
        (EDGE - 0.4, 0, 1),  # the primary level says 1, while the fallback says 0 far and wide
    ],
)
def test_an_attack_on_the_level_finds_what_the_class_in_use_does_not_show(across, place, label, level):
    image = image_at(place)
    (certificate,) = across.certify(image[None], draws=600)
    assert certificate.prediction == label
    assert certificate.sigma == across.levels[level]
    assert 0 < certificate.radius < 0.4
    attempt = attack(across, image, label, certificate.radius, SETTINGS)
    assert attempt.violation is None
    # as if the level could not be moved
    (alone,) = (across.primary, across.fallback)[level].certify(image[None], "fixed", n=20_000)
    assert alone.radius > 0.6
    wrong = attack(across, image, label, 0.6, SETTINGS)
    assert wrong.violation is not None
    assert wrong.violation.prediction == 1 - label


def test_an_audit_of_a_run_with_a_fallback(certify, tmp_path):
    run = {"sigmas": (0.25, "auto"), "split": "train", "every": 5, "draws": 40, "max_draws": 300}
    certify(levels=(0.5, 0.25), agreement=0.9, **run)
    settings = AttackSettings(steps=12, draws=2, n=200, directions=2)
    summary = audit(tmp_path / "run", tmp_path / "audit", settings, images=3)
    assert [row["sigma"] for row in summary.rows] == [0.25] * 3 + ["auto"] * 3
    assert not summary.violations
    results = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert [row["sigma"] for row in results["by_sigma"]] == [0.25, "auto"]
    assert audit(tmp_path / "run", tmp_path / "audit", settings, images=3).rows == summary.rows
