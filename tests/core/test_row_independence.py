"""A base classifier whose rows depend on each other is refused, and no other one is."""

import shutil

import pytest
import torch
from helpers.paths import SHIPPED_MODEL
from torch import nn
from torch.nn import functional

from hf_smoothing import GaussianNoise, SmoothedClassifier
from hf_smoothing.core.preprocessing import to_pixels
from hf_smoothing.diagnostics.model_check import check_model


class Network(nn.Module):
    """Convolutions, around a layer that may look at the whole batch."""

    def __init__(self, suspect, step=lambda values: values):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True))
        self.suspect = suspect
        self.step = step
        self.head = nn.Sequential(nn.Conv2d(8, 8, 2), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, pixels):
        return self.head(self.step(self.suspect(self.stem(pixels))))


class BatchAttention(nn.MultiheadAttention):
    """Attends over the images of a batch, not over the pixels of an image."""

    def __init__(self):
        super().__init__(32, 2)

    def forward(self, features):
        rows = features.flatten(1)
        return super().forward(rows, rows, rows)[0].view_as(features)


class Mixer(nn.Identity):
    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def forward(self, values):
        return self.mix(values)


def certify(classifier, images, **settings):
    return SmoothedClassifier(classifier, GaussianNoise(0.25), **settings).certify(images, radius=0.1, max_draws=60)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(8, track_running_stats=False),
         r"layer 'suspect' \(BatchNorm2d without running statistics\) .*track_running_stats=True"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8, track_running_stats=False)), r"layer 'suspect\.1' \(BatchNorm2d"),
        (BatchAttention(), r"layer 'suspect' \(BatchAttention\) .* Compute each row from its own image alone"),
        (Mixer(lambda values: values - values.mean(0)), r"layer 'suspect' \(Mixer\)"),
        (Mixer(lambda values: functional.normalize(values, dim=0)), r"layer 'suspect' \(Mixer\)"),
        (Mixer(lambda values: values + 0.03 * values.roll(1, 0)), r"layer 'suspect' \(Mixer\)"),
        (Mixer(lambda values: values + torch.arange(len(values)).view(-1, 1, 1, 1)), r"layer 'suspect' \(Mixer\)"),
        (Mixer(lambda values: functional.dropout(values, 0.5)), r"layer 'suspect' \(Mixer\) gives the same batch other"),
    ],
)  # fmt: skip
def test_a_layer_that_looks_at_the_batch_is_named(small_images, layer, message):
    with pytest.raises(ValueError, match=message):
        certify(Network(layer), small_images)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_layers_of_a_compiled_module_are_named(small_images):
    with pytest.raises(ValueError, match=r"layer 'suspect' \(BatchNorm2d without running statistics\)"):
        certify(Network(nn.BatchNorm2d(8, track_running_stats=False)), small_images, compile=True)
    certify(Network(nn.GroupNorm(2, 8)), small_images, compile=True)


def test_a_step_between_layers_is_blamed_on_the_module_around_it(small_images):
    network = nn.Sequential(Network(nn.Identity(), lambda values: values / values.std()))
    with pytest.raises(ValueError, match=r"classifier's layer '0' \(Network\) gives an image other logits in another"):
        certify(network, small_images)
    with pytest.raises(ValueError, match=r"classifier \(Network\) gives an image other logits in another batch"):
        certify(network[0], small_images)


def test_callables_and_denoisers_are_tested_too(linear, small_images):
    with pytest.raises(ValueError, match="The base classifier gives an image other logits in another batch"):
        certify(lambda pixels: linear(pixels - pixels.mean(0)), small_images)
    with pytest.raises(ValueError, match="gives the same batch other logits"):
        certify(lambda pixels: linear(pixels + torch.randn(len(pixels), 1, 1, 1)), small_images)

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3, track_running_stats=False)

        def forward(self, pixels, sigma):
            return self.norm(pixels)

    with pytest.raises(ValueError, match=r"layer 'denoiser\.norm' \(BatchNorm2d without running statistics\)"):
        certify(linear, small_images, denoiser=Denoiser())
    for method in ("fixed", "counts"):  # without a clean pass
        with pytest.raises(ValueError, match="its rows depend on each other"):
            SmoothedClassifier(lambda pixels: linear(pixels - pixels.mean(0)), GaussianNoise(0.25)).certify(
                small_images, method, n=20
            )


def test_training_mode_after_construction_changes_no_certificate(small_images):
    layers = nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.5))
    layers[0].running_mean.uniform_()
    network, denoiser = Network(layers), Mixer(lambda values: values)
    denoiser.forward = lambda pixels, sigma: pixels
    smoothed = SmoothedClassifier(network, GaussianNoise(0.25), denoiser=denoiser)
    expected = smoothed.certify(small_images, max_draws=100, seed=0)
    for module in (network, denoiser):
        module.train()
    assert smoothed.certify(small_images, max_draws=100, seed=0) == expected
    assert not network.training
    assert not denoiser.training
    assert int(layers[0].num_batches_tracked) == 0


def test_training_mode_between_two_images_changes_no_certificate(small_images):
    layers = nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.5))
    network = Network(layers)
    smoothed = SmoothedClassifier(network, GaussianNoise(0.25), batch_size=16)

    def images(change):
        for image in small_images:
            change()
            yield image

    expected = list(smoothed.certify(images(lambda: None), max_draws=100, seed=0))
    assert list(smoothed.certify(images(network.train), max_draws=100, seed=0)) == expected
    assert int(layers[0].num_batches_tracked) == 0


def test_hooks_leave_nothing_behind(small_images):
    network = Network(nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(ValueError, match="suspect"):
        certify(network, small_images)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("sigma", [0.12, 1.0])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"autocast": torch.bfloat16},
        {"autocast": torch.float16},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
    ],
)
def test_the_shipped_model_passes_in_every_precision(settings, sigma, demo_images):
    smoothed = SmoothedClassifier.from_pretrained(SHIPPED_MODEL, GaussianNoise(sigma), **settings)
    with torch.inference_mode():
        for picture in demo_images[:2]["image"]:
            smoothed.base_classifier.prepare(to_pixels(picture, smoothed.preprocessing), sigma)


def test_all_batches_lie_in_memory_alike(linear, small_images):
    """On a GPU, a convolution of another memory order rounds differently: it looked like rows that depend on each other."""
    strides = set()

    def classify(pixels):
        strides.add(pixels.stride()[1:])
        return linear(pixels)

    image = small_images[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as pictures are decoded
    assert not image.is_contiguous()
    SmoothedClassifier(classify, GaussianNoise(0.5)).certify([image, small_images[1]], max_draws=40)
    assert strides == {small_images[1].stride()}


def test_classifiers_that_do_not_look_at_their_rows_pass(small_images):
    """Constant logits, large ones that hardly differ, and pixels of one class."""
    certify(lambda pixels: torch.tensor([[0.0, 1.0]]).expand(len(pixels), 2), small_images)
    certify(lambda pixels: 1e4 + pixels.flatten(1)[:, :2], small_images)
    certify(Network(nn.InstanceNorm2d(8)), small_images)


def test_the_check_of_a_model_names_it_too(small_images):
    smoothed = SmoothedClassifier.from_pretrained(SHIPPED_MODEL, GaussianNoise(0.25), batch_size=8)
    classifier = smoothed.base_classifier.classifier
    smoothed.base_classifier.classifier = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), classifier)
    found = check_model(smoothed, sigmas=(0.0, 0.25), count=2, draws=1)
    (fault,) = [fault for fault in found.all_faults if fault.kind == "rows"]
    assert "layer '0' (BatchNorm2d without running statistics)" in fault.cause
