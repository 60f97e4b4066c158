"""Evaluating a classifier during its training: the accuracy of a majority of noisy copies, at each noise level."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.hf_argparser import HfArg

from ..core.preprocessing import Preprocessing
from ..core.validation import check_count
from .training_images import ImageSettings
from .training_log import MAJORITY_ACCURACY


@dataclass
class EvaluationSettings:
    """
    How a model is evaluated after each epoch: the share of images whose label is the majority answer to a few noisy copies.
    These are rough estimates, not certificates.
    """

    eval_split: str | None = HfArg(default=None, help="split to evaluate on after each epoch (default: no evaluation)")
    eval_samples: int = HfArg(
        default=300, help="images to evaluate on, or all of a smaller split; always the same ones"
    )
    eval_draws: int = HfArg(default=5, help="noisy copies per image; their majority answer counts")
    eval_sigmas: list[float] = HfArg(default_factory=lambda: [0.0, 0.25, 0.5, 1.0], help="noise levels of the copies")

    def __post_init__(self) -> None:
        check_count("eval_samples", self.eval_samples)
        check_count("eval_draws", self.eval_draws)
        if not self.eval_sigmas or min(self.eval_sigmas) < 0:
            raise ValueError(f"eval_sigmas={self.eval_sigmas} must be noise levels, 0 or above.")


@torch.no_grad()
def predict_majority(
    model: Any, pixels: torch.Tensor, sigma: float, *, draws: int, batch_size: int = 128, seed: int = 0
) -> torch.Tensor:
    """
    The majority answer to a few noisy copies of each image: an estimate of the smoothed prediction, without guarantee.

    Args:
        model: maps pixels in `[0, 1]` to an output with `logits`.
        pixels: `(images, channels, height, width)` in `[0, 1]`, on the model's device.
        sigma: noise level; 0 takes one clean pass.
        draws: noisy copies per image. A tie goes to the class with the lowest index.
        batch_size: copies per forward pass.
        seed: seed of the noise.

    Returns:
        Class indices `(images,)`.
    """
    generator = torch.Generator(pixels.device).manual_seed(seed)
    votes = []
    for _ in range(draws if sigma > 0 else 1):
        logits = torch.cat(
            [
                model(batch + sigma * torch.randn(batch.shape, generator=generator, device=batch.device)).logits
                for batch in pixels.split(batch_size)
            ]
        )
        votes.append(nn.functional.one_hot(logits.argmax(1), logits.shape[1]))
    return torch.stack(votes).sum(0).argmax(1)


@dataclass(frozen=True)
class Evaluation:
    """
    Computes a model's accuracy at each noise level; each process evaluates its share of the images.

    Attributes:
        settings: how to evaluate.
        preprocessing: the model's.
        accelerator: of all processes.
        pixels, labels: the images of this process.
        num_images: number of images of all processes, which the split may limit.
    """

    settings: EvaluationSettings
    preprocessing: Preprocessing
    accelerator: Accelerator
    pixels: torch.Tensor
    labels: torch.Tensor
    num_images: int

    def __call__(self, model: Any) -> dict[str, float]:
        def classify(pixels: torch.Tensor) -> Any:
            return model(self.preprocessing.normalize(pixels))

        accuracies, seed = {}, self.accelerator.process_index
        for sigma in self.settings.eval_sigmas:
            predictions = predict_majority(classify, self.pixels, sigma, draws=self.settings.eval_draws, seed=seed)
            correct = self.accelerator.reduce((predictions == self.labels).sum(), "sum")
            accuracies[f"{MAJORITY_ACCURACY}{sigma:g}"] = float(correct) / self.num_images
        return accuracies


def create_evaluation(
    evaluation: EvaluationSettings,
    image_settings: ImageSettings,
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    accelerator: Accelerator,
) -> Evaluation | None:
    """
    Load the images to evaluate a model on; `None` without a split to evaluate on.

    Raises:
        ValueError: for a split that is not there, or fewer images than processes.
    """
    if evaluation.eval_split is None:
        return None
    if Path(image_settings.dataset_name).is_file() and evaluation.eval_split != image_settings.train_split:
        raise ValueError(
            f"{image_settings.dataset_name} is one file, which has no split {evaluation.eval_split!r} beside "
            f"{image_settings.train_split!r}: name a folder with a file for each, or that split itself."
        )
    images = image_settings.open(evaluation.eval_split, evaluation.eval_samples)
    examples = list(images.bind(class_names, preprocessing))
    share = examples[accelerator.process_index :: accelerator.num_processes]
    if not share:
        raise ValueError(f"eval_samples={len(examples)} are fewer than the {accelerator.num_processes} processes.")
    pixels = torch.stack([image for image, _ in share]).to(accelerator.device)
    labels = torch.tensor([label for _, label in share]).to(accelerator.device)
    return Evaluation(evaluation, preprocessing, accelerator, pixels, labels, len(examples))
