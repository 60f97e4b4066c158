"""Training a mixed-noise ViT as a classifier on a mixture of clean and noisy images (arXiv 2312.09020)."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, ViTImageProcessor
from transformers.hf_argparser import HfArg

from .certificates import check_count
from .configuration_mixed_noise_vit import MixedNoiseViTConfig
from .labelled_images import LabelledImages
from .loading import loading
from .modeling_mixed_noise_vit import MixedNoiseViTForImageClassification
from .preparation import Preparation
from .provenance import command_line, package_versions
from .records import write_json
from .training import TrainingSettings, train
from .training_images import ImageSettings, TrainingBatches


@dataclass
class EvaluationSettings:
    """
    How a model is looked at after each epoch. The figures are rough, and no certificates: shares of images that the majority
    of a few noisy copies gets right.
    """

    eval_split: str | None = HfArg(default=None, help="split to evaluate on after each epoch; by default, none")
    eval_samples: int = HfArg(default=300, help="images of it, the same ones each time")
    eval_draws: int = HfArg(default=5, help="noisy copies of each, of which the majority counts")
    eval_sigmas: list[float] = HfArg(default_factory=lambda: [0.0, 0.25, 0.5, 1.0], help="at these noise levels")

    def __post_init__(self) -> None:
        check_count("eval_samples", self.eval_samples)
        check_count("eval_draws", self.eval_draws)
        if not self.eval_sigmas or min(self.eval_sigmas) < 0:
            raise ValueError(f"eval_sigmas={self.eval_sigmas} must be noise levels, 0 or above.")


@torch.no_grad()
def majority_answers(
    model: Any, pixels: torch.Tensor, sigma: float, *, draws: int, batch_size: int = 128, seed: int = 0
) -> torch.Tensor:
    """
    The majority of a few noisy copies of each image: an estimate, without guarantee, of the smoothed classifier's answers.

    Args:
        model: maps pixels in `[0, 1]` to an output with `logits`.
        pixels: `(images, channels, height, width)` in `[0, 1]`, on the model's device.
        sigma: noise level; 0 takes one clean pass.
        draws: noisy copies of each image. Ties go to the class of the lowest index.
        batch_size: copies in a forward pass.
        seed: of the noise.

    Returns:
        Class indices `(images,)`.
    """
    generator = torch.Generator(pixels.device).manual_seed(seed)
    votes = []
    for _ in range(draws if sigma > 0 else 1):
        noisy = (
            batch + sigma * torch.randn(batch.shape, generator=generator, device=batch.device)
            for batch in pixels.split(batch_size)
        )
        logits = torch.cat([model(batch).logits for batch in noisy])
        votes.append(nn.functional.one_hot(logits.argmax(1), logits.shape[1]))
    return torch.stack(votes).sum(0).argmax(1)


def consistency_loss(logits: torch.Tensor, weight: float, entropy_weight: float = 0.5) -> torch.Tensor:
    """
    What noisy copies of an image cost where they are not answered alike (Jeong and Shin 2020, arXiv 2006.04062): `weight`
    times the mean Kullback-Leibler divergence from the copies' mean probabilities to a copy's, plus `entropy_weight` times
    the entropy of that mean. Radii grow with it: a large one takes a p_A near 1, which is answers that are alike.

    Args:
        logits: `(copies, batch, classes)`, of copies with noise of the same level; of clean ones only the entropy counts.
        weight: of the divergence, 0 or above.
        entropy_weight: of the entropy (the paper's default).

    Returns:
        A scalar, the mean over the batch.
    """
    log_p = logits.log_softmax(-1)
    log_mean = log_p.logsumexp(0) - math.log(len(logits))
    mean = log_mean.exp()
    divergence = (mean * (log_mean - log_p)).sum(-1).mean()
    entropy = -(mean * log_mean).sum(-1).mean()
    return weight * divergence + entropy_weight * entropy


def load_to_finetune(
    model_name_or_path: str, names: Sequence[str], *, revision: str | None = None, **config_kwargs: Any
) -> MixedNoiseViTForImageClassification:
    """
    A pretrained model with a head for a dataset's classes.

    The head is kept where the model has the same classes in the same order, and otherwise begun anew.

    Args:
        model_name_or_path: a mixed-noise ViT on the Hub or in a local folder, or the name of a ViT of timm (with or without
            `timm/` in front).
        names: the dataset's classes.
        revision: of the model on the Hub.
        config_kwargs: fields of the config to set, such as `drop_path_rate`.

    Raises:
        ValueError: for a model of another kind, or one that cannot be loaded.
    """
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    timm_name = model_name_or_path.removeprefix("timm/")
    if not Path(model_name_or_path).exists() and timm.is_model(timm_name):
        return MixedNoiseViTForImageClassification.from_timm(timm_name, **labels, **config_kwargs)
    at: dict[str, Any] = {} if revision is None else {"revision": revision}
    with loading(model_name_or_path):
        config = AutoConfig.from_pretrained(model_name_or_path, **at)
    if not isinstance(config, MixedNoiseViTConfig):
        raise ValueError(
            f"{model_name_or_path!r} is a {config.model_type} model: finetune a mixed-noise ViT, or a ViT of timm by its "
            "name (such as vit_tiny_patch16_224)."
        )
    same = [config.id2label[index] for index in range(config.num_labels)] == list(names)
    model = MixedNoiseViTForImageClassification.from_pretrained(
        model_name_or_path, dtype=torch.float32, ignore_mismatched_sizes=True, **labels, **config_kwargs, **at
    )
    if not same:
        model.classifier = nn.Linear(config.hidden_size, len(names))
        model._init_weights(model.classifier)
    return model


def train_classifier(
    model: MixedNoiseViTForImageClassification,
    images: LabelledImages,
    image_settings: ImageSettings,
    settings: TrainingSettings,
    evaluation: EvaluationSettings,
    accelerator: Accelerator,
    base: str | None = None,
) -> dict[str, Any]:
    """
    Train a model on images with noise of a level drawn for each, save it with its image processor to `settings.output_dir`,
    and what came of it to `results/training.json` in there.

    Args:
        model: has the classes of the dataset.
        images: opened, from `image_settings.open()`.
        image_settings: augmentation and noise.
        settings: how to train.
        evaluation: how to look at it after each epoch.
        accelerator: the processes, from `settings.start()`.
        base: the model that it started from; what is known of its training goes into the results.

    Returns:
        What is in `results/training.json`.

    Raises:
        ValueError: see [`train`] and [`TrainingBatches`].
    """
    size = model.config.image_size
    processor = ViTImageProcessor(size={"height": size, "width": size}, do_normalize=False, do_convert_rgb=True)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    images.meet(names, Preparation.of(processor))
    batches = TrainingBatches(
        images,
        image_settings,
        size,
        settings.per_device_train_batch_size,
        seed=settings.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        shown=accelerator.is_main_process,
    )
    mixture, mixing = image_settings.mixture(), image_settings.mixing(len(names))
    if mixing is not None and settings.per_device_train_batch_size % 2:
        raise ValueError(
            f"per_device_train_batch_size={settings.per_device_train_batch_size}: mixup and cutmix pair images: take an "
            "even number of them."
        )
    weight = image_settings.consistency_weight
    copies = 2 if weight else 1

    def compute_loss(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        pixels, smoothing = pixels.float() / 255, image_settings.label_smoothing
        if mixing is not None:
            (pixels, labels), smoothing = mixing(pixels, labels), 0.0  # it smooths the labels itself
        # noise comes last: mixing would change its level
        logits = model(mixture.add_to(pixels, copies)).logits
        loss = nn.functional.cross_entropy(logits, torch.cat([labels] * copies), label_smoothing=smoothing)
        return loss + consistency_loss(logits.unflatten(0, (copies, -1)), weight) if weight else loss

    output_dir = Path(settings.output_dir)

    def save(model: Any) -> None:
        model.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)

    found = train(
        model,
        batches,
        compute_loss,
        settings,
        accelerator,
        save=save,
        identity={
            **asdict(image_settings),
            **asdict(evaluation),
            "dataset_fingerprint": images.fingerprint,
            "config": {
                name: value for name, value in model.config.to_dict().items() if name != "transformers_version"
            },
            "frozen": sorted(name for name, parameter in model.named_parameters() if not parameter.requires_grad),
            "base": base,
        },
        evaluate=_evaluation(evaluation, image_settings, names, processor, accelerator),
    )
    results = {
        "command": command_line(),
        "settings": {**asdict(settings), **asdict(image_settings), **asdict(evaluation)},
        **found,
        "versions": package_versions("accelerate", "datasets"),
    }
    before = Path(base or "") / "results" / "training.json"
    if base is not None and before.exists():
        earlier = json.loads(before.read_text())
        if {"command", "parameters", "steps"} <= earlier.keys():  # one of ours, not what somebody else keeps there
            results["continues"] = earlier
    if accelerator.is_main_process:
        (output_dir / "results").mkdir(exist_ok=True)
        write_json(results, output_dir / "results" / "training.json")
    return results


def _evaluation(
    evaluation: EvaluationSettings,
    image_settings: ImageSettings,
    names: list[str],
    processor: Any,
    accelerator: Accelerator,
) -> Any:
    """The accuracy at each noise level, from a model; each process looks at its part of the images."""
    if evaluation.eval_split is None:
        return None
    images = LabelledImages(
        image_settings.dataset_name,
        config_name=image_settings.dataset_config_name,
        split=evaluation.eval_split,
        image_column=image_settings.image_column,
        label_column=image_settings.label_column,
    )
    images.meet(names, Preparation.of(processor))
    chosen = np.random.default_rng(0).permutation(len(images.source))[: evaluation.eval_samples].tolist()
    rows = [(images.pixels(row), images.label(index, row)) for index, row in ((i, images.source[i]) for i in chosen)]
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    if not mine:
        raise ValueError(f"eval_samples={len(rows)} are fewer than the {accelerator.num_processes} processes.")
    pixels = torch.stack([one for one, _ in mine]).to(accelerator.device)
    labels = torch.tensor([label for _, label in mine]).to(accelerator.device)

    def evaluate(model: Any) -> dict[str, float]:
        found = {}
        for sigma in evaluation.eval_sigmas:
            answers = majority_answers(
                model, pixels, sigma, draws=evaluation.eval_draws, seed=accelerator.process_index
            )
            right = accelerator.reduce((answers == labels).sum(), "sum")
            found[f"majority_accuracy_sigma_{sigma:g}"] = float(right) / len(rows)
        return found

    return evaluate
