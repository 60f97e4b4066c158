"""The doctor: in a sound classifier it finds nothing; each planted fault it names, and no other."""

import pytest
import torch
from helpers.paths import SHIPPED_MODEL
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import AutoModelForImageClassification, ConvNextImageProcessor, ViTImageProcessor
from typer.testing import CliRunner

from hf_smoothing import GaussianNoise, SmoothedClassifier, load_demo_images
from hf_smoothing.cli.app import app
from hf_smoothing.core.preprocessing import to_pixels
from hf_smoothing.data.labelled_images import LabelledImages
from hf_smoothing.diagnostics.model_check import check_model

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
SMALL = {"sigmas": (0.0, 0.12, 0.25), "count": 60, "draws": 2}


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageClassification.from_pretrained(SHIPPED_MODEL).eval()


@pytest.fixture(scope="module")
def names(model):
    return [model.config.id2label[index] for index in range(10)]


class Wrapped(nn.Module):
    """The shipped model, with a fault planted before it."""

    def __init__(self, model, change=None, after=None):
        super().__init__()
        self.model, self.change, self.after = model, change, after

    def forward(self, pixels):
        pixels = pixels if self.change is None else self.change(pixels)
        logits = self.model(pixels).logits
        return logits if self.after is None else self.after(logits)


class Offset(nn.Module):
    """Adds a little of what the other rows have."""

    def forward(self, logits):
        return logits + 0.2 * logits.mean(0)


class Roll(nn.Module):
    """Takes the classes in another order."""

    def forward(self, logits):
        return logits.roll(3, 1)


def fails_in_much_noise(pixels):
    return torch.where(pixels.amin() < -0.6, torch.nan, pixels)


def demo_pixels():
    return [to_pixels(pil_to_tensor(picture.convert("RGB"))) for picture in load_demo_images()["image"]]


def half(logits):
    """As a layer in float16 would: beyond 65,504 it is infinite."""
    return (logits * 1e5).half().float()


def kinds(found):
    return [fault.kind for fault in found.all_faults]


def batch_norm(channels):
    return nn.BatchNorm2d(channels).eval()


def loses_predictions(pixels):
    """What no noise has changed; otherwise something that depends on the noise."""
    steps = (pixels * 255).round() / 255
    whole = ((pixels - steps).abs().amax((1, 2, 3), keepdim=True) < 1e-6).float()
    return whole * pixels + (1 - whole) * (100 * pixels).sin().abs()


PLANTED = [
    ("normalization", {"change": lambda pixels: pixels * STD + MEAN}, {}),
    ("normalization", {"change": lambda pixels: (pixels + 1) / 2}, {}),
    ("0 to 255", {"change": lambda pixels: pixels / 255}, {}),
    (
        "channel order",
        {"change": lambda pixels: pixels.flip(1)},
        {"count": 200},  # the model minds it less than other faults
    ),
    ("batch statistics", {"change": batch_norm(3)}, {}),
    ("units of sigma", {}, {"sigma": 4.0}),
    ("too few draws", {}, {"n": 9}),
    ("radius out of reach", {}, {"n": 100, "sigma": 0.25, "radii": [0.2, 0.75]}),
    ("guesses", {"after": lambda logits: logits.roll(3, 1)}, {}),
    ("guesses", {"after": lambda logits: torch.zeros_like(logits)}, {}),
    ("rows", {"after": Offset()}, {}),
    ("randomness", {"after": lambda logits: logits + torch.randn_like(logits)}, {}),
    ("not finite", {"after": half}, {}),
    ("no logits", {"after": lambda logits: logits.argmax(1)}, {}),
    ("no logits", {"change": lambda pixels: pixels[:, :, :28, :28]}, {}),
    ("noise", {"change": loses_predictions}, {}),
]


def test_nothing_is_found_in_the_shipped_model(model, names):
    found = check_model(Wrapped(model), class_names=names, sigma=0.25, radii=[0.5], **SMALL)
    assert kinds(found) == []
    assert found.verdict() == "It keeps its predictions up to sigma 0.25: worth smoothing there."


@pytest.mark.parametrize(
    ("kind", "parts", "settings"), PLANTED, ids=[f"{n}-{row[0]}" for n, row in enumerate(PLANTED)]
)
def test_a_planted_fault_is_named_and_no_other(model, names, kind, parts, settings):
    found = check_model(Wrapped(model, **parts), class_names=names, **{**SMALL, **settings})
    assert kinds(found) == [kind]
    (fault,) = found.all_faults
    assert len(fault.cause.splitlines()) == len(fault.fix.splitlines()) == 1
    assert fault.cause.strip()
    assert fault.fix.strip()


def normalize(pixels):
    return pixels * STD + MEAN


def of_caffe(pixels):
    """As models of Caffe expect them: from 0 to 255, blue first."""
    return pixels.flip(1) / 255


ROWS, INPUT, GUESSES = "whether rows depend on each other", "which pixels it expects", "whether it guesses"
NOISE = "whether it keeps its predictions under noise"
SEVERAL = [
    (["normalization", "rows"], {"change": normalize, "after": Offset()}, {}, [GUESSES, NOISE]),
    (
        ["rows", "guesses"],
        {"after": nn.Sequential(Roll(), Offset())},
        {},
        [f"{NOISE} from sigma 0.12 on"],
    ),
    (
        ["too few draws", "batch statistics", "randomness", "guesses"],
        {"change": batch_norm(3), "after": lambda logits: logits.roll(3, 1) + torch.randn_like(logits)},
        {"n": 9},
        [ROWS, f"{NOISE} from sigma 0.12 on"],
    ),
    (["0 to 255", "channel order"], {"change": of_caffe}, {"count": 200}, [GUESSES, NOISE]),
    (["too few draws", "not finite"], {"after": half}, {"n": 9}, [ROWS, INPUT, GUESSES, NOISE]),
    (["noisy copies"], {"change": lambda pixels: pixels.sqrt().square()}, {}, [f"{NOISE} from sigma 0.12 on"]),
    (
        ["noisy copies", "guesses"],
        {"change": lambda pixels: pixels.sqrt(), "after": lambda logits: 0 * logits},
        {},
        [f"{NOISE} from sigma 0.12 on"],
    ),
    (["noisy copies"], {"change": fails_in_much_noise}, {}, [f"{NOISE} from sigma 0.25 on"]),
]


@pytest.mark.parametrize(("wanted", "parts", "settings", "not_judged"), SEVERAL, ids=[str(row[0]) for row in SEVERAL])
def test_faults_beside_others_are_named_too(model, names, wanted, parts, settings, not_judged):
    found = check_model(Wrapped(model, **parts), class_names=names, **{**SMALL, **settings})
    assert kinds(found) == wanted
    assert found.not_judged == not_judged
    said = " ".join(found.advice())
    assert all(name in said for name in ("Not judged because of that: ", *not_judged))
    assert found.verdict() is None or not_judged == [f"{NOISE} from sigma 0.25 on"]


def test_one_picture_without_finite_logits_is_enough(model, names):
    """The brightest of them, not the first two."""
    brightest = max(float(pixels.mean()) for pixels in demo_pixels())

    def after_brightness(pixels):
        return torch.where(pixels.mean((1, 2, 3), keepdim=True) > brightest - 1e-4, torch.nan, pixels)

    assert kinds(check_model(Wrapped(model, after_brightness), class_names=names, **{**SMALL, "count": 200})) == [
        "not finite"
    ]


def test_a_callable_that_fails_may_have_pictures_that_are_too_large(tmp_path):
    large = load_demo_images().map(lambda row: {"image": row["image"].resize((96, 96))}, keep_in_memory=True)
    large.to_parquet(tmp_path / "large.parquet")
    images = LabelledImages(str(tmp_path / "large.parquet"))
    found = check_model(lambda pixels: pixels.mean((1, 2, 3)), images, image_size=32, **SMALL)
    assert kinds(found) == ["resized", "no logits"]


def test_a_model_in_float16_overflows(names):
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1000.0, dtype=torch.float16))

        def forward(self, pixels):
            return self.scale * self.scale * pixels.flatten(1)[:, :10]

    found = check_model(Large(), class_names=names, **SMALL)
    assert kinds(found) == ["overflow"]
    assert "use bfloat16 or float32" in found.all_faults[0].fix


def smooth(model, processor):
    names = [model.config.id2label[index] for index in range(10)]
    return SmoothedClassifier(model, GaussianNoise(0.25), image_processor=processor, class_names=names, batch_size=32)


def test_a_processor_may_normalize_what_the_model_normalizes(model):
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.1] * 3)
    assert kinds(check_model(smooth(model, processor), sigmas=(0.0, 0.25), count=200, draws=1)) == ["normalized twice"]


def test_a_picture_may_be_made_much_smaller_before_the_noise(model, tmp_path):
    large = load_demo_images().map(lambda row: {"image": row["image"].resize((96, 96))}, keep_in_memory=True)
    large.to_parquet(tmp_path / "large.parquet")
    images = LabelledImages(str(tmp_path / "large.parquet"))
    processor = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0, do_normalize=False)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False)
    found = check_model(smooth(model, processor), images, **SMALL)
    assert kinds(found) == ["resized"]
    assert "96x96, are resized to 32x32" in found.all_faults[0].cause
    # a callable is asked about pictures of the size that it takes
    assert kinds(check_model(Wrapped(model), images, image_size=32, **SMALL)) == ["resized"]


MODULE = """
import torch

def classify(pixels):
    return torch.stack([pixels.mean((1, 2, 3)), torch.full((len(pixels),), 0.45)], 1)

def fails(pixels):
    raise RuntimeError("no such thing")

number = 5
"""


def test_a_python_callable_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted_module.py").write_text(MODULE)

    def check(*arguments):
        return CliRunner().invoke(app, ["check", *map(str, arguments)])

    done = check("planted_module:classify", "--images", 8, "--n", 5, "--sigma", 0.25, "--radii", 0.25, 0.5)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "1. Everything abstains: 5 draws prove nothing at alpha = 0.001" in said
    assert "Fix: Take 10 draws or more" in said
    assert "It keeps its predictions up to sigma" in said
    failed = " ".join(check("planted_module:fails", "--n", 5).output.split())
    assert "1. Everything abstains" in failed
    assert "2. It fails on a batch of 3x32x32 pixels: no such thing" in failed
    assert "Not judged because of that: whether rows depend on each other, which pixels it expects, whether" in failed
    for name, problem in (("nothing", "has no attribute 'nothing'"), ("number", "is a int, and no callable")):
        refused = check(f"planted_module:{name}")
        assert refused.exit_code == 2
        assert problem in " ".join(refused.stderr.split())
