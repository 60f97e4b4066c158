"""Training a count head on the measured class counts of a run (arXiv 2402.07498)."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import AutoImageProcessor

from .labelled_images import LabelledImages
from .modeling_count_prediction import MixedNoiseViTForCountPrediction
from .training import TrainingSettings, train
from .training_images import Batch


@dataclass(frozen=True)
class Counts:
    """
    Measured class counts, one row an image and noise level.

    Attributes:
        indices: `(rows,)`, of the image in its split.
        sigmas: `(rows,)`, in `[0, 1]` pixels.
        counts: `(rows, classes)`.
        settings: of the run that they come from.
    """

    indices: np.ndarray
    sigmas: np.ndarray
    counts: np.ndarray
    settings: dict[str, Any]

    def open(self) -> LabelledImages:
        """
        The images that were counted.

        Raises:
            ValueError: where they are no longer those.
        """
        settings = self.settings
        images = LabelledImages(
            settings["dataset_name"],
            config_name=settings["dataset_config_name"],
            split=settings["split"],
            image_column=settings["image_column"],
            label_column=settings["label_column"],
        )
        if settings["dataset_fingerprint"] not in (None, images.fingerprint):
            raise ValueError(
                f"{settings['dataset_name']!r} is not what was counted: its files were changed, copied or touched since."
            )
        return images


def read_counts(run_dir: Path) -> Counts:
    """
    The counts of a finished run, from `certify-dataset --method counts`.

    Args:
        run_dir: its folder.

    Raises:
        ValueError: for a run that is not finished, or of a method that stops early: its counts are biased.
    """
    if not (run_dir / "certificates.parquet").is_file():
        raise ValueError(f"{run_dir} holds no finished run: certify-dataset --method counts makes one.")
    settings = json.loads((run_dir / "run.json").read_text())["settings"]
    if settings["method"] not in ("counts", "fixed"):
        raise ValueError(
            f"{run_dir} is of method {settings['method']!r}, which stops when it has seen enough: its counts are biased. Use "
            "--method counts."
        )
    rows = pq.read_table(run_dir / "certificates.parquet", columns=["index", "sigma", "counts", "error"]).to_pylist()
    rows = [row for row in rows if row["error"] is None]
    if not rows:
        raise ValueError(f"{run_dir} holds no counts: all of its images failed.")
    return Counts(
        np.array([row["index"] for row in rows]),
        np.array([row["sigma"] for row in rows]),
        np.array([row["counts"] for row in rows]),
        settings,
    )


class CountBatches:
    """
    Batches of one process, of inputs and targets; order depends on seed and epoch alone.

    Args:
        inputs: `(images, ...)`, one for each image: pixels (uint8) or features.
        rows: `(rows,)`, which of them each row is about.
        targets: `(rows, 1 + classes)`: sigma, and the counts.
        batch_size: rows in a batch.
        seed: of the order.
        process_index, num_processes: this process, and how many there are.
    """

    def __init__(
        self,
        inputs: torch.Tensor,
        rows: np.ndarray,
        targets: torch.Tensor,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.inputs, self.rows, self.targets, self.seed = inputs, rows, targets, seed
        self.batch_size, self.total = batch_size, len(rows)
        self.process_index, self.num_processes = process_index, num_processes
        if not len(self):
            raise ValueError(f"{self.total} counts do not fill a batch of {batch_size} on {num_processes} processes.")

    def __len__(self) -> int:
        return self.total // (self.batch_size * self.num_processes)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng([self.seed, number]).permutation(self.total)
        order = order[: len(self) * self.num_processes * self.batch_size]
        for chosen in order.reshape(len(self), self.num_processes, self.batch_size)[first:, self.process_index]:
            yield self.inputs[self.rows[chosen]], self.targets[chosen]


@torch.no_grad()
def features_of(model: MixedNoiseViTForCountPrediction, pixels: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """What the encoder makes of images `(images, channels, height, width)`, uint8: `(images, hidden_size)`."""
    model.eval()
    device = next(model.parameters()).device
    batches = tqdm(pixels.split(batch_size), "features", disable=len(pixels) < 10 * batch_size)
    found = [model.mixed_noise_vit(batch.to(device).float() / 255).pooler_output.cpu() for batch in batches]
    return torch.cat(found)
