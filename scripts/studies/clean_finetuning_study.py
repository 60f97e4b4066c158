"""What keeps robustness to noise when a foundation is finetuned on clean images? Compares ways of finetuning.

Example:
    python scripts/studies/clean_finetuning_study.py --model_name_or_path my-foundation --dataset_name uoft-cs/cifar10 \\
        --output_dir study

Arms: layer-wise decay of the learning rate, fewer and more epochs, a lower learning rate, a frozen trunk, and a head that is
trained before the rest (Kumar et al. 2022, arXiv 2202.10054). Each is evaluated as it is, and with its encoder averaged with
that of the foundation (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903). On a GPU, `--processes 8` runs eight arms at once.
To resume an interrupted study, run its command again. Writes OUTPUT_DIR/results.json.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from study_arms import (
    DecodedImages,
    MeasurementSettings,
    check_settings,
    compute_share,
    decode_images,
    evaluate_model,
    load_arm,
    run_arms,
    train_arm,
)
from transformers.hf_argparser import HfArg

from hf_smoothing import MixedNoiseViTForImageClassification
from hf_smoothing.core.configuration_mixed_noise_vit import MixedNoiseViTConfig
from hf_smoothing.reporting.tables import print_table
from hf_smoothing.training.pretrained_classifiers import average_with_base, find_head, load_for_finetuning
from hf_smoothing.training.training_images import ImageSettings
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import argument_parser
from hf_smoothing.utils.errors import exit_on_error
from hf_smoothing.utils.files import read_json, write_json
from hf_smoothing.utils.provenance import command_line, package_versions


@dataclass
class StudySettings:
    """The foundation, the data, and the budget of each arm."""

    model_name_or_path: str = HfArg(help="foundation: a mixed-noise ViT on the Hub or in a local folder")
    dataset_name: str = HfArg(help="dataset to finetune and evaluate on: name on the Hub or a local folder")
    output_dir: str = HfArg(help="new folder, or that of a study to resume")
    num_train_epochs: int = HfArg(default=4, help="passes over the images in most arms")
    few_epochs: int = HfArg(default=1, help="passes in the arm with few")
    more_epochs: int = HfArg(default=12, help="passes in the arm with more")
    batch_size: int = HfArg(default=256, help="images per update")
    learning_rate: float = HfArg(default=5e-4, help="peak learning rate")
    layer_decays: list[float] = HfArg(
        default_factory=lambda: [1.0, 0.75, 0.5],
        help="layer-wise decays of the learning rate; the other arms take the second one",
    )
    base_shares: list[float] = HfArg(
        default_factory=lambda: [0.25, 0.5, 0.75], help="shares of the foundation in averages of the weights"
    )
    train_samples: int | None = HfArg(default=None, help="largest number of training images")
    sigmas: list[float] = HfArg(default_factory=lambda: [0.0, 0.25, 0.5, 1.0], help="noise levels of the accuracy")
    certify_sigmas: list[float] = HfArg(default_factory=lambda: [0.25, 0.5], help="noise levels to certify at")
    radii: list[float] = HfArg(default_factory=lambda: [0.0, 0.25, 0.5], help="radii to certify")
    seed: int = HfArg(default=0, help="seed of everything random")

    @property
    def radii_by_sigma(self) -> dict[float, list[float]]:
        return {sigma: self.radii for sigma in self.certify_sigmas}


@dataclass(frozen=True)
class FinetuningArm:
    """A way of finetuning."""

    name: str
    epochs: int
    layer_decay: float
    learning_rate: float
    head_epochs: int = 0
    """Epochs that train only the head, before the others."""

    @property
    def folder(self) -> str:
        return self.name.replace(",", "").replace(" ", "-")


def list_arms(settings: StudySettings) -> list[FinetuningArm]:
    """The arms of the study; the longest first, so that it runs beside the others."""
    epochs, decay, rate = settings.num_train_epochs, settings.layer_decays[1], settings.learning_rate
    return [
        FinetuningArm("more epochs", settings.more_epochs, decay, rate),
        *(FinetuningArm(f"layer decay {value:g}", epochs, value, rate) for value in settings.layer_decays),
        FinetuningArm("head first", epochs, decay, rate, head_epochs=settings.few_epochs),
        FinetuningArm("low learning rate", epochs, decay, rate / 5),
        FinetuningArm("frozen trunk", 0, decay, rate, head_epochs=epochs),
        FinetuningArm("few epochs", settings.few_epochs, decay, rate),
    ]


def load_base(model_name_or_path: str, class_names: list[str], freeze: bool) -> Any:
    """The pretrained model with a head for the classes; with `freeze` only the head is trained."""
    model, _ = load_for_finetuning(model_name_or_path, class_names)
    if freeze:
        model.requires_grad_(False)
        find_head(model).requires_grad_(True)
    return model


def run_arm(settings: StudySettings, measurement: MeasurementSettings, arm: FinetuningArm) -> None:
    """Finetune an arm, and evaluate it with each share of the foundation in its encoder."""
    output_dir = Path(settings.output_dir)
    images = DecodedImages.load(output_dir / "images" / "train")
    model, folder = settings.model_name_or_path, output_dir / arm.folder
    for stage, epochs, freeze in (("head", arm.head_epochs, True), ("all", arm.epochs, False)):
        if not epochs:
            continue
        training = TrainingSettings(
            str(folder / stage),
            num_train_epochs=epochs,
            per_device_train_batch_size=settings.batch_size,
            # a head alone starts from random weights
            learning_rate=settings.learning_rate * 10 if freeze else arm.learning_rate,
            layer_decay=1.0 if freeze else arm.layer_decay,
            seed=settings.seed,
            checkpointing_steps="1000",
            mixed_precision=measurement.mixed_precision,
        )
        image_settings = ImageSettings(settings.dataset_name)
        train_arm(partial(load_base, model, images.class_names, freeze), images, image_settings, training)
        model = str(folder / stage)
    eval_images = DecodedImages.load(output_dir / "images" / "eval")
    evaluations = []
    base = MixedNoiseViTForImageClassification.from_pretrained(settings.model_name_or_path, dtype=torch.float32)
    base_weights = base.state_dict()
    for share in (0.0, *settings.base_shares) if arm.epochs else (0.0,):
        tuned = average_with_base(load_arm(Path(model)), base_weights, share)
        evaluation = evaluate_model(
            tuned, eval_images, measurement, settings.sigmas, settings.radii_by_sigma, settings.seed
        )
        evaluations.append({"base_share": share, **evaluation})
    write_json({"evaluations": evaluations}, folder / "evaluations.json")


def write_results(settings: StudySettings, measurement: MeasurementSettings, fixed_settings: dict[str, Any]) -> None:
    """Write `results.json` from the arms that are finished."""
    output_dir, rows, trainings = Path(settings.output_dir), [], []
    for arm in list_arms(settings):
        folder = output_dir / arm.folder
        if not (folder / "evaluations.json").exists():
            continue
        trainings += [read_json(path) for path in sorted(folder.glob("*/results/training.json"))]
        for evaluation in read_json(folder / "evaluations.json")["evaluations"]:
            certified = {
                sigma: {
                    f"{radius:g}": compute_share([[value >= radius for value in values]]) for radius in settings.radii
                }
                for sigma, values in evaluation["certified_radius"].items()
            }
            accuracy = {sigma: compute_share([right]) for sigma, right in evaluation["right"].items()}
            rows.append(
                {
                    **asdict(arm),
                    "base_share": evaluation["base_share"],
                    "accuracy": accuracy,
                    "certified_accuracy": certified,
                }
            )
    results = {
        "command": command_line(),
        "settings": fixed_settings,
        "arms": rows,
        "training_seconds": sum(training["seconds"] for training in trainings),
        **{name: trainings[-1][name] for name in ("parameters", "device", "num_threads") if trainings},
        "versions": package_versions(),
    }
    write_json(results, output_dir / "results.json")


def show_results(results: dict[str, Any]) -> None:
    rows = [
        {
            "arm": row["name"],
            "share of the foundation": f"{row['base_share']:g}",
            **{f"sigma {sigma}": f"{accuracy['share']:.1%}" for sigma, accuracy in row["accuracy"].items()},
            **{
                f"certified, sigma {sigma}": " / ".join(f"{accuracy['share']:.1%}" for accuracy in certified.values())
                for sigma, certified in row["certified_accuracy"].items()
            },
        }
        for row in results["arms"]
    ]
    print_table(Console(), "Accuracy under noise, and certified accuracy, after clean finetuning", rows)


def study(settings: StudySettings, measurement: MeasurementSettings) -> None:
    """Train and evaluate all arms; write the results."""
    if not 0 < min(settings.base_shares, default=0.5) <= max(settings.base_shares, default=0.5) < 1:
        raise ValueError(f"base_shares={settings.base_shares} must be above 0 and below 1.")
    if len(settings.layer_decays) < 2:
        raise ValueError(f"layer_decays={settings.layer_decays} must be at least two: other arms take the second one.")
    measurement.check_radii(settings.radii_by_sigma)
    config = MixedNoiseViTConfig.from_pretrained(settings.model_name_or_path)
    output_dir = Path(settings.output_dir)
    fixed_settings = {**asdict(settings), **asdict(measurement)}
    fixed_settings = {name: fixed_settings[name] for name in fixed_settings.keys() - {"output_dir", "processes"}}
    fixed_settings = dict(sorted(fixed_settings.items()))
    check_settings(output_dir, fixed_settings)
    for folder, split, samples in (
        ("train", "train", settings.train_samples),
        ("eval", measurement.eval_split, max(measurement.eval_samples, measurement.certify_samples)),
    ):
        decode_images(
            output_dir / "images" / folder,
            settings.dataset_name,
            split,
            samples,
            config.image_size,
            measurement.processes,
        )
    measurement.check_images(output_dir / "images" / "eval")
    arms = {
        arm.folder: arm for arm in list_arms(settings) if not (output_dir / arm.folder / "evaluations.json").exists()
    }
    write = partial(write_results, settings, measurement, fixed_settings)
    run_arms(partial(run_arm, settings, measurement), arms, output_dir, measurement.processes, write)
    write()
    show_results(read_json(output_dir / "results.json"))


if __name__ == "__main__":
    with exit_on_error():
        parsed = argument_parser((StudySettings, MeasurementSettings), __doc__).parse_args_into_dataclasses()
        study(*parsed)
