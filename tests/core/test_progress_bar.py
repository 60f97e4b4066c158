"""The progress bar of a certification: what it shows of images that are finished, and of one in progress."""

import time

import numpy as np
import pytest
import torch

from hf_smoothing import FixedRule, GaussianNoise, SmoothedClassifier, TwoStageRule
from hf_smoothing.core.certificates import format_radius
from hf_smoothing.core.progress_bar import ProgressBar

NOISE = GaussianNoise(0.25)


def test_a_single_image_shows_the_radius_so_far(capfd):
    def classify(pixels):
        time.sleep(0.02)  # so that the bar is due
        return torch.stack([pixels.mean((1, 2, 3)), torch.full((len(pixels),), 0.1)], 1)

    smoothed = SmoothedClassifier(classify, NOISE, batch_size=32)
    (certificate,) = smoothed.certify(torch.full((1, 3, 4, 4), 0.8), "fixed", n=500, progress=True, seed=0)
    shown = capfd.readouterr().err.split("\r")
    so_far = [float(text.split("so far ")[1].split()[0]) for text in shown if "radius so far" in text]
    assert so_far == sorted(so_far)  # all draws hit, so each batch proves more
    assert 0 < so_far[0] < certificate.radius
    assert shown[-1].rstrip().endswith(f", radius {format_radius(certificate.radius)}")


def test_finished_images_show_their_mean_radius(capfd):
    bar = ProgressBar(4)
    bar.finish([100, 300], [0.2, 0.4])
    bar.show(draws=50, done=0.5)
    assert bar.bar.n == 2.5
    bar.close()
    shown = capfd.readouterr().err
    assert "2 images" in shown
    assert "mean radius 0.30" in shown
    assert "so far" not in shown


@pytest.mark.parametrize("rule", [FixedRule(n0=10, n=50), TwoStageRule(draws=100, max_draws=400)])
def test_a_preview_is_what_the_draws_would_prove(rule):
    runs, row = rule.start(NOISE, 1, 3), np.array([0])
    wanted = runs.start(row, None)
    while not runs.counts.any():
        preview = runs.outcomes(row, np.array([[int(wanted[0]), 0, 0]]))
        before = runs.outcomes(row).radii
        wanted = runs.update(row, np.array([[int(wanted[0]), 0, 0]]))
    assert before == 0
    assert wanted == 0
    assert preview.radii == runs.outcomes(row).radii > 0
