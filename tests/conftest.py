"""Shared fixtures. Nothing here needs a network; everything is built on the spot or ships with the repository."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from transformers import ViTImageProcessor

from hf_smoothing import GaussianNoise, MixedNoiseViTConfig, MixedNoiseViTForImageClassification, load_demo_images
from hf_smoothing.runs.dataset_run import RunSettings, certify_dataset
from hf_smoothing.utils.processes import start_processes

ROOT = Path(__file__).parent.parent
SHIPPED_MODEL = ROOT / "model_cards" / "mixed-noise-vit-nano-cifar10"


class LinearClassifier:
    """Two classes, separated by a hyperplane: its smoothed prediction and certified radius are known in closed form."""

    def __init__(self, direction: torch.Tensor, offset: float = 0.0):
        self.direction = direction
        self.offset = offset

    def margin(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.direction + self.offset

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        margin = self.margin(images)
        return torch.stack([-margin, margin], 1)

    def exact_radius(self, images: torch.Tensor) -> torch.Tensor:
        """Distance to the hyperplane, whatever sigma: Cohen et al. 2019, proposition 4."""
        return self.margin(images).abs() / self.direction.norm()


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory) -> None:
    """What the tests load with `load_dataset` is of no use to anybody later."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)  # of the processes that they start


@pytest.fixture
def linear() -> LinearClassifier:
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(3 * 4 * 4, generator=generator)
    return LinearClassifier(direction / direction.norm(), -float(direction.sum() / direction.norm()) / 2)


@pytest.fixture
def small_images() -> torch.Tensor:
    return torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def noise() -> GaussianNoise:
    return GaussianNoise(0.25)


@pytest.fixture(scope="session")
def demo_images():
    return load_demo_images()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A model folder as on the Hub: random weights, three classes, 8x8 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = MixedNoiseViTConfig(
        image_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label={0: "cat", 1: "dog", 2: "frog"},
        label2id={"cat": 0, "dog": 1, "frog": 2},
    )
    MixedNoiseViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False).save_pretrained(folder)
    return folder


NAMES = [
    "truck",
    "Ship",
    "horse",
    "frog",
    "dog",
    "deer",
    "cat",
    "bird",
    "automobile",
    "airplane",
]  # not the dataset's order


def save_model(folder, names):
    torch.manual_seed(0)
    config = MixedNoiseViTConfig(
        image_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = MixedNoiseViTForImageClassification(config)
    # a head that tells dark from bright pictures, so that some are certified and others not
    light = torch.rand(512, 1, 1, 1)
    features = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        model.eval()(light + 0.25 * torch.randn(512, 3, 8, 8))
        targets = torch.nn.functional.one_hot((light.flatten() * 3).long().clamp(max=len(names) - 1), len(names))
        inputs = torch.cat([features[0], torch.ones(512, 1)], 1)
        solution = torch.linalg.lstsq(inputs, targets.float(), driver="gelsd").solution
        model.classifier.weight.copy_(solution[:-1].T)
        model.classifier.bias.copy_(solution[-1])
    hook.remove()
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("ten"), NAMES)


@pytest.fixture(scope="session")
def parquet(demo_images, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    demo_images.to_parquet(path)
    return str(path)


@pytest.fixture
def certify(model, parquet, tmp_path):
    def call(output_dir=tmp_path / "run", batch_size=64, streaming=False, resume=True, **settings):
        settings = {
            "model_name_or_path": model,
            "dataset_name": parquet,
            "sigmas": (0.25,),
            "max_draws": 60,
            **settings,
        }
        return certify_dataset(
            RunSettings(**settings),
            output_dir,
            accelerator=start_processes(),
            batch_size=batch_size,
            streaming=streaming,
            resume=resume,
        )

    return call


def rows(folder):
    """What a run found, without the time it took."""
    return [{**row, "seconds": None} for row in pq.read_table(Path(folder) / "certificates.parquet").to_pylist()]
