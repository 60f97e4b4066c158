"""Training a classifier on a mixture of clean and noisy images (arXiv 2312.09020)."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from ..core.preprocessing import Preprocessing
from ..data.labelled_images import LabelledImages
from ..utils.files import write_json
from ..utils.provenance import command_line, package_versions
from .evaluation import EvaluationSettings, create_evaluation
from .losses import consistency_loss
from .pretrained_classifiers import average_with_base, create_image_processor
from .training_images import ImageSettings, TrainingBatches
from .training_loop import TrainingLoop, TrainingSettings


def train_classifier(
    model: Any,
    images: LabelledImages,
    image_settings: ImageSettings,
    settings: TrainingSettings,
    evaluation: EvaluationSettings,
    accelerator: Accelerator,
    base: str | None = None,
    processor: Any = None,
    base_share: float = 0.0,
) -> dict[str, Any]:
    """
    Train a model on images with noise of a random level each. Saves the model and its image processor to
    `settings.output_dir`, and the results to `results/training.json` in it.

    The model has the classes of the dataset. `base` is the pretrained model, if any: the record of its training becomes part
    of the results. The normalization of `processor`, by default that of a mixed-noise ViT, is applied after the noise.
    `base_share` is the share of the weights from before the training in the saved ones, see [`average_with_base`].

    Returns:
        The content of `results/training.json`.

    Raises:
        ValueError: see [`TrainingLoop`] and [`TrainingBatches`].
    """
    processor = processor or create_image_processor(model.config.image_size)
    preprocessing = Preprocessing.from_image_processor(processor)
    height, width = preprocessing.picture_to_pixels(Image.new("RGB", (64, 64))).shape[1:]
    if height != width:
        raise ValueError(f"The model takes {height}x{width} pixels: training needs square images.")
    class_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    batches = TrainingBatches(
        images.bind(class_names, preprocessing),
        image_settings,
        width,
        settings.per_device_train_batch_size,
        seed=settings.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        show_progress=accelerator.is_main_process,
    )
    settings = replace(settings, per_device_train_batch_size=batches.batch_size)
    config = model.config.to_dict()
    evaluate = create_evaluation(evaluation, image_settings, class_names, preprocessing, accelerator)
    loop = TrainingLoop(
        model,
        batches,
        create_loss(image_settings, settings.per_device_train_batch_size, len(class_names), preprocessing),
        settings,
        accelerator,
        processor=processor,
        fixed_settings={
            **asdict(image_settings),
            **asdict(evaluation),
            "dataset_fingerprint": images.fingerprint,
            "config": {name: value for name, value in config.items() if name != "transformers_version"},
            "frozen": sorted(name for name, parameter in model.named_parameters() if not parameter.requires_grad),
            "base": base,
            "base_share": base_share,
        },
        evaluate=evaluate,
        finish=_keep_base(model, base_share) if base_share else None,
    )
    results = {
        "command": command_line(),
        "settings": {**asdict(settings), **asdict(image_settings), **asdict(evaluation), "base_share": base_share},
        **loop.run(),
        "num_images": images.total,
        "num_eval_images": None if evaluate is None else evaluate.num_images,
        "base": Path(base).name if base and Path(base).exists() else base,
        "versions": package_versions("accelerate", "datasets"),
        **_read_earlier_training(base),
    }
    if accelerator.is_main_process:
        results_dir = Path(settings.output_dir) / "results"
        results_dir.mkdir(exist_ok=True)
        write_json(results, results_dir / "training.json")
    return results


def _keep_base(model: Any, base_share: float) -> Callable[[Any], Any]:
    """[`average_with_base`] with the present weights of a model."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return partial(average_with_base, base_weights=weights, base_share=base_share)


def create_loss(
    image_settings: ImageSettings, batch_size: int, num_labels: int, preprocessing: Preprocessing
) -> Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss of a batch of pixels (uint8) and labels: mixing first, noise after it, then cross-entropy and consistency."""
    mixture, mixing = image_settings.mixture(), image_settings.mixing(num_labels)
    if mixing is not None and batch_size % 2:
        raise ValueError(f"per_device_train_batch_size={batch_size} must be even: mixup and cutmix pair images.")
    weight = image_settings.consistency_weight
    copies = 2 if weight else 1

    def compute_loss(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        pixels, smoothing = pixels.float() / 255, image_settings.label_smoothing
        if mixing is not None:
            (pixels, labels), smoothing = mixing(pixels, labels), 0.0  # mixing smooths the labels itself
        # noise comes last: mixing would change its level
        logits = model(preprocessing.normalize(mixture.add_to(pixels, copies))).logits
        loss = nn.functional.cross_entropy(logits, torch.cat([labels] * copies), label_smoothing=smoothing)
        return loss + consistency_loss(logits.unflatten(0, (copies, -1)), weight) if weight else loss

    return compute_loss


def _read_earlier_training(base: str | None) -> dict[str, Any]:
    """The results of the base model's own training, under `continues`; empty if there are none."""
    path = Path(base or "") / "results" / "training.json"
    if base is None or not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    # a file of this name may have another origin
    return {"continues": earlier} if {"command", "parameters", "steps"} <= earlier.keys() else {}
