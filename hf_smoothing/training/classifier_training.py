"""Training a classifier on a mixture of clean and noisy images (arXiv 2312.09020)."""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor
from transformers.hf_argparser import HfArg

from ..core.configuration_mixed_noise_vit import MixedNoiseViTConfig
from ..core.loading import check_weights, loading, refuse_other_weights
from ..core.modeling_mixed_noise_vit import MixedNoiseViTForImageClassification
from ..core.preprocessing import Preprocessing
from ..core.validation import check_count
from ..data.labelled_images import LabelledImages
from ..utils.files import write_json
from ..utils.provenance import command_line, package_versions
from .from_timm import from_timm
from .training_images import ImageSettings, TrainingBatches
from .training_loop import TrainingSettings, train


@dataclass
class EvaluationSettings:
    """
    How a model is looked at after each epoch. The figures are rough, and no certificates: shares of images that the majority
    of a few noisy copies gets right.
    """

    eval_split: str | None = HfArg(default=None, help="split to evaluate on after each epoch; by default, none")
    eval_samples: int = HfArg(default=300, help="images of it, the same ones each time (of a stream, the first ones)")
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
) -> tuple[Any, Any]:
    """
    A pretrained model with a head for a dataset's classes.

    The head is kept where the model has the same classes in the same order, and otherwise begun anew.

    Args:
        model_name_or_path: an image classifier on the Hub or in a local folder, or the name of a ViT of timm (with or
            without `timm/` in front), which becomes a mixed-noise ViT.
        names: the dataset's classes.
        revision: of the model on the Hub.
        config_kwargs: fields of the config to set, such as `drop_path_rate`.

    Returns:
        The model, and its image processor.

    Raises:
        ValueError: for a model of another kind, one that cannot be loaded, or a field that it has not.
    """
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    timm_name = model_name_or_path.removeprefix("timm/")
    if not Path(model_name_or_path).exists() and timm.is_model(timm_name):
        own = from_timm(timm_name, **labels, **config_kwargs)
        return own, plain_processor(own.config.image_size)
    at: dict[str, Any] = {} if revision is None else {"revision": revision}
    with loading(model_name_or_path):
        config = AutoConfig.from_pretrained(model_name_or_path, **at)
    same = [config.id2label[index] for index in range(config.num_labels)] == list(names)
    kind: Any = MixedNoiseViTForImageClassification
    if not isinstance(config, MixedNoiseViTConfig):
        kind, config_kwargs = AutoModelForImageClassification, {k: v for k, v in config_kwargs.items() if v}
        if unknown := [name for name in config_kwargs if not hasattr(config, name)]:
            raise ValueError(f"A {config.model_type} model has no {', '.join(unknown)}: leave it out.")
    if hasattr(config, "label_names"):  # which timm's wrapper saves instead
        labels["label_names"] = list(names)
    # not all configs take classes from `from_pretrained`
    for field, value in {**labels, **config_kwargs}.items():
        setattr(config, field, value)
    with loading(model_name_or_path):
        model, info = kind.from_pretrained(
            model_name_or_path,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            config=config,
            **at,
        )
        if kind is MixedNoiseViTForImageClassification:
            processor = plain_processor(config.image_size)
        else:
            processor = AutoImageProcessor.from_pretrained(model_name_or_path, **at)
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        warnings.warn(
            f"{model_name_or_path!r} normalises by batch statistics (BatchNorm): robustness learned at one noise level does "
            "not carry over to others (arXiv 2312.09020).",
            stacklevel=2,
        )
    head = head_of(model)
    names_of_head = tuple(name for name, one in model.named_modules() if one is head)
    refuse_other_weights(model_name_or_path, info, (*names_of_head, "count_head"))
    check_weights(model)
    if not same:
        nn.init.trunc_normal_(head.weight, std=0.02)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    return model, processor


def plain_processor(size: int) -> ViTImageProcessor:
    """The image processor of a mixed-noise ViT, which normalises behind the noise by itself."""
    return ViTImageProcessor(size={"height": size, "width": size}, do_normalize=False, do_convert_rgb=True)


def head_of(model: Any) -> nn.Linear:
    """
    The layer that makes logits of features.

    Raises:
        ValueError: where it is no linear layer.
    """
    layers = [one for one in model.modules() if isinstance(one, nn.Linear)]
    if not layers or layers[-1].out_features != model.config.num_labels:
        raise ValueError(f"A {model.config.model_type} model does not end with a linear layer: its head is unknown.")
    return layers[-1]


def train_classifier(
    model: Any,
    images: LabelledImages,
    image_settings: ImageSettings,
    settings: TrainingSettings,
    evaluation: EvaluationSettings,
    accelerator: Accelerator,
    base: str | None = None,
    processor: Any = None,
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
        processor: its image processor, whose normalisation goes behind the noise; by default that of a mixed-noise ViT.

    Returns:
        What is in `results/training.json`.

    Raises:
        ValueError: see [`train`] and [`TrainingBatches`].
    """
    processor = processor or plain_processor(model.config.image_size)
    preprocessing = Preprocessing.of(processor)
    height, size = preprocessing.before(Image.new("RGB", (64, 64))).shape[1:]
    if height != size:
        raise ValueError(f"The model takes {height}x{size} pixels: only square pictures are trained on here.")
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    batches = TrainingBatches(
        images.bind(names, preprocessing),
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
        logits = model(preprocessing.normalize(mixture.add_to(pixels, copies))).logits
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
        evaluate=_evaluation(evaluation, image_settings, names, preprocessing, accelerator),
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
    preprocessing: Preprocessing,
    accelerator: Accelerator,
) -> Any:
    """The accuracy at each noise level, from a model; each process looks at its part of the images."""
    if evaluation.eval_split is None:
        return None
    if Path(image_settings.dataset_name).is_file() and evaluation.eval_split != image_settings.train_split:
        raise ValueError(
            f"{image_settings.dataset_name} is one file, which has no split {evaluation.eval_split!r} beside "
            f"{image_settings.train_split!r}: name a folder with a file for each, or that split itself."
        )
    images = LabelledImages(
        image_settings.dataset_name,
        config_name=image_settings.dataset_config_name,
        split=evaluation.eval_split,
        image_column=image_settings.image_column,
        label_column=image_settings.label_column,
        max_samples=evaluation.eval_samples,
        spread=True,
        streaming=image_settings.streaming,
    )
    rows = list(images.bind(names, preprocessing))
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    if not mine:
        raise ValueError(f"eval_samples={len(rows)} are fewer than the {accelerator.num_processes} processes.")
    pixels = torch.stack([one for one, _ in mine]).to(accelerator.device)
    labels = torch.tensor([label for _, label in mine]).to(accelerator.device)

    def evaluate(model: Any) -> dict[str, float]:
        found = {}

        def prepared(pixels: torch.Tensor) -> Any:
            return model(preprocessing.normalize(pixels))

        for sigma in evaluation.eval_sigmas:
            answers = majority_answers(
                prepared, pixels, sigma, draws=evaluation.eval_draws, seed=accelerator.process_index
            )
            right = accelerator.reduce((answers == labels).sum(), "sum")
            found[f"majority_accuracy_sigma_{sigma:g}"] = float(right) / len(rows)
        return found

    return evaluate
