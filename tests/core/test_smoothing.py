import resource
import shutil

import numpy as np
import pytest
import torch
from helpers.models import LinearClassifier
from helpers.paths import SHIPPED_MODEL
from PIL import Image
from torch import nn
from transformers import ViTImageProcessor

from hf_smoothing import (
    ABSTAIN,
    FixedRule,
    GaussianNoise,
    SequentialRule,
    SmoothedClassifier,
    TwoStageRule,
    load_demo_images,
)
from hf_smoothing.core import base_classifier, smoothing
from hf_smoothing.core.bounds import clopper_pearson_lower
from hf_smoothing.core.preprocessing import Preprocessing, to_pixels


def essentials(certificates):
    return [
        (certificate.prediction, certificate.radius, certificate.counts, certificate.num_samples)
        for certificate in certificates
    ]


@pytest.mark.parametrize("settings", [{}, {"radii": (0.1, 0.3)}, {"method": "fixed"}])
def test_a_linear_classifier_is_never_certified_beyond_its_exact_radius(linear, settings):
    """200 images times 3 seeds: radii above the exact one at most alpha of the time."""
    images = torch.rand(200, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    exact = linear.exact_radius(images)
    right = (linear.margin(images) > 0).long()
    smoothed = SmoothedClassifier(linear, GaussianNoise(0.25), batch_size=4096)
    wrong = 0
    for seed in range(3):
        certificates = smoothed.certify(images, alpha=0.01, max_draws=500, seed=seed, **settings)
        for certificate, radius, label in zip(certificates, exact, right):
            assert certificate.guarantee == "per_input"
            wrong += certificate.prediction not in (ABSTAIN, int(label)) or certificate.radius > radius
    assert wrong <= 600 * 0.01 + 3 * np.sqrt(600 * 0.01)


def test_with_many_draws_the_radius_is_nearly_the_exact_one(linear):
    images = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    sigma, n = 0.25, 100_000
    smoothed = SmoothedClassifier(linear, GaussianNoise(sigma), batch_size=20_000)
    certificates = smoothed.certify(images, "fixed", n=n, seed=0)
    largest = GaussianNoise(sigma).radius(float(clopper_pearson_lower(n, n, 0.001)))
    exact = linear.exact_radius(images).clamp(max=largest)
    assert np.mean([certificate.radius for certificate in certificates]) >= 0.95 * float(exact.mean())
    assert all(certificate.num_samples == n + 100 for certificate in certificates)


@pytest.mark.parametrize(
    "rule",
    [TwoStageRule(draws=100, max_draws=300), SequentialRule((0.1, 0.2), max_draws=300), FixedRule(n0=10, n=50)],
)
def test_batch_size_and_order_change_nothing(linear, small_images, noise, rule):
    def run(images, batch_size, seed=0):
        smoothed = SmoothedClassifier(linear, noise, batch_size=batch_size)
        return dict(smoothed.certify_stream(images, rule, seed=seed))

    expected = run(small_images, 64)
    for batch_size in (1, 7, 1000):
        assert run(small_images, batch_size) == expected
    order = torch.randperm(len(small_images), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = run(small_images[order], 7)
    assert {index: shuffled[position] for position, index in enumerate(order)} == expected
    assert essentials(run(small_images, 64, seed=1).values()) != essentials(expected.values())


@pytest.mark.parametrize("radius", [None, 0.25])
def test_a_head_sees_each_image_alone(linear, small_images, noise, radius):
    """What a network computes for an image depends, in its last bits, on the batch around it."""

    def head(pixels, sigma):
        sure = torch.full((len(pixels),), 0.6 + 0.1 * len(pixels) % 0.3)
        return torch.stack([sure, 1 - sure], 1)

    def run(batch_size):
        smoothed = SmoothedClassifier(linear, noise, batch_size=batch_size, count_head=head)
        return smoothed.certify(small_images, radius=radius, max_draws=300, seed=0)

    assert run(1) == run(7) == run(128)


@pytest.mark.parametrize("radius", [None, 0.25])
def test_batch_size_and_order_change_nothing_with_the_shipped_model(demo_images, noise, radius):
    pictures = list(demo_images["image"][:4])

    def run(pictures, batch_size):
        smoothed = SmoothedClassifier.from_pretrained(SHIPPED_MODEL, noise, batch_size=batch_size)
        return smoothed.certify(pictures, radius=radius, max_draws=80, seed=0)

    expected = run(pictures, 64)
    assert run(pictures, 1) == expected
    assert run(pictures, 7) == expected
    assert run(pictures[::-1], 64)[::-1] == expected


def test_batches_are_full_while_images_are_left(linear, noise):
    sizes = []

    def spy(images):
        sizes.append(len(images))
        return linear(images)

    images = torch.rand(300, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    SmoothedClassifier(spy, noise, batch_size=64).certify(images, radius=0.1, max_draws=500)
    assert max(sizes) == 64
    full = [
        size == 64 for size in sizes[3:]
    ]  # two batches of the test for independent rows, then the clean passes of the first images
    assert full.index(False) > 0.8 * len(full)  # only the last images leave room


def test_images_are_read_as_they_are_needed(linear, noise):
    read = []

    def images():
        for position in range(1000):
            read.append(position)
            yield torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(position))

    stream = SmoothedClassifier(linear, noise, batch_size=32).certify_stream(images(), FixedRule(n0=10, n=40))
    next(stream)
    assert len(read) < 10


def test_a_first_batch_of_clean_passes_takes_no_more_images_than_the_draws_after_it_fill(linear, noise):
    read, sizes = [], []

    def images():
        for position in range(100):
            read.append(position)
            yield torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(position))

    def spy(batch):
        sizes.append(len(batch))
        return linear(batch)

    smoothed = SmoothedClassifier(spy, noise, batch_size=64)
    next(smoothed.certify_stream(images(), SequentialRule((0.1,), max_draws=8, alpha=0.4)))
    assert len(read) == 8
    assert sizes[-2:] == [8, 64]


def test_predict_abstains_or_predicts_the_class(linear, noise, small_images):
    near = small_images[:1] - (linear.margin(small_images[:1]) * linear.direction).view(1, 3, 4, 4)
    images = torch.cat([small_images, near.clamp(0, 1)])
    predictions = SmoothedClassifier(linear, noise).predict(images, max_draws=200, seed=0)
    margin = linear.margin(images)
    for prediction, distance in zip(predictions, margin):
        assert prediction in (ABSTAIN, int(distance > 0))
        assert (prediction != ABSTAIN) == (abs(distance) > 0.1) or abs(distance) > 0.02


def test_another_noise_makes_another_classifier_that_shares_the_base_classifier(small_images, noise, monkeypatch):
    scans = []
    monkeypatch.setattr(base_classifier, "check_weights", scans.append)
    smoothed = SmoothedClassifier(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), noise)
    noisier = smoothed.with_noise(GaussianNoise(0.5))
    assert (smoothed.noise.sigma, noisier.noise.sigma) == (0.25, 0.5)
    assert noisier.base_classifier is smoothed.base_classifier
    assert {certificate.sigma for certificate in noisier.certify(small_images, max_draws=30)} == {0.5}
    assert len(scans) == 1


def test_images_are_converted_once(linear, noise, small_images, monkeypatch):
    conversions = []
    monkeypatch.setattr(smoothing, "to_pixels", lambda image, _: conversions.append(image) or image)
    smoothed = SmoothedClassifier(linear, noise)
    smoothed.certify(small_images, radius=0.1)
    list(smoothed.predict(iter(small_images)))
    assert len(conversions) == 24


def test_a_stream_takes_pixels_only(linear, noise):
    smoothed = SmoothedClassifier(linear, noise)
    for image in (torch.zeros(3, 4, 4, dtype=torch.uint8), Image.new("RGB", (4, 4))):
        with pytest.raises(TypeError, match="Image 0 is no float32 tensor"):
            next(smoothed.certify_stream([image], SequentialRule((0.1,))))


def test_uint8_and_float_pixels_are_the_same_image(linear, noise):
    image = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    smoothed = SmoothedClassifier(linear, noise)
    assert smoothed.certify([image], radius=0.1, seed=0) == smoothed.certify([image / 255], radius=0.1, seed=0)


def test_normalisation_of_the_processor_goes_after_the_noise(linear, small_images, noise):
    """sigma and radius stay in units of [0, 1] pixels: the closed form of the classifier after the normalisation holds."""
    processor = ViTImageProcessor(do_normalize=True, image_mean=[0.3] * 3, image_std=[0.1] * 3)

    def after_noise(images):
        return linear(images * 0.1 + 0.3)

    plain = SmoothedClassifier(linear, noise).certify(small_images, radius=0.1, seed=0)
    normalized = SmoothedClassifier(after_noise, noise, image_processor=processor)
    certificates = normalized.certify(small_images, radius=0.1, seed=0)
    assert [a.prediction for a in certificates] == [b.prediction for b in plain]
    np.testing.assert_allclose([a.radius for a in certificates], [b.radius for b in plain], atol=0.02)


def test_a_module_is_put_into_evaluation_mode_and_its_dtype_is_recorded(small_images, noise):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 3))

        def forward(self, images):
            return self.layers(images)

    model = Model().to(torch.bfloat16).train()
    certificates = SmoothedClassifier(model, noise).certify(small_images, max_draws=50)
    assert not model.training
    assert {certificate.dtype for certificate in certificates} == {"bfloat16"}


def certify_with(tiny_model_dir, **kwargs):
    pictures = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smoothed = SmoothedClassifier.from_pretrained(tiny_model_dir, GaussianNoise(0.25), batch_size=16, **kwargs)
    return {(certificate.dtype, certificate.compiled) for certificate in smoothed.certify(pictures, max_draws=60)}


def test_the_type_of_the_forward_passes_is_recorded(tiny_model_dir):
    assert certify_with(tiny_model_dir) == {("float32", False)}
    assert certify_with(tiny_model_dir, autocast=torch.bfloat16) == {("bfloat16 autocast", False)}
    assert certify_with(tiny_model_dir, dtype=torch.bfloat16) == {("bfloat16", False)}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compilation_is_recorded(tiny_model_dir):
    assert certify_with(tiny_model_dir, compile=True) == {("float32", True)}


def test_an_iterator_gives_an_iterator_that_reads_no_further_than_it_must(linear, noise):
    read = []

    def images():
        for position in range(1000):
            read.append(position)
            yield torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(position))

    smoothed = SmoothedClassifier(linear, noise, batch_size=32)
    first = [torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(position)) for position in range(3)]
    settings = {"n0": 10, "n": 40, "seed": 0}
    certificates = smoothed.certify(images(), "fixed", **settings)
    assert [next(certificates) for _ in range(3)] == smoothed.certify(first, "fixed", **settings)
    predictions = smoothed.predict(images(), max_draws=20, seed=0)
    assert [next(predictions) for _ in range(3)] == smoothed.predict(first, max_draws=20, seed=0)
    assert len(read) < 50


def test_memory_stays_flat_however_many_images_stream_through(linear, noise):
    def images():
        for position in range(4_000):
            yield (
                torch.full((3, 4, 4), position / 4_000).add_(linear.direction.view(3, 4, 4).abs() * 0.1).clamp_(0, 1)
            )

    peaks = {}
    stream = SmoothedClassifier(linear, noise, batch_size=256).certify_stream(images(), FixedRule(n0=5, n=20))
    for done, _ in enumerate(stream, 1):
        if done in (1000, 4_000):
            peaks[done] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert peaks[4_000] - peaks[1000] < 50


def test_progress_shows_images_and_draws(linear, noise, small_images, capsys):
    SmoothedClassifier(linear, noise).certify(small_images, radius=0.1, progress=True)
    shown = capsys.readouterr().err
    assert "12 images" in shown
    assert "draws/s" in shown
    assert "100%" in shown


def test_no_images(linear, noise):
    assert SmoothedClassifier(linear, noise).certify([]) == []


class Unread:
    """An iterable that must not be touched: errors come before any work."""

    def __iter__(self):
        raise AssertionError("an image was read before the settings were checked")


def test_impossible_settings_are_refused_before_an_image_is_read(linear, noise):
    smoothed = SmoothedClassifier(linear, noise)
    with pytest.raises(ValueError, match=r"at least [\d,]+ draws"):
        smoothed.certify(Unread(), radius=0.9, max_draws=20)
    with pytest.raises(ValueError, match="alpha=2"):
        smoothed.certify(Unread(), alpha=2)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(3, 5, 4), r"Image 1 has shape \(3, 5, 4\), the first one"),
        (torch.full((3, 4, 4), float("nan")), "values from nan"),
        (torch.randn(3, 4, 4) * 3, "Undo the normalisation"),
        (torch.rand(4, 4), r"shape \(4, 4\)"),
    ],
)
def test_images_that_are_no_pixels(linear, noise, image, message):
    with pytest.raises(ValueError, match=message):
        SmoothedClassifier(linear, noise).certify([torch.rand(3, 4, 4), image])


def test_a_callable_takes_pictures_at_their_own_size(linear, noise, tmp_path):
    pixels = torch.rand(3, 4, 4).mul(255).byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.save(tmp_path / "picture.png")
    smoothed = SmoothedClassifier(linear, noise)
    images = [pixels, picture, tmp_path / "picture.png"]
    assert all(torch.equal(to_pixels(image), to_pixels(pixels)) for image in images)
    assert len(smoothed.certify(images, draws=100)) == 3


def test_what_is_no_list_of_images_is_named(linear, noise):
    smoothed, examples = SmoothedClassifier(linear, noise), load_demo_images()
    for images, said in (
        ("frog.png", r"'frog\.png' is one image: pass a list"),
        (examples[0]["image"], r"Image.* is one image: pass a list"),
        (examples, r"A Dataset is no list of images: pass its column"),
    ):
        with pytest.raises(TypeError, match=said):
            smoothed.certify(images)


def test_processors_of_other_units_give_pixels_and_their_units_after_the_noise(linear, noise):
    picture = Image.new("RGB", (4, 4), (255, 128, 0))
    for settings, units in (({"do_rescale": False}, 255.0), ({"rescale_factor": 0.01}, 2.55)):
        processor = ViTImageProcessor(size={"height": 4, "width": 4}, do_normalize=False, **settings)
        preprocessing = Preprocessing.from_image_processor(processor)
        pixels = to_pixels(picture, preprocessing)
        assert pixels[:, 0, 0].tolist() == pytest.approx([1, 128 / 255, 0])
        assert preprocessing.normalize(pixels)[:, 0, 0].tolist() == pytest.approx([units, units * 128 / 255, 0])

    class Opaque:
        pass

    with pytest.raises(ValueError, match="Opaque does not say how it rescales"):
        SmoothedClassifier(linear, noise, image_processor=Opaque())


def test_weights_and_logits_that_are_not_finite(small_images, noise):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    model[1].bias.data[1] = float("nan")
    with pytest.raises(ValueError, match=r"weights of '1\.bias' are not all finite"):
        SmoothedClassifier(model, noise)
    broken = LinearClassifier(torch.full((48,), float("inf")))
    with pytest.raises(ValueError, match="logits that are not finite"):
        SmoothedClassifier(broken, noise).certify(small_images)


def test_a_classifier_of_the_wrong_shape(small_images, noise):
    with pytest.raises(ValueError, match="returned shape"):
        SmoothedClassifier(lambda images: images.mean((1, 2, 3)), noise).certify(small_images)
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number"):
        SmoothedClassifier(lambda images: images, noise, batch_size=0)
