"""Several noise levels of one picture: `certify(sigmas=...)`, and the pipeline's `sigmas` and `sigma="auto"`."""

import pytest
import torch
from transformers import pipeline

from hf_smoothing import GaussianNoise, SmoothedClassifier


@pytest.fixture(scope="module")
def pipe(model):
    return pipeline("certified-image-classification", model=model, max_draws=300)


def test_all_levels_from_one_call_at_alpha_split_over_them(linear, small_images, noise):
    smoothed = SmoothedClassifier(linear, noise, batch_size=512)
    found = smoothed.certify(small_images, sigmas=[0.25, 0.5, 1.0], alpha=0.03, seed=1)
    assert len(found) == len(small_images)
    for level, sigma in enumerate((0.25, 0.5, 1.0)):
        alone = smoothed.with_noise(GaussianNoise(sigma)).certify(small_images, alpha=0.01, seed=1)
        assert [row.certificates[level] for row in found] == alone


def test_best_of_has_the_largest_radius_of_each_class(linear, small_images, noise):
    for row in SmoothedClassifier(linear, noise, batch_size=512).certify(small_images, sigmas=[0.25, 1.0]):
        claimed = [certificate for certificate in row.certificates if not certificate.abstains]
        assert set(row.best_of) == {certificate.prediction for certificate in claimed}
        for prediction, best in row.best_of.items():
            same = [certificate.radius for certificate in claimed if certificate.prediction == prediction]
            assert best.radius == max(same)
        radii = [best.radius for best in row.best_of.values()]
        assert radii == sorted(radii, reverse=True)
        assert "A statement about 2 classifiers, one per noise level (0.25, 1), not about one" in row.statement


@pytest.mark.parametrize("sigmas", [[], [0.25, 0.25]])
def test_levels_must_differ(linear, small_images, noise, sigmas):
    with pytest.raises(ValueError, match="must be one or more different noise levels"):
        SmoothedClassifier(linear, noise).certify(small_images, sigmas=sigmas)


@pytest.mark.parametrize("method", ["surrogate", "counts"])
def test_what_is_no_certificate_is_no_statement_about_all_levels(linear, small_images, noise, method):
    """Its words would say that all estimates hold at once with probability 1 - alpha."""

    def head(pixels, sigma):
        return torch.full((len(pixels), 2), 0.5)

    with pytest.raises(ValueError, match=f"method='{method}' does not guarantee per_input"):
        SmoothedClassifier(linear, noise, count_head=head).certify(small_images, method, sigmas=[0.25, 0.5])


def test_the_pipeline_with_several_levels(pipe, demo_images):
    first, _ = pipe(list(demo_images[:2]["image"]), sigmas=[0.25, 0.5], draws=40)
    assert [row["sigma"] for row in first["certificates"]] == [0.25, 0.5]
    assert {row["alpha"] for row in first["certificates"]} == {0.0005}
    for label, best in first["best_of"].items():
        assert best["radius"] == max(row["radius"] for row in first["certificates"] if row["label"] == label)
    assert "not about one" in first["statement"]


def test_the_pipeline_with_a_fallback_level(pipe, demo_images):
    images = list(demo_images[:8]["image"])
    found = pipe(images, sigma="auto", draws=40, seed=0)
    assert all(row["level_choice"]["levels"] == (0.5, 0.12) for row in found)
    assert all(row["level_choice"]["agreement"] == 0.5 for row in found)
    assert found == pipe(images, sigma="auto", draws=40, seed=0, batch_size=5)
    other = pipe(images, sigma="auto", levels=(0.5, 0.25), agreement=0.6, draws=40, seed=0)
    assert {row["sigma"] for row in other} == {0.5, 0.25}
    with pytest.raises(ValueError, match="method='sequential' has no meaning with sigma='auto'"):
        pipe(images, sigma="auto", radius=0.1)
    for settings in ({"levels": (0.5, 0.25)}, {"agreement": 0.5}):
        with pytest.raises(ValueError, match='levels and agreement are for "auto"'):
            pipe(images, sigma=0.5, **settings)
        both = pipeline("certified-image-classification", model=pipe.model.name_or_path, sigma="auto", **settings)
        assert both(images[0], sigma=0.5, draws=40)["sigma"] == 0.5
        with pytest.raises(ValueError, match='levels and agreement are for "auto"'):
            SmoothedClassifier.from_pretrained(pipe.model.name_or_path, GaussianNoise(0.5), **settings)
    one = SmoothedClassifier.from_pretrained(pipe.model.name_or_path, "auto", levels=(0.5, 0.25), agreement=0.6)
    assert [row.radius for row in one.certify(images, draws=40, max_draws=300, seed=0)] == [
        row["radius"] for row in other
    ]
    assert one.predict(images)[0] in (-1, *range(10))
