"""Training a count head on the measured class counts of a run (arXiv 2402.07498)."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoImageProcessor
from transformers.hf_argparser import HfArg

from ..core.configuration_mixed_noise_vit import MixedNoiseViTConfig
from ..core.modeling_count_prediction import (
    FREQUENCY_LOSSES,
    LOGISTIC_NORMAL_DRAWS,
    LOSSES,
    PROBIT_DRAWS,
    MixedNoiseViTForCountPrediction,
)
from ..core.preprocessing import Preprocessing
from ..core.progress_bar import open_bar
from ..core.weights import check_loaded_weights, loading
from ..training.training_loop import TrainingLoop, TrainingSettings
from ..utils.files import write_json
from ..utils.provenance import command_line, package_versions
from .count_batches import CountBatches, group_counts_by_image, read_pixels
from .measured_counts import MeasuredCounts


@dataclass
class CountHeadSettings:
    """
    Which count head is trained, and on which loss.

    Raises:
        ValueError: for a setting out of range.
    """

    model_name_or_path: str = HfArg(help="mixed-noise ViT that gives the head its encoder and classifier")
    loss: str = HfArg(
        default="jensen_shannon", help=f"{', '.join(LOSSES)}; probit suits many draws per image, the last suits a few"
    )
    own_backbone: bool = HfArg(default=False, help="also train encoder and classifier, instead of the head alone")
    hflip: float = HfArg(
        default=0.5, help="with own_backbone: probability of a horizontal flip; 0 for digits and letters"
    )
    max_shift: int = HfArg(
        default=0,
        help="with own_backbone: shift images by up to so many pixels; 4 suits CIFAR-10, whose classifiers saw it",
    )
    eval_share: float = HfArg(default=0.05, help="share of the images held out, to measure errors after each epoch")

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is unknown: use {', '.join(LOSSES)}.")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip={self.hflip:g} must be a probability, between 0 and 1.")
        if self.max_shift < 0:
            raise ValueError(f"max_shift={self.max_shift} must be a number of pixels, 0 or above.")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share={self.eval_share} must be 0 or above, and below 1.")


def build_count_model(head: CountHeadSettings, counts: MeasuredCounts) -> MixedNoiseViTForCountPrediction:
    """
    Build a model with a new count head, for the noise levels that were counted.

    Args:
        head: names the mixed-noise ViT whose encoder and classifier the model takes. With `own_backbone` the classes may
            differ: the classifier is then reinitialized.
        counts: the training data, of any base classifier.

    Raises:
        ValueError: for a model that cannot be loaded, is no mixed-noise ViT, or has other classes than the counts.
    """
    name, counted_classes = head.model_name_or_path, counts.settings["label_names"]
    with loading(name):
        config = AutoConfig.from_pretrained(name)
        if not isinstance(config, MixedNoiseViTConfig):
            raise ValueError(
                f"{name!r} is a {config.model_type} model; a count head needs a mixed-noise ViT. For the counts of another "
                "classifier, name such a ViT and train its encoder too (own_backbone)."
            )
        class_names = [config.id2label[index] for index in range(config.num_labels)]
        if class_names != counted_classes and not head.own_backbone:
            raise ValueError(
                f"{name!r} has the classes {class_names}, the counts are of {counted_classes}. Train its encoder too "
                "(own_backbone), or name the classifier that was counted."
            )
        model, loading_info = MixedNoiseViTForCountPrediction.from_pretrained(
            name,
            output_loading_info=True,
            dtype=torch.float32,
            count_sigmas=sorted(set(counts.sigmas.tolist())),
            id2label=dict(enumerate(counted_classes)),
            label2id={class_name: index for index, class_name in enumerate(counted_classes)},
            ignore_mismatched_sizes=True,
        )
    check_loaded_weights(name, loading_info, ("classifier", "count_head"))
    if class_names != counted_classes:
        model.classifier = nn.Linear(config.hidden_size, len(counted_classes))
        model._init_weights(model.classifier)
    return model


@torch.no_grad()
def compute_features(
    model: MixedNoiseViTForCountPrediction, pixels: torch.Tensor, batch_size: int = 256
) -> torch.Tensor:
    """The head's input features `(images, features)` of images `(images, channels, height, width)`, uint8."""
    model.eval()
    device = next(model.parameters()).device
    batches = open_bar(pixels.split(batch_size), "computing features", disable=len(pixels) < 10 * batch_size)
    return torch.cat([model.features(batch.to(device).float() / 255).cpu() for batch in batches])


@torch.no_grad()
def compute_prediction_errors(
    model: MixedNoiseViTForCountPrediction, inputs: torch.Tensor, targets: torch.Tensor
) -> dict[str, float]:
    """
    Mean errors of a count head over images and noise levels.

    `inputs` are pixels (uint8) or features, `(images, ...)`; `targets` are `(images, levels, 1 + classes)`: sigma, then the
    counts.

    Returns:
        `jensen_shannon` (nats), `top1_disagreement` (share whose predicted and measured most frequent classes differ), and
        `top_frequency_error` (mean of the predicted minus the measured frequency of the most frequent measured class).
    """
    batches = zip(inputs.split(512), targets.split(512))
    logits = torch.cat([model(**_name_inputs(pixels), sigma=rows[..., 0]).logits for pixels, rows in batches])
    logits = logits.flatten(0, 1)
    counts = targets[..., 1:].flatten(0, 1)
    frequencies = counts / counts.sum(1, keepdim=True)
    top = counts.argmax(1)
    top_errors = logits.softmax(1).gather(1, top[:, None]) - frequencies.gather(1, top[:, None])
    return {
        "jensen_shannon": float(FREQUENCY_LOSSES["jensen_shannon"](logits, frequencies)),
        "top1_disagreement": float((logits.argmax(1) != top).float().mean()),
        "top_frequency_error": float(top_errors.mean()),
    }


def _name_inputs(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"features": batch} if batch.ndim == 2 else {"pixel_values": batch.float() / 255}


def train_count_head(
    model: MixedNoiseViTForCountPrediction,
    counts: MeasuredCounts,
    head: CountHeadSettings,
    settings: TrainingSettings,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """
    Train a count head, from [`build_count_model`], on all images but a held-out share. Saves it and the image processor of
    its base model to `settings.output_dir`, and the results to `results/training.json` in it.

    Without `own_backbone`, encoder and classifier stay as they are, and each image passes the encoder only once. With it,
    flipped images keep the counts of the original: nearly right for classifiers that were trained with flips.

    Returns:
        The content of `results/training.json`.

    Raises:
        ValueError: see [`TrainingLoop`]; for images that cannot be read or were changed since; for counts of too few draws
            for the loss.
    """
    started = time.perf_counter()
    draws = int(counts.counts.sum(1).min())
    least = {"logistic_normal": LOGISTIC_NORMAL_DRAWS[0], "probit": PROBIT_DRAWS}.get(head.loss, 1)
    if draws < least:
        raise ValueError(f"loss={head.loss!r} takes {least} draws per image or more; the counts have {draws}.")
    processor = AutoImageProcessor.from_pretrained(head.model_name_or_path)
    inputs, targets = _read_images(counts, processor, show_progress=accelerator.is_main_process)
    model.to(accelerator.device)
    if not head.own_backbone:
        model.mixed_noise_vit.requires_grad_(False)
        model.classifier.requires_grad_(False)
        inputs = compute_features(model, inputs)
    held_out = np.zeros(len(inputs), bool)
    order = np.random.default_rng(settings.seed).permutation(len(inputs))
    held_out[order[: round(head.eval_share * len(inputs))]] = True
    max_draws = LOGISTIC_NORMAL_DRAWS[-1] if head.loss == "logistic_normal" else None
    processes = (accelerator.process_index, accelerator.num_processes)
    batch_size, seed = settings.per_device_train_batch_size, settings.seed
    batches = CountBatches(inputs[~held_out], targets[~held_out], batch_size, seed, *processes, max_draws)
    preprocessing_seconds = time.perf_counter() - started

    eval_inputs, eval_targets = (tensor[held_out].to(accelerator.device) for tensor in (inputs, targets))

    def evaluate(model: Any) -> dict[str, float]:
        return compute_prediction_errors(model, eval_inputs, eval_targets)

    head_settings = {name: getattr(head, name) for name in ("loss", "own_backbone", "eval_share")}
    augmentation = {"hflip": head.hflip, "max_shift": head.max_shift} if head.own_backbone else {}
    head_settings |= {"base": head.model_name_or_path, **augmentation}
    loop = TrainingLoop(
        model,
        batches,
        _create_loss(head),
        settings,
        accelerator,
        processor=processor,
        fixed_settings={**head_settings, "counts": counts.settings, "images": len(inputs)},
        evaluate=evaluate if held_out.any() else None,
    )
    results = {
        "command": command_line(),
        "settings": {**asdict(settings), **head_settings},
        "counts": {name: counts.settings[name] for name in ("dataset_name", "split", "sigmas", "method", "n", "seed")},
        "images_counted": len(inputs),
        "preparation_seconds": preprocessing_seconds,  # with the pass through a frozen backbone
        **loop.run(),
        "versions": package_versions("accelerate", "datasets"),
    }
    if accelerator.is_main_process:
        results_dir = Path(settings.output_dir) / "results"
        results_dir.mkdir(exist_ok=True)
        write_json(results, results_dir / "training.json")
    return results


def _create_loss(head: CountHeadSettings) -> Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]:
    def compute_loss(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if head.own_backbone and head.hflip:
            flipped = torch.rand(len(inputs), 1, 1, 1, device=inputs.device) < head.hflip
            inputs = torch.where(flipped, inputs.flip(-1), inputs)
        if head.own_backbone and head.max_shift:
            inputs = _shift(inputs, head.max_shift)
        return model(**_name_inputs(inputs), sigma=targets[..., 0], counts=targets[..., 1:], loss=head.loss).loss

    return compute_loss


def _shift(images: torch.Tensor, largest: int) -> torch.Tensor:
    """Images `(batch, channels, height, width)`, each shifted at random by up to `largest` pixels, with a black margin."""
    height, width = images.shape[2:]
    padded = nn.functional.pad(images, [largest] * 4)
    top, left = torch.randint(2 * largest + 1, (2, len(images), 1), device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def _read_images(counts: MeasuredCounts, processor: Any, show_progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (uint8) and targets of the images that were counted."""
    inputs = counts.open_images().bind(counts.settings["label_names"], Preprocessing.from_image_processor(processor))
    indices, targets = group_counts_by_image(counts)
    return read_pixels(inputs, indices, show_progress), targets
