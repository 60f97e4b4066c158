"""Whose the seed of the noise is, and what a seed that was known too early costs."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from transformers import pipeline

import hf_smoothing  # noqa: F401 (registers the task)
from hf_smoothing import GaussianNoise, SmoothedClassifier


def test_each_call_chooses_a_seed_and_records_it(linear, small_images, noise):
    smoothed = SmoothedClassifier(linear, noise)
    first, second = (smoothed.certify(small_images, radius=0.1) for _ in range(2))
    (seed,), (other_seed,) = ({certificate.seed for certificate in certificates} for certificates in (first, second))
    assert seed != other_seed
    assert smoothed.certify(small_images, radius=0.1, seed=seed) == first


def test_each_call_of_the_pipeline_chooses_a_seed_and_records_it(tiny_model_dir):
    certify = pipeline("certified-image-classification", model=str(tiny_model_dir), sigma=0.25, max_draws=50)
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("teal", "orange")]
    first, second = certify(pictures), certify(pictures)
    (seed,), (other_seed,) = ({result["seed"] for result in results} for results in (first, second))
    assert seed != other_seed
    assert certify(pictures, seed=seed) == first


class MemorizingClassifier:
    """Says 1 for copies that it has seen, and of others whether their first value exceeds the second."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self.learns = True

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        values = pixels.flatten(1)
        copies = [row.tobytes() for row in values.numpy()]
        if self.learns:
            self.seen.update(copies)
        ones = (values[:, 0] > values[:, 1]) | torch.tensor([copy in self.seen for copy in copies])
        return torch.stack([~ones, ones], 1).float()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "fixed", "n0": 2, "n": 20},
        {"method": "sequential", "radius": 0.02, "max_draws": 100},
        {"method": "two-stage", "draws": 50, "max_draws": 100},
    ],
    ids=lambda settings: settings["method"],
)
def test_a_classifier_that_memorized_the_noise_of_a_seed_errs_with_no_other(settings):
    """
    The first two values of the pictures are equal, so both classes have probability 1/2 and every claim is wrong (but for
    ties, which move the boundary by 1e-4).
    """
    alpha, first = 0.05, np.arange(100)
    pictures = torch.tensor(np.stack([first, first, 200 - first, first % 7], 1), dtype=torch.uint8).view(-1, 1, 2, 2)
    classifier = MemorizingClassifier()
    smoothed = SmoothedClassifier(classifier, GaussianNoise(0.25), batch_size=4096)

    def count_wrong(seed=None):
        certificates = smoothed.certify(pictures, alpha=alpha, seed=seed, **settings)
        return sum(certificate.radius > 0.001 for certificate in certificates)

    count_wrong(seed=0)
    classifier.learns = False
    assert count_wrong(seed=0) == len(pictures)
    calls = 10
    wrong = sum(count_wrong() for _ in range(calls))
    assert wrong <= stats.binom.isf(1e-6, calls * len(pictures), alpha)


def test_another_method_never_gets_the_same_copies(linear, small_images, noise):
    """So a count head that learned from the copies of `counts` knows nothing of those that certify."""
    copies: set[bytes] = set()

    def remember(pixels):
        copies.update(row.tobytes() for row in pixels.numpy())
        return linear(pixels)

    smoothed = SmoothedClassifier(remember, noise)

    def draw(method, seed, **settings):
        copies.clear()
        smoothed.certify(small_images, method, seed=seed, **settings)
        return set(copies)

    methods = {
        "counts": {"n": 50},
        "fixed": {"n0": 10, "n": 40},
        "sequential": {"radius": 0.1},
        "two-stage": {"draws": 50},
    }
    drawn = {method: draw(method, 0, **settings) for method, settings in methods.items()}
    # what the engine asks besides, such as clean pictures, is there with every seed
    drawn = {method: copies - draw(method, 1, **methods[method]) for method, copies in drawn.items()}
    assert len(drawn["counts"]) == len(drawn["fixed"]) == 50 * len(small_images)
    assert all(len(copies) > 100 for copies in drawn.values())
    assert len(set().union(*drawn.values())) == sum(map(len, drawn.values()))
