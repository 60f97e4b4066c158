"""The images that ship with the package."""

from importlib.resources import files

import datasets
import pyarrow.parquet as pq


def load_demo_images() -> datasets.Dataset:
    """
    200 test images of CIFAR-10, 20 of each class, lossless: columns `image` and `label` (with class names).
    """
    path = files("hf_smoothing").joinpath("data", "cifar10_demo.parquet")
    with path.open("rb") as file:
        return datasets.Dataset(pq.read_table(file))
