"""Classifiers that people bring along: any architecture, in the right units, with noise where they want it."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from helpers.models import LinearClassifier
from PIL import Image
from timm.models import save_for_hf
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

import hf_smoothing  # noqa: F401
from hf_smoothing import DiffusionDenoiser, GaussianNoise, SmoothedClassifier
from hf_smoothing.core.denoisers import wiener
from hf_smoothing.core.preprocessing import Preprocessing, to_pixels
from hf_smoothing.runs.settings import RunSettings
from hf_smoothing.training.classifier_training import train_classifier
from hf_smoothing.training.evaluation import EvaluationSettings
from hf_smoothing.training.parameter_groups import group_parameters
from hf_smoothing.training.pretrained_classifiers import find_head, load_for_finetuning
from hf_smoothing.training.training_images import ImageSettings, find_class_names
from hf_smoothing.training.training_loop import TrainingSettings

SIDE = 32
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIDE,
}
MODELS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT, patch_size=8, num_labels=3)),
    "beit": lambda: BeitForImageClassification(BeitConfig(**VIT, patch_size=8, num_labels=3)),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(
            image_size=SIDE, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
        )
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3)
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    ),
    "timm": lambda: TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="resnet10t", num_labels=3, pretrained_cfg=TIMM_CFG)
    ),
}
TIMM_CFG = {
    "input_size": [3, SIDE, SIDE],
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
SQUARE = {"height": SIDE, "width": SIDE}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = MODELS[request.param]()
    model.save_pretrained(folder)
    if request.param in ("convnext", "resnet"):
        ConvNextImageProcessor(size={"shortest_edge": SIDE}).save_pretrained(folder)
    elif request.param != "timm":
        ViTImageProcessor(size=SQUARE, image_mean=[0.3, 0.4, 0.5], image_std=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8))


def test_logits_without_noise_are_those_of_the_models_own_pipeline(folder, picture):
    own = pipeline("image-classification", model=str(folder))
    with torch.inference_mode():
        expected = own.model(**own.image_processor(picture, return_tensors="pt").to(own.device)).logits
    smoothed = SmoothedClassifier.from_pretrained(folder, GaussianNoise(0.25))
    pixels = to_pixels(picture, smoothed.preprocessing)
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    with torch.inference_mode():
        logits = smoothed.base_classifier([pixels[None]], 0.0)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        # at the picture's own size the same steps follow, on pixels that were not rounded in between
        native = SmoothedClassifier.from_pretrained(folder, GaussianNoise(0.25), noise_resolution="native")
        full_size = to_pixels(picture, native.preprocessing)
        assert full_size.shape == (3, 50, 60)
        resized = native.base_classifier.denoise_and_resize(full_size[None], 0.0)
        assert resized.shape == (1, 3, SIDE, SIDE)
        assert float((resized[0] - pixels).abs().max()) < 0.06
        assert float((resized[0] - pixels).abs().mean()) < 0.004


def test_it_goes_through_pipeline_script_and_metric(folder, picture, certify, tmp_path, demo_images):
    results = pipeline("certified-image-classification", model=str(folder), sigma=0.1)(
        [picture, picture.rotate(90, expand=True)], max_draws=60, noise_resolution="native"
    )
    assert [result["noise_resolution"] for result in results] == ["native", "native"]
    assert all(result["guarantee"] == "per_input" for result in results)
    names = ["cat", "dog", "frog"]
    small = demo_images.filter(lambda row: row["label"] in (3, 5, 6)).select(range(4))
    path = tmp_path / "small.parquet"
    small.map(lambda row: {"name": names[(3, 5, 6).index(row["label"])]}).remove_columns("label").to_parquet(path)
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    if hasattr(model.config, "label_names"):  # timm's way
        model.config.label_names = names
    named = tmp_path / "named"
    model.save_pretrained(named)
    if not isinstance(model, TimmWrapperForImageClassification):
        AutoImageProcessor.from_pretrained(folder).save_pretrained(named)
    summary = certify(
        tmp_path / "run", model_name_or_path=str(named), dataset_name=str(path), split="train", label_column="name",
        denoiser="wiener", max_draws=40,
    )  # fmt: skip
    assert summary.num_records == 4
    assert not summary.errors


@pytest.mark.parametrize("resolution", ["input", "native"])
def test_sigma_is_in_pixels_whatever_the_processor_does(resolution):
    """Two classes parted by a plane, after a mean of 0.3 and a std of 0.1: the radius is the distance in [0, 1] pixels."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(3 * 8 * 8, generator=generator)
    direction /= direction.norm()
    processor = ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.3] * 3, image_std=[0.1] * 3, do_resize=resolution == "input"
    )
    picture = Image.fromarray(np.random.default_rng(1).integers(100, 150, (8, 8, 3), np.uint8))
    pixels = to_pixels(picture, Preprocessing.from_image_processor(processor))
    # (x - 0.3) / 0.1 is what it sees; its plane lies at a distance of 0.3 from the picture
    after_noise = LinearClassifier(direction, 0.0)
    after_noise.offset = float(3.0 - after_noise.margin((pixels[None] - 0.3) / 0.1))
    smoothed = SmoothedClassifier(
        after_noise,
        GaussianNoise(0.25),
        image_processor=processor,
        noise_resolution=resolution,
        class_names=["a", "b"],
    )
    (certificate,) = smoothed.certify([picture], "fixed", n=20_000, seed=0)
    assert certificate.noise_resolution == resolution
    assert certificate.prediction == 1
    assert 0.27 < certificate.radius <= 0.3


def test_noise_at_the_pictures_own_size_is_another_radius():
    """Averaging four pixels halves the noise: a plane at the input, at distance r, is one at distance 2r before it."""

    class Mean:
        def __call__(self, pixels):
            margin = pixels.flatten(1).mean(1) - 0.5
            return torch.stack([-margin, margin], 1)

    processor = ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False, resample=2)
    picture = Image.new("RGB", (16, 16), (130, 130, 130))
    exact = {"input": (130 / 255 - 0.5) * (3 * 8 * 8) ** 0.5, "native": (130 / 255 - 0.5) * (3 * 16 * 16) ** 0.5}
    for resolution, radius in exact.items():
        smoothed = SmoothedClassifier(
            Mean(), GaussianNoise(0.25), image_processor=processor, noise_resolution=resolution, class_names=["a", "b"]
        )
        (certificate,) = smoothed.certify([picture], "fixed", n=20_000, seed=0)
        assert 0.85 * radius < certificate.radius <= radius
    assert exact["native"] == pytest.approx(2 * exact["input"])


def test_processors_whose_steps_cannot_be_parted_are_refused_with_the_reason():
    class Inverting(ViTImageProcessor):
        def __call__(self, *args, **kwargs):
            inputs = super().__call__(*args, **kwargs)
            if kwargs.get("do_normalize", True):
                inputs["pixel_values"] = -inputs["pixel_values"]
            return inputs

    padding = ViTImageProcessor(size=SQUARE)
    padding.do_pad = True
    for processor, settings, message in (
        (padding, {}, "do_pad=True"),
        (Inverting(size=SQUARE), {}, "does more than resize"),
        (object(), {}, "does not say how it rescales"),
        (ViTImageProcessor(size=SQUARE), {"noise_resolution": "big"}, "noise_resolution='big'"),
        (LevitImageProcessor(), {"noise_resolution": "native"}, "resizes or crops in a way"),
        (ViTImageProcessor(size=SQUARE), {"noise_resolution": -3}, "noise_resolution=-3"),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocessing.from_image_processor(processor, **settings)


def test_offsets_and_scales_of_processors_are_kept(picture):
    """EfficientNet's takes pixels to [-1, 1] before it normalises."""
    processor = EfficientNetImageProcessor(size=SQUARE, rescale_offset=True, rescale_factor=1 / 127.5)
    preprocessing = Preprocessing.from_image_processor(processor)
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    normalised = preprocessing.normalize(to_pixels(picture, preprocessing)[None])
    torch.testing.assert_close(normalised, expected, atol=1e-5, rtol=0)


def test_a_denoiser_is_part_of_the_base_classifier(linear, small_images):
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(4, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noisy = clean + 0.25 * torch.randn(clean.shape, generator=generator)
    assert float((wiener(noisy, 0.25) - clean).square().mean()) < 0.5 * float((noisy - clean).square().mean())
    torch.testing.assert_close(wiener(clean, 1e-9), clean, atol=1e-3, rtol=0)

    asked = []

    def denoiser(pixels, sigma):
        asked.append(sigma)
        return pixels

    smoothed = SmoothedClassifier(linear, GaussianNoise(0.5), denoiser=denoiser)
    certificates = smoothed.certify(small_images, radius=0.1, seed=0)
    assert {certificate.denoiser for certificate in certificates} == {"denoiser"}
    alone = SmoothedClassifier(linear, GaussianNoise(0.5)).certify(small_images, radius=0.1, seed=0)
    assert [replace(certificate, denoiser=None) for certificate in certificates] == alone
    assert set(asked) == {0.5}
    with pytest.raises(ValueError, match="denoiser='magic' is unknown"):
        SmoothedClassifier(linear, GaussianNoise(0.5), denoiser="magic")
    with pytest.raises(ValueError, match="The denoiser made"):
        SmoothedClassifier(linear, GaussianNoise(0.5), denoiser=lambda x, s: x[:, :1]).certify(
            small_images, radius=0.1
        )


@pytest.mark.filterwarnings("ignore:.*BatchNorm")
def test_they_learn_from_noisy_images_with_their_normalisation_after_the_noise(folder, parquet, demo_images, tmp_path):
    images = ImageSettings(parquet, sigmas=[0.0, 0.5], max_train_samples=40)
    opened = images.open()
    names = find_class_names(opened)
    settings = TrainingSettings(str(tmp_path), max_train_steps=2, per_device_train_batch_size=20)
    model, processor = load_for_finetuning(str(folder), names)
    assert find_head(model).out_features == len(names)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    looked = EvaluationSettings("train", eval_samples=40, eval_sigmas=[0.0])
    metrics = train_classifier(
        model, opened, images, settings, looked, settings.create_accelerator(), str(folder), processor
    )
    assert not any(
        torch.equal(parameter.cpu(), before[name])
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    )
    # what the training saw of it at last is what the saved model's own pipeline says
    own = pipeline("image-classification", model=str(tmp_path), top_k=1)
    chosen = demo_images.select(np.random.default_rng(0).permutation(len(demo_images))[:40])
    right = [own(row["image"])[0]["label"] == names[row["label"]] for row in chosen]
    assert metrics["evaluation"]["majority_accuracy_sigma_0"] == pytest.approx(np.mean(right), abs=0.03)
    assert SmoothedClassifier.from_pretrained(tmp_path, GaussianNoise(0.25)).class_names == names


def test_what_finetuning_says_of_them(tmp_path):
    MODELS["resnet"]().save_pretrained(tmp_path)
    ConvNextImageProcessor(size={"shortest_edge": SIDE}).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="BatchNorm"):
        load_for_finetuning(str(tmp_path), ["a", "b"])
    with pytest.raises(ValueError, match="has no drop_path_rate"):
        load_for_finetuning(str(tmp_path), ["a", "b"], drop_path_rate=0.1)
    with pytest.warns(UserWarning, match="BatchNorm"):
        model, _ = load_for_finetuning(str(tmp_path), ["a", "b", "c"])
    with pytest.raises(ValueError, match="takes a mixed-noise ViT"):
        group_parameters(model, 1e-3, 0.0, layer_decay=0.5)


def test_settings_of_the_config_are_passed_on(tiny_model_dir):
    labels = {0: "a", 1: "b", 2: "c"}
    smoothed = SmoothedClassifier.from_pretrained(tiny_model_dir, GaussianNoise(0.25), id2label=labels)
    assert smoothed.class_names == ["a", "b", "c"]


def test_a_model_that_timm_saved_loads(tmp_path):
    """transformers alone fails on the number of classes, which timm writes twice."""
    saved = timm.create_model("test_vit", num_classes=3, img_size=SIDE).eval()
    save_for_hf(saved, str(tmp_path), model_args={"img_size": SIDE})
    smoothed = SmoothedClassifier.from_pretrained(tmp_path, GaussianNoise(0.25))
    pixels = torch.rand(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        expected = saved(smoothed.preprocessing.normalize(pixels))
        assert torch.allclose(smoothed.base_classifier([pixels], 0.0), expected, atol=1e-5)
    finetuned, _ = load_for_finetuning(str(tmp_path), ["a", "b"])
    assert find_head(finetuned).out_features == 2


def test_a_denoiser_that_is_a_module_is_in_evaluation_mode_and_named_by_its_weights():
    """In training mode a draw would depend on the others of its batch."""

    class Cleans(torch.nn.Sequential):
        def forward(self, pixels, sigma):
            return super().forward(pixels)

    denoiser = Cleans(torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5))
    smoothed = SmoothedClassifier(lambda pixels: pixels.mean((2, 3)), GaussianNoise(0.25), denoiser=denoiser)
    (certificate,) = smoothed.certify(torch.full((1, 3, 8, 8), 0.5), radius=0.1, max_draws=50)
    assert not denoiser.training
    assert int(denoiser[0].num_batches_tracked) == 0
    assert certificate.denoiser.startswith("Cleans ")
    other = Cleans(torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5))
    torch.nn.init.constant_(other[0].weight, 2.0)
    again = SmoothedClassifier(lambda pixels: pixels.mean((2, 3)), GaussianNoise(0.25), denoiser=other)
    assert again.base_classifier.denoiser_name != certificate.denoiser
    torch.nn.init.constant_(other[0].weight, float("nan"))
    with pytest.raises(ValueError, match="not all finite"):
        SmoothedClassifier(lambda pixels: pixels.mean((2, 3)), GaussianNoise(0.25), denoiser=other)


def test_a_diffusion_model_without_diffusers_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    for call in (
        lambda: DiffusionDenoiser.from_pretrained("google/ddpm-cifar10-32"),
        lambda: RunSettings("model", "dataset", [0.25], denoiser="google/ddpm-cifar10-32"),
    ):
        with pytest.raises(ImportError, match=r"pip install 'hf-smoothing\[diffusers\]'"):
            call()
