import datasets
import numpy as np
import pytest
import torch
from helpers.paths import SHIPPED_MODEL
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

import hf_smoothing  # noqa: F401 (registers the task)
from hf_smoothing.core import base_classifier, preprocessing

KEYS = {
    "label",
    "radius",
    "sigma",
    "alpha",
    "guarantee",
    "num_samples",
    "method",
    "noise",
    "norm",
    "p_lower",
    "p_upper",
    "prediction",
    "counts",
    "sampling",
}


@pytest.fixture(scope="module")
def certify():
    return pipeline("certified-image-classification", model=str(SHIPPED_MODEL), sigma=0.25, max_draws=200)


@pytest.fixture(scope="module")
def car(demo_images, tmp_path_factory):
    path = tmp_path_factory.mktemp("car") / "car.png"
    demo_images[21]["image"].save(path)
    return str(path)


@pytest.fixture
def tiny(tiny_model_dir):
    return pipeline("certified-image-classification", model=str(tiny_model_dir), sigma=0.25, max_draws=100)


def test_a_path(certify, car):
    result = certify(car, seed=0)
    assert set(result) >= KEYS
    assert result["label"] == "automobile"
    assert 0 < result["radius"] < 1
    assert (result["sigma"], result["alpha"], result["guarantee"], result["norm"]) == (0.25, 0.001, "per_input", "l2")
    assert result["sampling"] == "lattice"
    assert result["num_samples"] > sum(result["counts"])  # selection draws choose the class
    assert result["counts"][result["prediction"]] == max(result["counts"])
    decided = certify(car, radius=0.25, seed=0)
    assert decided["radius"] >= 0.25
    assert decided["num_samples"] == sum(decided["counts"]) + 1  # and one clean pass
    assert decided["num_samples"] < result["num_samples"]


def test_a_list_gives_what_its_images_give_one_by_one(certify, demo_images):
    pictures = list(demo_images["image"][:8])
    together = certify(pictures, radius=0.25, batch_size=64, seed=0)
    assert together == [certify(picture, radius=0.25, seed=0) for picture in pictures]


def test_settings_at_the_call_prevail(tiny):
    image = Image.new("RGB", (8, 8), "teal")
    assert tiny(image)["sigma"] == 0.25
    result = tiny(image, sigma=0.5, alpha=0.01, seed=3, method="fixed", n0=5, n=50)
    assert (result["sigma"], result["alpha"], result["seed"], result["method"]) == (0.5, 0.01, 3, "fixed")
    assert result["num_samples"] == 55
    assert tiny(image)["sigma"] == 0.25


def test_lists_columns_datasets_and_generators_keep_their_order(tiny, demo_images):
    few = demo_images.select(range(5))
    expected = tiny(list(few["image"]), seed=0)
    assert len(expected) == 5
    assert tiny(few["image"], seed=0) == expected
    assert tiny(tuple(few["image"]), seed=0) == expected
    streamed = few.to_iterable_dataset()["image"]
    for images in (KeyDataset(few, "image"), (picture for picture in few["image"]), streamed):
        lazy = tiny(images, seed=0)
        assert not isinstance(lazy, list)
        assert list(lazy) == expected
    assert tiny([]) == []


def test_an_abstention_has_no_label(tiny):
    torch.manual_seed(0)
    for parameter in tiny.model.classifier.parameters():
        parameter.data.zero_()
    tiny.model.classifier.weight.data.normal_(std=100)
    results = [
        tiny(Image.fromarray(np.full((8, 8, 3), value, np.uint8)), sigma=3.0, max_draws=30) for value in (0, 120, 255)
    ]
    for result in results:
        assert (result["label"] is None) == (result["radius"] == 0 and result["p_lower"] == 0)


def test_inputs_that_are_no_images(tiny):
    with pytest.raises(TypeError, match="A Dataset is no image"):
        tiny(datasets.Dataset.from_dict({"image": [1]}))
    with pytest.raises(TypeError, match="not int"):
        tiny([5])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "LA", "1", "CMYK"])
def test_pictures_of_all_kinds_and_sizes(tiny, mode, tmp_path):
    grey = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) * 100
    image = Image.fromarray(grey) if mode == "I;16" else Image.new("RGB", (30, 20), "orange").convert(mode)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path)
    assert tiny(str(path))["num_samples"] > 1


def test_a_broken_picture_is_refused_before_any_work(tiny, tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_text("no picture")
    forwards = []
    monkeypatch.setattr(tiny.model, "forward", lambda *args, **kwargs: forwards.append(args))
    with pytest.raises(ValueError, match=r"broken\.png' is not a picture"):
        tiny([Image.new("RGB", (8, 8)), str(tmp_path / "broken.png")])
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        tiny([Image.new("RGB", (8, 8)), "gone.png"])
    assert not forwards


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sigma": 0}, ValueError, "sigma=0 must be"),
        ({"sigma": -0.25}, ValueError, r"sigma=-0\.25"),
        ({"sigma": float("nan")}, ValueError, "sigma=nan"),
        ({"alpha": 0}, ValueError, "alpha=0"),
        ({"alpha": 1}, ValueError, "alpha=1"),
        ({"radius": 0.75, "max_draws": 100}, ValueError, r"max_draws=100 .* at least [\d,]+ draws"),
        ({"method": "fixed", "radius": 0.75, "n0": 9, "n": 50}, ValueError, r"n=50 .* at least [\d,]+ draws"),
        ({"method": "surely"}, ValueError, "method='surely'"),
        ({"top_k": 3}, TypeError, "'top_k' is no setting"),
    ],
)
def test_invalid_settings_are_refused_before_any_work(tiny, settings, error, message, monkeypatch):
    forwards = []
    monkeypatch.setattr(tiny.model, "forward", lambda *args, **kwargs: forwards.append(args))
    with pytest.raises(error, match=message):
        tiny(Image.new("RGB", (8, 8)), **settings)
    assert not forwards


def test_sigma_has_no_default_and_is_checked_at_construction(tiny_model_dir):
    with pytest.raises(ValueError, match="sigma is missing"):
        pipeline("certified-image-classification", model=str(tiny_model_dir))(Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="sigma=-1"):
        pipeline("certified-image-classification", model=str(tiny_model_dir), sigma=-1)


def test_a_model_with_nan_weights(tiny_model_dir, tmp_path):
    for file in tiny_model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    broken = pipeline("certified-image-classification", model=str(tmp_path), sigma=0.25)
    with pytest.raises(ValueError, match=r"classifier\.bias' are not all finite"):
        broken(Image.new("RGB", (8, 8)))


def count_calls(monkeypatch, module, name):
    calls, function = [], getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_each_image_is_loaded_once_and_the_model_is_checked_once_for_all_calls(tiny, monkeypatch):
    loads = count_calls(monkeypatch, preprocessing, "load_image")
    scans = count_calls(monkeypatch, base_classifier, "check_weights")
    probes = count_calls(monkeypatch, preprocessing, "_check_against_processor")
    picture = Image.new("RGB", (8, 8), "teal")
    tiny([picture, picture])
    list(tiny(picture for _ in range(3)))
    tiny(picture, sigma=0.5, method="fixed", n0=5, n=50)
    assert (len(loads), len(scans), len(probes)) == (6, 1, 1)
    tiny(picture, noise_resolution="native")  # another classifier: it resizes after the noise
    tiny(picture, sigma=0.5, noise_resolution="native")
    tiny(picture)
    assert (len(scans), len(probes)) == (2, 2)
