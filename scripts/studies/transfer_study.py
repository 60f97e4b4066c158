"""Does robustness to noise survive finetuning on clean images (arXiv 2312.09020)? All arms of that question at one budget.

    python scripts/studies/transfer_study.py --pretrain_dataset_name zh-plus/tiny-imagenet --dataset_name uoft-cs/cifar10 \\
        --output_dir study

Pretraining {mixture of clean and noisy images, clean, one sigma} x norm {LayerNorm, BatchNorm} x finetuning {clean,
mixture}: six trainings from scratch, twelve finetunings, each evaluated under noise and certified. The default sizes fit two
CPU cores; for a GPU raise the steps and the model. Run again, it goes on; two starts with `--part 1/2` and `2/2` share the
arms, and a third without it puts them together. Writes OUTPUT_DIR/results.json and a picture.
"""

import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest
from transformers import AutoImageProcessor
from transformers.hf_argparser import HfArg

from hf_smoothing import (
    GaussianNoise,
    MixedNoiseViTConfig,
    MixedNoiseViTForImageClassification,
    SequentialRule,
    SmoothedClassifier,
)
from hf_smoothing.core.certificates import Certificate
from hf_smoothing.core.preprocessing import Preprocessing
from hf_smoothing.data.labelled_images import LabelledImages
from hf_smoothing.training.checkpoints import LATEST
from hf_smoothing.training.classifier_training import train_classifier
from hf_smoothing.training.evaluation import EvaluationSettings, predict_majority
from hf_smoothing.training.pretrained_classifiers import load_for_finetuning
from hf_smoothing.training.training_images import ImageSettings, find_class_names
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import argument_parser
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

NORMS = ("layernorm", "batchnorm")


@dataclass
class StudySettings:
    """Sizes of the study. All arms of a kind get the same."""

    pretrain_dataset_name: str = HfArg(help="what to pretrain on: name on the Hub or a local folder")
    dataset_name: str = HfArg(help="what to finetune and evaluate on")
    output_dir: str = HfArg(help="a new folder, or that of a study to go on with")
    eval_split: str = HfArg(default="test", help="split of --dataset_name to evaluate on")
    sigmas: list[float] = HfArg(default_factory=lambda: [0.0, 0.25, 0.5, 1.0], help="the mixture of noise levels")
    single_sigma: float = HfArg(default=0.5, help="the noise level of the arms that are pretrained on one")
    pretrain_steps: int = HfArg(default=300, help="updates of each pretraining")
    finetune_steps: int = HfArg(default=120, help="updates of each finetuning")
    batch_size: int = HfArg(default=128, help="images an update")
    pretrain_learning_rate: float = HfArg(default=1.5e-3, help="peak learning rate of pretraining")
    finetune_learning_rate: float = HfArg(default=1e-3, help="peak learning rate of finetuning")
    layer_decay: float = HfArg(default=0.75, help="layer-wise decay of the learning rate in finetuning")
    hidden_size: int = HfArg(default=128, help="width of the model")
    num_hidden_layers: int = HfArg(default=2, help="its transformer blocks")
    num_attention_heads: int = HfArg(default=4, help="its attention heads")
    patch_size: int = HfArg(default=8, help="pixels a side of a token")
    eval_samples: int = HfArg(default=1000, help="images for the accuracy under noise")
    eval_draws: int = HfArg(default=5, help="noisy copies of each, of which the majority counts")
    certify_samples: int = HfArg(default=100, help="of them, images that are certified")
    train_samples: int = HfArg(default=25_000, help="images of each dataset to train on; reading them all takes long")
    max_draws: int = HfArg(default=100, help="the most draws to certify one image")
    alpha: float = HfArg(default=0.001, help="probability that a certificate is wrong")
    seed: int = HfArg(default=0, help="of everything that is random")
    part: str | None = HfArg(
        default=None, help="`1/2`: only every second pretraining and what follows it, from the first on"
    )

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]/[1-9]", self.part or "1/1") or self.chosen[0] >= self.chosen[1]:
            raise ValueError(f"part={self.part!r} must be such as 1/2: the first of two.")
        for sigma in self.levels[1:]:  # what would otherwise only be refused behind the first training
            rule = SequentialRule(self.radii(sigma), alpha=self.alpha, max_draws=self.max_draws)
            rule.check(GaussianNoise(sigma))

    @property
    def chosen(self) -> tuple[int, int]:
        """Which arms this start works on: those whose number leaves this rest, when divided by how many share them."""
        part, parts = map(int, (self.part or "1/1").split("/"))
        return part - 1, parts

    @property
    def levels(self) -> list[float]:
        """Noise levels to evaluate at."""
        return sorted({0.0, *self.sigmas})

    @staticmethod
    def radii(sigma: float) -> tuple[float, ...]:
        """Radii to certify at."""
        return tuple(sigma * share for share in (0, 0.5, 1))

    @property
    def mixtures(self) -> dict[str, list[float]]:
        """Noise levels of pretraining by the name of the arm."""
        return {"mixture": self.sigmas, "clean": [0.0], f"sigma {self.single_sigma:g}": [self.single_sigma]}


def train_arm(
    settings: StudySettings,
    folder: Path,
    dataset_name: str,
    sigmas: list[float],
    steps: int,
    base: Path | None,
    norm: str,
) -> dict[str, Any]:
    """Train one arm from scratch, or from `base`; what is finished already is only read."""
    finished = folder / "results" / "training.json"
    if finished.exists():
        return json.loads(finished.read_text())
    image_settings = ImageSettings(dataset_name, sigmas=sigmas, max_train_samples=settings.train_samples)
    images = image_settings.open()
    names = find_class_names(images)
    torch.manual_seed(settings.seed)
    if base is None:
        config = MixedNoiseViTConfig(
            patch_size=settings.patch_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
            norm_layer=norm,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
        model = MixedNoiseViTForImageClassification(config)
    else:
        model, _ = load_for_finetuning(str(base), names)
    training = TrainingSettings(
        str(folder),
        max_train_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.pretrain_learning_rate if base is None else settings.finetune_learning_rate,
        layer_decay=1.0 if base is None else settings.layer_decay,
        seed=settings.seed,
        checkpointing_steps="100",
        resume_from_checkpoint=LATEST,
    )
    found = train_classifier(
        model, images, image_settings, training, EvaluationSettings(), training.create_accelerator()
    )
    for checkpoint in folder.glob("step_*/*"):  # the model is saved: eighteen checkpoints would only fill the disk
        checkpoint.unlink()
    return found


def evaluate_arm(settings: StudySettings, folder: Path, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Which images an arm gets right at each noise level, and which it certifies at which radius."""
    path = folder / "results" / "evaluation.json"
    if path.exists():
        return json.loads(path.read_text())
    model = MixedNoiseViTForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    right = {
        f"{sigma:g}": (
            predict_majority(model, pixels, sigma, draws=settings.eval_draws, seed=settings.seed) == labels
        ).tolist()
        for sigma in settings.levels
    }
    certified: dict[str, list[float]] = {}
    for sigma in settings.levels[1:]:
        smoothed = SmoothedClassifier(model, GaussianNoise(sigma))
        found: list[Certificate] = smoothed.certify(
            list(pixels[: settings.certify_samples]),
            alpha=settings.alpha,
            radii=settings.radii(sigma),
            max_draws=settings.max_draws,
            seed=settings.seed,
        )
        # of a wrong answer nothing is certified, not even radius 0
        certified[f"{sigma:g}"] = [
            one.radius if one.prediction == label else -1.0 for one, label in zip(found, labels.tolist())
        ]
    write_json({"right": right, "certified_radius": certified}, path)
    return json.loads(path.read_text())


def share(right: list[bool]) -> dict[str, Any]:
    low, high = binomtest(sum(right), len(right)).proportion_ci(method="exact")
    return {"share": float(np.mean(right)), "interval_95": [low, high]}


def difference(one: list[bool], other: list[bool]) -> dict[str, Any]:
    """Difference of two accuracies on the same images, with its 95 % interval (normal, of the paired differences)."""
    differences = np.subtract(one, other, dtype=float)
    half = 1.96 * differences.std(ddof=1) / math.sqrt(len(differences))
    mean = float(differences.mean())
    return {"difference": mean, "interval_95": [mean - half, mean + half]}


def summarize(settings: StudySettings, found: dict[tuple[str, str, str], dict[str, Any]]) -> dict[str, Any]:
    """The tables of the study, as plain values."""
    rows = []
    for (pretraining, norm, finetuning), one in found.items():
        rows.append(
            {
                "pretraining": pretraining,
                "norm": norm,
                "finetuning": finetuning,
                "accuracy": {sigma: share(right) for sigma, right in one["right"].items()},
                "certified_accuracy": {
                    sigma: {
                        f"{part * float(sigma):g}": share([radius >= part * float(sigma) for radius in radii])
                        for part in (0, 0.5, 1)
                    }
                    for sigma, radii in one["certified_radius"].items()
                },
            }
        )
    comparisons = {
        f"{norm}, mixture minus clean pretraining, both finetuned clean, sigma {sigma:g}": difference(
            found["mixture", norm, "clean"]["right"][f"{sigma:g}"],
            found["clean", norm, "clean"]["right"][f"{sigma:g}"],
        )
        for norm in NORMS
        for sigma in settings.levels
    } | {
        f"LayerNorm minus BatchNorm, mixture pretraining, finetuned clean, sigma {sigma:g}": difference(
            found["mixture", "layernorm", "clean"]["right"][f"{sigma:g}"],
            found["mixture", "batchnorm", "clean"]["right"][f"{sigma:g}"],
        )
        for sigma in settings.levels
    }
    return {"arms": rows, "comparisons": comparisons}


def draw(settings: StudySettings, arms: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against noise level, one panel for each norm and finetuning."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, norm in enumerate(NORMS):
        for column, finetuning in enumerate(("clean", "mixture")):
            axis = axes[row, column]
            for arm in arms:
                if (arm["norm"], arm["finetuning"]) != (norm, finetuning):
                    continue
                shares = np.array([one["share"] for one in arm["accuracy"].values()])
                low, high = np.array([one["interval_95"] for one in arm["accuracy"].values()]).T
                axis.errorbar(
                    settings.levels,
                    shares,
                    (shares - low, high - shares),
                    marker="o",
                    capsize=2,
                    label=arm["pretraining"],
                )
            title = {"layernorm": "LayerNorm", "batchnorm": "BatchNorm"}[norm]
            axis.set(
                title=f"{title}, finetuned on {'clean images' if finetuning == 'clean' else 'the mixture'}",
                ylim=(0, None),
            )
            axis.grid(alpha=0.3)
    axes[0, 0].legend(title="pretrained on", fontsize=8)
    figure.supxlabel("noise level sigma, in [0, 1] pixels")
    figure.supylabel(f"accuracy: majority of {settings.eval_draws} noisy copies (95 % interval)")
    figure.savefig(path, dpi=130)


def main() -> None:
    try:
        (settings,) = argument_parser((StudySettings,), __doc__).parse_args_into_dataclasses()
        study(settings)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def study(settings: StudySettings) -> None:
    """Work on the arms of this start; with all of them done, put the results together."""
    output_dir, started = Path(settings.output_dir), time.monotonic()
    asked = json.loads(
        json.dumps({name: value for name, value in asdict(settings).items() if name not in ("output_dir", "part")})
    )
    settings_file = output_dir / "settings.json"
    if settings_file.exists() and json.loads(settings_file.read_text()) != asked:
        raise ValueError(
            f"{output_dir} holds a study with other settings, see {settings_file}: choose another folder."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(asked, settings_file)

    trained: dict[str, dict[str, Any]] = {}
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    arms = [(name, norm) for norm in NORMS for name in settings.mixtures]
    part, parts = settings.chosen
    for number, (name, norm) in enumerate(arms, 1):
        if (number - 1) % parts != part:
            continue
        base = output_dir / f"pretrained-{name.replace(' ', '-')}-{norm}"
        print(f"Pretraining {number} of {len(arms)}: {name}, {norm}", flush=True)
        sigmas = settings.mixtures[name]
        trained[base.name] = train_arm(
            settings, base, settings.pretrain_dataset_name, sigmas, settings.pretrain_steps, None, norm
        )
        for finetuning, levels in (("clean", [0.0]), ("mixture", settings.sigmas)):
            folder = output_dir / f"{base.name.replace('pretrained', 'finetuned')}-{finetuning}"
            print(f"  Finetuning on {finetuning} images", flush=True)
            trained[folder.name] = train_arm(
                settings, folder, settings.dataset_name, levels, settings.finetune_steps, base, norm
            )
            if not found:
                pixels, labels = images_to_evaluate(settings, folder)
            found[name, norm, finetuning] = evaluate_arm(settings, folder, pixels, labels)
    if parts > 1:
        print(f"Part {settings.part} is done; start without --part once all parts are.")
        return
    results = {
        "command": command_line(),
        "settings": asked,
        **summarize(settings, found),
        "final_losses": {name: one["final_loss"] for name, one in trained.items()},
        "parameters": trained[base.name]["parameters"],
        "training_seconds": sum(one["seconds"] for one in trained.values()),
        "seconds_of_last_start": time.monotonic() - started,
        "device": trained[base.name]["device"],
        "num_threads": trained[base.name]["num_threads"],
        "versions": package_versions(),
    }
    write_json(results, output_dir / "results.json")
    draw(settings, results["arms"], output_dir / "transfer-study.png")
    for name, one in results["comparisons"].items():
        low, high = one["interval_95"]
        print(f"{name}: {one['difference']:+.1%} ({low:+.1%} to {high:+.1%})")


def images_to_evaluate(settings: StudySettings, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels of some images, spread over the split at random."""
    images = LabelledImages(settings.dataset_name, split=settings.eval_split)
    inputs = images.bind(
        find_class_names(images), Preprocessing.from_image_processor(AutoImageProcessor.from_pretrained(folder))
    )
    chosen = np.random.default_rng(settings.seed).permutation(len(images.source))[: settings.eval_samples].tolist()
    pixels, labels = zip(*(inputs[index] for index in chosen))
    return torch.stack(pixels), torch.tensor(labels)


if __name__ == "__main__":
    main()
