"""The images that ship with the package."""

from pathlib import Path

import datasets
import pyarrow.parquet as pq

DEMO_IMAGES = Path(__file__).parent / "cifar10_demo.parquet"


def load_demo_images() -> datasets.Dataset:
    """200 test images of CIFAR-10, 20 of each class, lossless: columns `image` and `label` (with class names)."""
    with DEMO_IMAGES.open("rb") as file:
        return datasets.Dataset(pq.read_table(file))
