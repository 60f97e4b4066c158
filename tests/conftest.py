"""Shared fixtures. Nothing here needs a network; everything is built on the spot or ships with the repository.

Fixtures of a session or module are made once in each worker, and no test changes what they return.
"""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import pytest
import torch
from helpers.models import NAMES, LinearClassifier, save_model, save_with_processor, tiny_model
from helpers.process_server import ProcessServer

from hf_smoothing import GaussianNoise, load_demo_images
from hf_smoothing.runs.dataset_run import RunSettings, certify_dataset
from hf_smoothing.utils.processes import start_processes


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory) -> Path:
    """A cache for what the tests load with `load_dataset`: nobody needs it later."""
    folder = tmp_path_factory.mktemp("datasets")
    datasets.config.HF_DATASETS_CACHE = folder
    # seconds to wait for the threads of a stream; those of tiny files end at once
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.5
    os.environ["HF_DATASETS_CACHE"] = str(folder)  # of the processes that tests start
    return folder


@pytest.fixture(autouse=True)
def torch_seed() -> None:
    """Random tensors do not depend on the tests before; pytest-randomly seeds `random` and numpy."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def processes(datasets_cache) -> Iterator[ProcessServer]:
    """Starts real processes that have torch, transformers and the package imported: see `helpers/process_server.py`."""
    server = ProcessServer()
    yield server
    server.close()


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
    save_with_processor(tiny_model(["cat", "dog", "frog"]), folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A model folder for the demo images: ten classes, 8x8 pixels, tells dark from bright."""
    return save_model(tmp_path_factory.mktemp("ten"), NAMES)


@pytest.fixture(scope="session")
def parquet(demo_images, tmp_path_factory) -> str:
    """The demo images as a Parquet file."""
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    demo_images.to_parquet(path)
    return str(path)


@pytest.fixture
def certify(model, parquet, tmp_path):
    """A function that runs `certify_dataset` with small settings, and the same seed each time."""

    def call(output_dir=tmp_path / "run", batch_size=64, streaming=False, resume=True, **settings):
        settings = {
            "model_name_or_path": model,
            "dataset_name": parquet,
            "sigmas": (0.25,),
            "max_draws": 60,
            "seed": 0,
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
