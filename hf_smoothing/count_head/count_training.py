"""Training a count head on the measured class counts of a run (arXiv 2402.07498)."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor

from ..core.configuration_mixed_noise_vit import MixedNoiseViTConfig
from ..core.loading import loading, refuse_other_weights
from ..core.modeling_count_prediction import DRAWS, OF_FREQUENCIES, MixedNoiseViTForCountPrediction
from ..core.preprocessing import Preprocessing
from ..training.training_images import Batch
from ..training.training_loop import TrainingSettings, train
from ..utils.files import write_json
from ..utils.provenance import command_line, package_versions
from .measured_counts import Counts


class CountBatches:
    """
    Batches of one process, of images with all of their counts; order depends on seed and epoch alone.

    Args:
        inputs: `(images, ...)`: pixels (uint8) or features.
        targets: `(images, levels, 1 + classes)`: sigma, and the counts.
        batch_size: images in a batch.
        seed: of the order.
        process_index, num_processes: this process, and how many there are.
        most_draws: of an image at a noise level; of more, so many are chosen by chance, others in each epoch.
    """

    def __init__(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        most_draws: int | None = None,
    ):
        self.inputs, self.targets, self.seed = inputs, targets, seed
        self.batch_size, self.most_draws = batch_size, most_draws
        self.total: int | None = len(inputs)
        self.process_index, self.num_processes = process_index, num_processes
        if not len(self):
            raise ValueError(
                f"{self.total} images do not fill a batch of {batch_size} on {num_processes} processes: take a smaller "
                "per_device_train_batch_size."
            )

    def __len__(self) -> int:
        return len(self.inputs) // (self.batch_size * self.num_processes)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng([self.seed, number]).permutation(len(self.inputs))
        order = order[: len(self) * self.num_processes * self.batch_size]
        for chosen in order.reshape(len(self), self.num_processes, self.batch_size)[first:, self.process_index]:
            targets = self.targets[chosen]
            if self.most_draws is not None:
                generator = np.random.default_rng([self.seed, number, int(chosen[0])])
                targets = torch.cat(
                    [targets[..., :1], subsample_counts(targets[..., 1:], self.most_draws, generator)], -1
                )
            yield self.inputs[chosen], targets


def subsample_counts(counts: torch.Tensor, draws: int, generator: np.random.Generator) -> torch.Tensor:
    """
    Counts of some of the draws, chosen by chance: distributed as if no more had been made.

    Args:
        counts: `(..., classes)`, whole numbers.
        draws: to keep of each row, which keeps all if it has fewer.
        generator: of the choice.
    """
    rows = counts.long().flatten(0, -2).numpy()
    kept = [generator.multivariate_hypergeometric(row, min(draws, row.sum())) for row in rows]
    return torch.from_numpy(np.array(kept)).to(counts.dtype).view_as(counts)


def counts_by_image(counts: Counts) -> tuple[np.ndarray, torch.Tensor]:
    """
    Counts of the images that were counted at all noise levels; those that failed at one are left out.

    Args:
        counts: of any run.

    Returns:
        Their places in the split `(images,)`, and `(images, levels, 1 + classes)`: sigma, and the counts.
    """
    images, times = np.unique(counts.indices, return_counts=True)
    images = images[times == len(np.unique(counts.sigmas))]
    rows = np.lexsort((counts.sigmas, counts.indices))
    rows = rows[np.isin(counts.indices[rows], images)]
    targets = np.concatenate([counts.sigmas[rows, None], counts.counts[rows]], 1)
    return images, torch.from_numpy(targets).float().view(len(images), -1, targets.shape[1])


@torch.no_grad()
def features_of(model: MixedNoiseViTForCountPrediction, pixels: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """What the head looks at of images `(images, channels, height, width)`, uint8: a row for each."""
    model.eval()
    device = next(model.parameters()).device
    batches = tqdm(pixels.split(batch_size), "features", disable=len(pixels) < 10 * batch_size)
    found = [model.features(batch.to(device).float() / 255).cpu() for batch in batches]
    return torch.cat(found)


def build_count_model(
    model_name_or_path: str, counts: Counts, own_backbone: bool = False
) -> MixedNoiseViTForCountPrediction:
    """
    A model with a fresh count head, for the noise levels that were counted.

    Args:
        model_name_or_path: a mixed-noise ViT on the Hub or in a local folder, whose encoder and classifier it takes over.
        counts: what it is to be trained on; of any base classifier.
        own_backbone: whether encoder and classifier are to be trained along. Then the classes may differ: the classifier is
            begun anew.

    Raises:
        ValueError: for a model that cannot be loaded, is none of ours, or has other classes than were counted.
    """
    with loading(model_name_or_path):
        config = AutoConfig.from_pretrained(model_name_or_path)
        if not isinstance(config, MixedNoiseViTConfig):
            raise ValueError(
                f"{model_name_or_path!r} is a {config.model_type} model; a count head stands on a mixed-noise ViT. For the "
                "counts of another classifier name such a ViT and train its encoder along (own_backbone)."
            )
        names, counted = [config.id2label[index] for index in range(config.num_labels)], counts.settings["label_names"]
        if names != counted and not own_backbone:
            raise ValueError(
                f"{model_name_or_path!r} has the classes {names}, the counts are of {counted}. Train its encoder along "
                "(own_backbone), or name the classifier that was counted."
            )
        model, info = MixedNoiseViTForCountPrediction.from_pretrained(
            model_name_or_path,
            output_loading_info=True,
            dtype=torch.float32,
            count_sigmas=sorted(set(counts.sigmas.tolist())),
            id2label=dict(enumerate(counted)),
            label2id={name: index for index, name in enumerate(counted)},
            ignore_mismatched_sizes=True,
        )
    refuse_other_weights(model_name_or_path, info, ("classifier", "count_head"))
    if names != counted:
        model.classifier = nn.Linear(config.hidden_size, len(counted))
        model._init_weights(model.classifier)
    return model


@torch.no_grad()
def prediction_errors(
    model: MixedNoiseViTForCountPrediction, inputs: torch.Tensor, targets: torch.Tensor
) -> dict[str, float]:
    """
    How far predictions are off, over the images and noise levels given.

    Args:
        model: the count head.
        inputs: `(images, ...)`: pixels (uint8) or features.
        targets: `(images, levels, 1 + classes)`: sigma, and the counts.

    Returns:
        `jensen_shannon` (nats), `top1_disagreement` (share whose most frequent class is another than predicted), and
        `top_frequency_error` (mean of the predicted less the measured frequency of the class measured most often).
    """
    predicted = [
        model(**_as_inputs(batch), sigma=asked[..., 0]).logits
        for batch, asked in zip(inputs.split(512), targets.split(512))
    ]
    logits, counts = torch.cat(predicted).flatten(0, 1), targets[..., 1:].flatten(0, 1)
    frequencies = counts / counts.sum(1, keepdim=True)
    top = counts.argmax(1)
    off = logits.softmax(1).gather(1, top[:, None]) - frequencies.gather(1, top[:, None])
    return {
        "jensen_shannon": float(OF_FREQUENCIES["jensen_shannon"](logits, frequencies)),
        "top1_disagreement": float((logits.argmax(1) != top).float().mean()),
        "top_frequency_error": float(off.mean()),
    }


def _as_inputs(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"features": batch} if batch.ndim == 2 else {"pixel_values": batch.float() / 255}


def train_count_head(
    model: MixedNoiseViTForCountPrediction,
    counts: Counts,
    settings: TrainingSettings,
    accelerator: Accelerator,
    *,
    base: str,
    loss: str = "jensen_shannon",
    own_backbone: bool = False,
    hflip: float = 0.5,
    eval_share: float = 0.05,
) -> dict[str, Any]:
    """
    Train a count head, save it with the image processor of its base to `settings.output_dir`, and what came of it to
    `results/training.json` in there.

    Args:
        model: from [`build_count_model`].
        counts: what to train on.
        settings: how to train.
        accelerator: the processes, from `settings.start()`.
        base: the model that it takes its encoder and classifier from.
        loss: one of [`LOSSES`] of `modeling_count_prediction`.
        own_backbone: train encoder and classifier along; by default they stay as they are, and each image goes through the
            encoder once in all.
        hflip: with an own backbone, the probability that an image is shown flipped from left to right. Its counts are taken
            to be those of the image as it is: nearly right for classifiers that were trained so too.
        eval_share: share of the images that is held out, to look at the errors after each epoch.

    Raises:
        ValueError: see [`train`]; where images cannot be read or are no longer those counted; for a single draw of an image,
            with the loss `logistic_normal`.
    """
    started = time.perf_counter()
    draws = int(counts.counts.sum(1).min())
    if loss == "logistic_normal" and draws < DRAWS[0]:
        raise ValueError(f"loss='logistic_normal' takes {DRAWS[0]} draws of an image: {draws} was counted.")
    processor = AutoImageProcessor.from_pretrained(base)
    images = counts.open().bind(counts.settings["label_names"], Preprocessing.of(processor))
    wanted, targets = counts_by_image(counts)
    reading = tqdm(wanted.tolist(), "reading images", disable=not accelerator.is_main_process)
    inputs = torch.stack([(images[index][0] * 255).round().byte() for index in reading])
    model.to(accelerator.device)
    if not own_backbone:
        model.mixed_noise_vit.requires_grad_(False)
        model.classifier.requires_grad_(False)
        inputs = features_of(model, inputs)
    held_out = np.random.default_rng(settings.seed).permutation(len(wanted))[: round(eval_share * len(wanted))]
    aside = np.isin(np.arange(len(wanted)), held_out)
    batches = CountBatches(
        inputs[~aside],
        targets[~aside],
        settings.per_device_train_batch_size,
        settings.seed,
        accelerator.process_index,
        accelerator.num_processes,
        DRAWS[-1] if loss == "logistic_normal" else None,
    )

    preparation_seconds = time.perf_counter() - started

    def compute_loss(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if own_backbone and hflip:
            flipped = torch.rand(len(inputs), 1, 1, 1, device=inputs.device) < hflip
            inputs = torch.where(flipped, inputs.flip(-1), inputs)
        return model(**_as_inputs(inputs), sigma=targets[..., 0], counts=targets[..., 1:], loss=loss).loss

    held = [one.to(accelerator.device) for one in (inputs[aside], targets[aside])]
    output_dir = Path(settings.output_dir)

    def save(model: Any) -> None:
        model.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)

    chosen = {"loss": loss, "own_backbone": own_backbone, "eval_share": eval_share, "base": base}
    chosen |= {"hflip": hflip} if own_backbone else {}
    found = train(
        model,
        batches,
        compute_loss,
        settings,
        accelerator,
        save=save,
        identity={**chosen, "counts": counts.settings, "images": len(wanted)},
        evaluate=(lambda model: prediction_errors(model, *held)) if aside.any() else None,
    )
    results = {
        "command": command_line(),
        "settings": {**asdict(settings), **chosen},
        "counts": {name: counts.settings[name] for name in ("dataset_name", "split", "sigmas", "method", "n", "seed")},
        "images_counted": len(wanted),
        "preparation_seconds": preparation_seconds,  # reading the images, and one pass over each if the backbone is frozen
        **found,
        "versions": package_versions("accelerate", "datasets"),
    }
    if accelerator.is_main_process:
        (output_dir / "results").mkdir(exist_ok=True)
        write_json(results, output_dir / "results" / "training.json")
    return results
