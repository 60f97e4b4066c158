"""Several noise levels of one picture: `certify(sigmas=...)`, and the pipeline's `sigmas` and `sigma="auto"`."""

import shutil

import pytest
from helpers.routers import save_router
from transformers import pipeline

from hf_smoothing import GaussianNoise, SmoothedClassifier


@pytest.fixture(scope="module")
def routed_pipe(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed") / "model"
    shutil.copytree(model, folder)
    return pipeline("certified-image-classification", model=save_router(folder), max_draws=300)


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


def test_the_pipeline_with_several_levels(routed_pipe, demo_images):
    first, _ = routed_pipe(list(demo_images[:2]["image"]), sigmas=[0.25, 0.5], draws=40)
    assert [row["sigma"] for row in first["certificates"]] == [0.25, 0.5]
    assert {row["alpha"] for row in first["certificates"]} == {0.0005}
    for label, best in first["best_of"].items():
        assert best["radius"] == max(row["radius"] for row in first["certificates"] if row["label"] == label)
    assert "not about one" in first["statement"]


def test_the_pipeline_with_a_router(routed_pipe, demo_images):
    images = list(demo_images[:4]["image"])
    found = routed_pipe(images, sigma="auto", draws=40, seed=0)
    assert [row["sigma"] in (0.25, 0.5) for row in found] == [True] * 4
    assert all(sum(row["routing"]["votes"]) == 256 for row in found)
    assert found == routed_pipe(images, sigma="auto", draws=40, seed=0, batch_size=5)
    with pytest.raises(ValueError, match="method='sequential' has no meaning with sigma='auto'"):
        routed_pipe(images, sigma="auto", radius=0.1)
    one = SmoothedClassifier.from_pretrained(routed_pipe.model.name_or_path, "auto")
    assert one.levels == (0.25, 0.5)
    assert one.predict(images)[0] in (-1, *range(10))
