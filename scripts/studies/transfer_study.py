"""Does robustness to noise survive finetuning on clean images (arXiv 2312.09020)? Compares all arms at the same budget.

Example:
    python scripts/studies/transfer_study.py --pretrain_dataset_name zh-plus/tiny-imagenet --dataset_name uoft-cs/cifar10 \\
        --output_dir study

Pretraining {mixture of clean and noisy images, clean, one sigma} x norm {LayerNorm, BatchNorm} x finetuning {clean,
mixture}: six trainings from scratch, twelve finetunings, each evaluated under noise and certified. The default sizes fit two
CPU cores; for a GPU, raise the steps and the size of the model. To resume an interrupted study, run its command again.
Writes OUTPUT_DIR/results.json and a picture.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from transformers import AutoImageProcessor
from transformers.hf_argparser import HfArg

from hf_smoothing import (
    GaussianNoise,
    MixedNoiseViTConfig,
    MixedNoiseViTForImageClassification,
    SequentialRule,
    SmoothedClassifier,
)
from hf_smoothing.core.preprocessing import Preprocessing
from hf_smoothing.data.labelled_images import LabelledImages
from hf_smoothing.metrics.certified_accuracy import exact_interval
from hf_smoothing.reporting.tables import print_table
from hf_smoothing.training.checkpoints import LATEST
from hf_smoothing.training.classifier_training import train_classifier
from hf_smoothing.training.evaluation import EvaluationSettings, predict_majority
from hf_smoothing.training.pretrained_classifiers import load_for_finetuning
from hf_smoothing.training.training_images import ImageSettings, find_class_names
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import argument_parser
from hf_smoothing.utils.errors import exit_on_error
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

NORMS = {"layernorm": "LayerNorm", "batchnorm": "BatchNorm"}
SHARES = (0, 0.5, 1)  # radii to certify at, in units of sigma


@dataclass
class StudySettings:
    """Data and budget of the study; the same for all arms of a kind."""

    pretrain_dataset_name: str = HfArg(help="dataset to pretrain on: name on the Hub or a local folder")
    dataset_name: str = HfArg(help="dataset to finetune and evaluate on")
    output_dir: str = HfArg(help="new folder, or that of a study to resume")
    eval_split: str = HfArg(default="test", help="split of --dataset_name to evaluate on")
    sigmas: list[float] = HfArg(default_factory=lambda: [0.0, 0.25, 0.5, 1.0], help="noise levels of the mixture")
    single_sigma: float = HfArg(default=0.5, help="noise level of the arms pretrained on a single one")
    pretrain_steps: int = HfArg(default=300, help="updates per pretraining")
    finetune_steps: int = HfArg(default=120, help="updates per finetuning")
    batch_size: int = HfArg(default=128, help="images per update")
    pretrain_learning_rate: float = HfArg(default=1.5e-3, help="peak learning rate of pretraining")
    finetune_learning_rate: float = HfArg(default=1e-3, help="peak learning rate of finetuning")
    layer_decay: float = HfArg(default=0.75, help="layer-wise decay of the learning rate when finetuning")
    hidden_size: int = HfArg(default=128, help="width of the transformer")
    num_hidden_layers: int = HfArg(default=2, help="number of transformer blocks")
    num_attention_heads: int = HfArg(default=4, help="number of attention heads")
    patch_size: int = HfArg(default=8, help="height and width of a patch (token) in pixels")
    eval_samples: int = HfArg(default=1000, help="images for the accuracy under noise")
    eval_draws: int = HfArg(default=5, help="noisy copies per image; their majority answer counts")
    certify_samples: int = HfArg(default=100, help="images of these to certify")
    train_samples: int = HfArg(default=25_000, help="images of each dataset to train on")
    max_draws: int = HfArg(default=100, help="most draws per image to certify it")
    alpha: float = HfArg(default=0.001, help="probability that a certificate is wrong")
    seed: int = HfArg(default=0, help="seed of everything random")

    def __post_init__(self) -> None:
        for sigma in self.levels[1:]:  # refuse it now, not after the first training
            SequentialRule(**self.rule_settings(sigma)).check(GaussianNoise(sigma))

    @property
    def levels(self) -> list[float]:
        """Noise levels to evaluate at."""
        return sorted({0.0, *self.sigmas})

    def rule_settings(self, sigma: float) -> dict[str, Any]:
        """Settings of the rule that certifies at a noise level."""
        radii = tuple(sigma * share for share in SHARES)
        return {"radii": radii, "alpha": self.alpha, "max_draws": self.max_draws}

    @property
    def mixtures(self) -> dict[str, list[float]]:
        """Noise levels of pretraining by the name of the arm."""
        return {"mixture": self.sigmas, "clean": [0.0], f"sigma {self.single_sigma:g}": [self.single_sigma]}


def train_arm(
    settings: StudySettings, folder: Path, sigmas: list[float], norm: str, base: Path | None = None
) -> dict[str, Any]:
    """Pretrain an arm, or finetune `base`; of a finished arm only read the results."""
    finished = folder / "results" / "training.json"
    if finished.exists():
        return json.loads(finished.read_text())
    dataset_name = settings.pretrain_dataset_name if base is None else settings.dataset_name
    image_settings = ImageSettings(dataset_name, sigmas=sigmas, max_train_samples=settings.train_samples)
    images = image_settings.open()
    class_names = find_class_names(images)
    torch.manual_seed(settings.seed)
    if base is None:
        names = ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        config = MixedNoiseViTConfig(
            **{name: getattr(settings, name) for name in names},
            norm_layer=norm,
            id2label=dict(enumerate(class_names)),
            label2id={name: index for index, name in enumerate(class_names)},
        )
        model = MixedNoiseViTForImageClassification(config)
    else:
        model, _ = load_for_finetuning(str(base), class_names)
    training = TrainingSettings(
        str(folder),
        max_train_steps=settings.pretrain_steps if base is None else settings.finetune_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.pretrain_learning_rate if base is None else settings.finetune_learning_rate,
        layer_decay=1.0 if base is None else settings.layer_decay,
        seed=settings.seed,
        checkpointing_steps="100",
        resume_from_checkpoint=LATEST,
    )
    accelerator = training.create_accelerator()
    results = train_classifier(model, images, image_settings, training, EvaluationSettings(), accelerator)
    for checkpoint in folder.glob("step_*/*"):  # the model is saved: its checkpoint only fills the disk
        checkpoint.unlink()
    return results


def evaluate_arm(settings: StudySettings, folder: Path, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Which images an arm predicts correctly at each noise level, and the radii that it certifies."""
    path = folder / "results" / "evaluation.json"
    if path.exists():
        return json.loads(path.read_text())
    model = MixedNoiseViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    right, certified = {}, {}
    for sigma in settings.levels:
        predictions = predict_majority(model, pixels, sigma, draws=settings.eval_draws, seed=settings.seed)
        right[f"{sigma:g}"] = (predictions == labels).tolist()
    certified_pixels = list(pixels[: settings.certify_samples])
    for sigma in settings.levels[1:]:
        smoothed = SmoothedClassifier(model, GaussianNoise(sigma))
        certificates = smoothed.certify(certified_pixels, seed=settings.seed, **settings.rule_settings(sigma))
        # a wrong prediction is not even certified at radius 0
        certified[f"{sigma:g}"] = [
            certificate.radius if certificate.prediction == label else -1.0
            for certificate, label in zip(certificates, labels.tolist())
        ]
    evaluation = {"right": right, "certified_radius": certified}
    write_json(evaluation, path)
    return evaluation


def compute_share(right: list[bool]) -> dict[str, Any]:
    return {"share": float(np.mean(right)), "interval_95": exact_interval(sum(right), len(right))}


def compute_difference(first: list[bool], second: list[bool]) -> dict[str, Any]:
    """Difference of two accuracies on the same images, with its 95 % interval (normal, of the paired differences)."""
    differences = np.subtract(first, second, dtype=float)
    half = 1.96 * differences.std(ddof=1) / math.sqrt(len(differences))
    mean = float(differences.mean())
    return {"difference": mean, "interval_95": [mean - half, mean + half]}


def summarize(settings: StudySettings, evaluations: dict[tuple[str, str, str], dict[str, Any]]) -> dict[str, Any]:
    """The tables of the study, as plain values."""
    arms = [
        {
            "pretraining": pretraining,
            "norm": norm,
            "finetuning": finetuning,
            "accuracy": {sigma: compute_share(right) for sigma, right in evaluation["right"].items()},
            "certified_accuracy": {
                sigma: {
                    f"{part * float(sigma):g}": compute_share([radius >= part * float(sigma) for radius in radii])
                    for part in SHARES
                }
                for sigma, radii in evaluation["certified_radius"].items()
            },
        }
        for (pretraining, norm, finetuning), evaluation in evaluations.items()
    ]
    pairs = {
        f"{norm}, mixture minus clean pretraining, both finetuned clean": (("mixture", norm), ("clean", norm))
        for norm in NORMS
    }
    pairs["LayerNorm minus BatchNorm, mixture pretraining, finetuned clean"] = (
        ("mixture", "layernorm"), ("mixture", "batchnorm"),
    )  # fmt: skip
    comparisons = {
        f"{name}, sigma {sigma:g}": compute_difference(
            *(evaluations[*arm, "clean"]["right"][f"{sigma:g}"] for arm in pair)
        )
        for name, pair in pairs.items()
        for sigma in settings.levels
    }
    return {"arms": arms, "comparisons": comparisons}


def plot(settings: StudySettings, arms: list[dict[str, Any]], path: Path) -> None:
    """Accuracy by noise level, one panel per norm and finetuning."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    finetunings = {"clean": "clean images", "mixture": "the mixture"}
    for axis, (norm, finetuning) in zip(axes.flat, product(NORMS, finetunings)):
        for arm in arms:
            if (arm["norm"], arm["finetuning"]) == (norm, finetuning):
                shares = np.array([accuracy["share"] for accuracy in arm["accuracy"].values()])
                low, high = np.array([accuracy["interval_95"] for accuracy in arm["accuracy"].values()]).T
                errors, label = (shares - low, high - shares), arm["pretraining"]
                axis.errorbar(settings.levels, shares, errors, marker="o", capsize=2, label=label)
        axis.set(title=f"{NORMS[norm]}, finetuned on {finetunings[finetuning]}", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0, 0].legend(title="pretrained on", fontsize=8)
    figure.supxlabel("noise level sigma, in [0, 1] pixels")
    figure.supylabel(f"accuracy: majority of {settings.eval_draws} noisy copies (95 % interval)")
    figure.savefig(path, dpi=130)


def study(settings: StudySettings) -> None:
    """Train and evaluate all arms; write the results."""
    output_dir, started = Path(settings.output_dir), time.monotonic()
    fixed_settings = {name: value for name, value in asdict(settings).items() if name != "output_dir"}
    settings_path = output_dir / "settings.json"
    if settings_path.exists() and json.loads(settings_path.read_text()) != fixed_settings:
        raise ValueError(
            f"{output_dir} holds a study with other settings, see {settings_path}: choose another folder."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(fixed_settings, settings_path)
    trainings, evaluations = run_arms(settings, output_dir)
    last_training = list(trainings.values())[-1]
    results = {
        "command": command_line(),
        "settings": fixed_settings,
        **summarize(settings, evaluations),
        "final_losses": {name: training["final_loss"] for name, training in trainings.items()},
        "parameters": last_training["parameters"],
        "training_seconds": sum(training["seconds"] for training in trainings.values()),
        "seconds_of_last_start": time.monotonic() - started,
        "device": last_training["device"],
        "num_threads": last_training["num_threads"],
        "versions": package_versions(),
    }
    write_json(results, output_dir / "results.json")
    plot(settings, results["arms"], output_dir / "transfer-study.png")
    rows = [
        {
            "comparison": name,
            "difference": f"{comparison['difference']:+.1%}",
            "95 % interval": "{:+.1%} to {:+.1%}".format(*comparison["interval_95"]),
        }
        for name, comparison in results["comparisons"].items()
    ]
    print_table(Console(), "Differences of accuracy", rows)


def run_arms(
    settings: StudySettings, output_dir: Path
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str, str], dict[str, Any]]]:
    """Results of the trainings by folder name, and evaluations by pretraining, norm and finetuning."""
    trainings: dict[str, dict[str, Any]] = {}
    evaluations: dict[tuple[str, str, str], dict[str, Any]] = {}
    pretrainings = [(name, norm) for norm in NORMS for name in settings.mixtures]
    for number, (name, norm) in enumerate(pretrainings, 1):
        base = output_dir / f"pretrained-{name.replace(' ', '-')}-{norm}"
        print(f"Pretraining {number} of {len(pretrainings)}: {name}, {norm}", flush=True)
        trainings[base.name] = train_arm(settings, base, settings.mixtures[name], norm)
        for finetuning, sigmas in (("clean", [0.0]), ("mixture", settings.sigmas)):
            folder = output_dir / f"{base.name.replace('pretrained', 'finetuned')}-{finetuning}"
            print(f"  Finetuning on {finetuning} images", flush=True)
            trainings[folder.name] = train_arm(settings, folder, sigmas, norm, base)
            if not evaluations:
                pixels, labels = read_eval_images(settings, folder)
            evaluations[name, norm, finetuning] = evaluate_arm(settings, folder, pixels, labels)
    return trainings, evaluations


def read_eval_images(settings: StudySettings, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels of a random sample of the split."""
    images = LabelledImages(settings.dataset_name, split=settings.eval_split)
    preprocessing = Preprocessing.from_image_processor(AutoImageProcessor.from_pretrained(folder))
    inputs = images.bind(find_class_names(images), preprocessing)
    sample = np.random.default_rng(settings.seed).permutation(len(images.source))[: settings.eval_samples].tolist()
    pixels, labels = zip(*(inputs[index] for index in sample))
    return torch.stack(pixels), torch.tensor(labels)


if __name__ == "__main__":
    with exit_on_error():
        (study_settings,) = argument_parser((StudySettings,), __doc__).parse_args_into_dataclasses()
        study(study_settings)
