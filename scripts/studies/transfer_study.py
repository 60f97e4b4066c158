"""Does robustness to noise survive finetuning on clean images (arXiv 2312.09020)? Compares arms at the same budget.

Example:
    python scripts/studies/transfer_study.py --pretrain_dataset_name zh-plus/tiny-imagenet --dataset_name uoft-cs/cifar10 \\
        --output_dir study

Pretraining {mixture of clean and noisy images, clean} x norm {LayerNorm, BatchNorm}, finetuned on clean images, with several
seeds. With the first seed only: GroupNorm and RMSNorm, pretraining on one noise level, and finetuning on the mixture. Models
with BatchNorm are also evaluated with statistics that are re-estimated at each noise level, on training images with noise.
The default sizes fit two CPU cores in a few hours; on a GPU, `--processes 8` runs eight arms at a time. To resume an
interrupted study, run its command again. Writes OUTPUT_DIR/results.json and a picture.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from study_arms import (
    DecodedImages,
    MeasurementSettings,
    check_settings,
    compute_difference,
    compute_share,
    decode_images,
    evaluate_model,
    load_arm,
    run_arms,
    train_arm,
)
from transformers.hf_argparser import HfArg

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification
from hf_smoothing.reporting.tables import print_table
from hf_smoothing.training.pretrained_classifiers import load_for_finetuning
from hf_smoothing.training.training_images import ImageSettings
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import argument_parser
from hf_smoothing.utils.errors import exit_on_error
from hf_smoothing.utils.files import read_json, write_json
from hf_smoothing.utils.provenance import command_line, package_versions

NORMS = {"layernorm": "LayerNorm", "batchnorm": "BatchNorm", "groupnorm": "GroupNorm", "rmsnorm": "RMSNorm"}
SHARES = (0, 0.5, 1)  # radii to certify at, in units of sigma


@dataclass
class StudySettings:
    """Data, model and budget of the study; the same for all arms of a kind."""

    pretrain_dataset_name: str = HfArg(
        help="dataset to pretrain on: name on the Hub, local folder or Parquet file; its split train is taken"
    )
    dataset_name: str = HfArg(help="dataset to finetune and evaluate on")
    output_dir: str = HfArg(help="new folder, or that of a study to resume")
    sigmas: list[float] = HfArg(default_factory=lambda: [0.0, 0.25, 0.5, 1.0], help="noise levels of the mixture")
    single_sigma: float = HfArg(default=0.5, help="noise level of the arm that is pretrained on a single one")
    seeds: list[int] = HfArg(
        default_factory=lambda: [0, 1, 2], help="seeds of initialization, order and noise; all for the main arms"
    )
    pretrain_steps: int = HfArg(default=1500, help="updates per pretraining")
    finetune_steps: int = HfArg(default=600, help="updates per finetuning")
    batch_size: int = HfArg(default=128, help="images per update")
    pretrain_learning_rate: float = HfArg(default=1.5e-3, help="peak learning rate of pretraining")
    muon_learning_rate: float = HfArg(
        default=0.03,
        help="peak learning rate of Muon in pretraining, for the encoder's matrices; 0: AdamW for them too",
    )
    finetune_learning_rate: float = HfArg(default=1e-3, help="peak learning rate of finetuning")
    layer_decay: float = HfArg(default=0.75, help="layer-wise decay of the learning rate when finetuning")
    train_samples: int | None = HfArg(default=50_000, help="largest number of images of each dataset to train on")
    stem: str = HfArg(default="pool", help="see scripts/pretrain.py, as for the following ones")
    stem_widths: list[int] | None = HfArg(default_factory=lambda: [32, 64, 128, 128], help="channels of the stem pool")
    hidden_size: int = HfArg(default=128, help="width of the transformer")
    num_hidden_layers: int = HfArg(default=2, help="number of transformer blocks")
    num_attention_heads: int = HfArg(default=4, help="number of attention heads")
    mlp_ratio: float = HfArg(default=2.0, help="width of a block's MLP as a multiple of hidden_size")
    patch_size: int = HfArg(default=8, help="height and width of a patch (token) in pixels")
    pooling: str = HfArg(default="max", help="from tokens to one vector: avg or max")
    layer_scale_init: float | None = HfArg(default=0.001, help="initial scale of each residual branch")

    @property
    def levels(self) -> list[float]:
        """Noise levels to evaluate at."""
        return sorted({0.0, *self.sigmas})

    @property
    def radii(self) -> dict[float, list[float]]:
        """Radii to certify, by noise level."""
        return {sigma: [sigma * share for share in SHARES] for sigma in self.levels if sigma > 0}

    def create_config(self, norm: str, class_names: list[str]) -> MixedNoiseViTConfig:
        names = (
            "stem", "stem_widths", "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "patch_size",
            "pooling", "layer_scale_init",
        )  # fmt: skip
        return MixedNoiseViTConfig(
            **{name: getattr(self, name) for name in names},
            norm_layer=norm,
            id2label=dict(enumerate(class_names)),
            label2id={name: index for index, name in enumerate(class_names)},
        )


@dataclass(frozen=True)
class TransferArm:
    """A pretraining, and the finetunings that start from it."""

    pretraining: str
    norm: str
    seed: int
    sigmas: list[float]
    finetunings: dict[str, list[float]]
    """Noise levels by name."""

    @property
    def name(self) -> str:
        return f"{self.pretraining.replace(' ', '-')}-{self.norm}-{self.seed}"

    def evaluation_path(self, output_dir: Path, finetuning: str) -> Path:
        return output_dir / self.name / f"evaluation-{finetuning}.json"

    def is_finished(self, output_dir: Path) -> bool:
        return all(self.evaluation_path(output_dir, finetuning).exists() for finetuning in self.finetunings)


def list_arms(settings: StudySettings) -> list[TransferArm]:
    """The arms of the study: those of all seeds, then those of the first seed only."""
    clean, single, first = [0.0], f"sigma {settings.single_sigma:g}", settings.seeds[0]
    mixtures = {"mixture": settings.sigmas, "clean": clean, single: [settings.single_sigma]}
    finetunings = {seed: {"clean": clean} for seed in settings.seeds}
    finetunings[first] = {"clean": clean, "mixture": settings.sigmas}
    main = [
        TransferArm(pretraining, norm, seed, mixtures[pretraining], finetunings[seed])
        for seed in settings.seeds
        for pretraining in ("mixture", "clean")
        for norm in ("layernorm", "batchnorm")
    ]
    others = [
        TransferArm(pretraining, norm, first, mixtures[pretraining], {"clean": clean})
        for pretraining, norm in (("mixture", "groupnorm"), ("mixture", "rmsnorm"), (single, "layernorm"))
    ]
    return main + others


def run_arm(settings: StudySettings, measurement: MeasurementSettings, arm: TransferArm) -> None:
    """Pretrain and finetune an arm, and evaluate what was finetuned."""
    output_dir = Path(settings.output_dir)
    folder, images = output_dir / arm.name, output_dir / "images"

    def train(stage: str, create_model: Callable[[], Any], decoded: DecodedImages, sigmas: list[float]) -> None:
        pretraining = stage == "pretrained"
        training = TrainingSettings(
            str(folder / stage),
            max_train_steps=settings.pretrain_steps if pretraining else settings.finetune_steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.pretrain_learning_rate if pretraining else settings.finetune_learning_rate,
            muon_learning_rate=settings.muon_learning_rate if pretraining else 0.0,
            layer_decay=1.0 if pretraining else settings.layer_decay,
            seed=arm.seed,
            checkpointing_steps="500",
            mixed_precision=measurement.mixed_precision,
        )
        dataset_name = settings.pretrain_dataset_name if pretraining else settings.dataset_name
        train_arm(create_model, decoded, ImageSettings(dataset_name, sigmas=sigmas), training)

    pretrain_images = DecodedImages.load(images / "pretrain")
    config = settings.create_config(arm.norm, pretrain_images.class_names)
    train("pretrained", partial(MixedNoiseViTForImageClassification, config), pretrain_images, arm.sigmas)
    train_images, eval_images = DecodedImages.load(images / "train"), DecodedImages.load(images / "eval")
    base = str(folder / "pretrained")
    for finetuning, sigmas in arm.finetunings.items():
        train(finetuning, lambda: load_for_finetuning(base, train_images.class_names)[0], train_images, sigmas)
        evaluate = partial(
            evaluate_model,
            load_arm(folder / finetuning),
            eval_images,
            measurement,
            settings.levels,
            settings.radii,
            arm.seed,
        )
        evaluations = {"stored": evaluate()}
        if arm.norm == "batchnorm":
            evaluations["reestimated"] = evaluate(train_images)
        write_json(evaluations, arm.evaluation_path(output_dir, finetuning))


def summarize(settings: StudySettings, output_dir: Path) -> dict[str, Any]:
    """The tables of the study from the finished arms, as plain values."""
    evaluations: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for arm in list_arms(settings):
        for finetuning in arm.finetunings:
            if (path := arm.evaluation_path(output_dir, finetuning)).exists():
                evaluations.setdefault((arm.pretraining, arm.norm, finetuning), {})[arm.seed] = read_json(path)
    arms = []
    for (pretraining, norm, finetuning), by_seed in evaluations.items():
        seeds = list(by_seed)
        names = {"pretraining": pretraining, "norm": norm, "finetuning": finetuning, "seeds": seeds}
        arms.append({**names, **_summarize_shares([by_seed[seed]["stored"] for seed in seeds])})
        if norm == "batchnorm":
            arms[-1]["reestimated"] = _summarize_shares([by_seed[seed]["reestimated"] for seed in seeds])
    return {"arms": arms, "comparisons": _compare_arms(settings, evaluations)}


def _summarize_shares(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    first = evaluations[0]
    return {
        "accuracy": {sigma: compute_share([each["right"][sigma] for each in evaluations]) for sigma in first["right"]},
        "certified_accuracy": {
            sigma: {
                f"{part * float(sigma):g}": compute_share(
                    [
                        [radius >= part * float(sigma) for radius in each["certified_radius"][sigma]]
                        for each in evaluations
                    ]
                )
                for part in SHARES
            }
            for sigma in first["certified_radius"]
        },
    }


def _compare_arms(
    settings: StudySettings, evaluations: dict[tuple[str, str, str], dict[int, dict[str, Any]]]
) -> dict[str, Any]:
    """Differences of accuracy between arms that were finetuned on clean images, over the seeds that both have."""
    pairs = {
        f"{NORMS[norm]}, mixture minus clean pretraining": (("mixture", norm, "stored"), ("clean", norm, "stored"))
        for norm in ("layernorm", "batchnorm")
    }
    others = {
        "BatchNorm": ("mixture", "batchnorm", "stored"),
        "BatchNorm with re-estimated statistics": ("mixture", "batchnorm", "reestimated"),
        "GroupNorm": ("mixture", "groupnorm", "stored"),
        "RMSNorm": ("mixture", "rmsnorm", "stored"),
    }
    layer_norm = ("mixture", "layernorm", "stored")
    pairs |= {f"LayerNorm minus {name}, mixture pretraining": (layer_norm, other) for name, other in others.items()}
    single = f"sigma {settings.single_sigma:g}"
    pairs[f"LayerNorm, mixture minus {single} in pretraining"] = (layer_norm, (single, "layernorm", "stored"))
    comparisons = {}
    for name, pair in pairs.items():
        first, second = (evaluations.get((pretraining, norm, "clean"), {}) for pretraining, norm, _ in pair)
        seeds = [seed for seed in first if seed in second]
        for sigma in settings.levels if seeds else ():
            right = (
                [by_seed[seed][statistics]["right"][f"{sigma:g}"] for seed in seeds]
                for by_seed, (_, _, statistics) in zip((first, second), pair)
            )
            comparisons[f"{name}, sigma {sigma:g}"] = compute_difference(*right)
    return comparisons


def plot(settings: StudySettings, measurement: MeasurementSettings, arms: list[dict[str, Any]], path: Path) -> None:
    """Accuracy by noise level: the main arms, and those with one seed."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    main_axis, axis_of_others = figure.subplots(1, 2, sharey=True)
    for arm in arms:
        is_main = arm["finetuning"] == "clean" and arm["norm"] in ("layernorm", "batchnorm")
        is_main = is_main and arm["pretraining"] in ("mixture", "clean")
        label = f"{NORMS[arm['norm']]}, pretrained on {arm['pretraining']}"
        if not is_main:
            label += f", finetuned on {arm['finetuning']}"
        curves = {label: arm, f"{label}, re-estimated statistics": arm.get("reestimated") if is_main else None}
        for name, curve in curves.items():
            if curve is not None:
                shares = np.array([accuracy["share"] for accuracy in curve["accuracy"].values()])
                low, high = np.array([accuracy["interval_95"] for accuracy in curve["accuracy"].values()]).T
                axis, style = (main_axis if is_main else axis_of_others), "-" if curve is arm else ":"
                errors = (shares - low, high - shares)
                axis.errorbar(settings.levels, shares, errors, marker="o", capsize=2, label=name, linestyle=style)
    seeds = max(len(arm["seeds"]) for arm in arms)
    measured = "images" if seeds == 1 else f"up to {seeds} seeds"
    main_axis.set(title=f"Finetuned on clean images; 95 % interval over {measured}", ylim=(0, None))
    axis_of_others.set(title="One seed; 95 % interval over images")
    for axis in (main_axis, axis_of_others):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.supxlabel("noise level sigma, in [0, 1] pixels")
    figure.supylabel(f"accuracy: majority of {measurement.eval_draws} noisy copies")
    figure.savefig(path, dpi=130)


def write_results(settings: StudySettings, measurement: MeasurementSettings, fixed_settings: dict[str, Any]) -> None:
    """Write `results.json` and the picture from the arms that are finished."""
    output_dir = Path(settings.output_dir)
    summary = summarize(settings, output_dir)
    if not summary["arms"]:
        return
    trainings = [read_json(path) for path in sorted(output_dir.glob("*/*/results/training.json"))]
    results = {
        "command": command_line(),
        "settings": fixed_settings,
        **summary,
        "final_losses": {
            f"{path.parts[-4]}/{path.parts[-3]}": training["final_loss"]
            for path, training in zip(sorted(output_dir.glob("*/*/results/training.json")), trainings)
        },
        "training_seconds": sum(training["seconds"] for training in trainings),
        **{name: trainings[-1][name] for name in ("parameters", "device", "num_threads")},
        "versions": package_versions(),
    }
    write_json(results, output_dir / "results.json")
    plot(settings, measurement, results["arms"], output_dir / "transfer-study.png")


def study(settings: StudySettings, measurement: MeasurementSettings) -> None:
    """Train and evaluate all arms; write the results."""
    measurement.check_radii(settings.radii)
    config = settings.create_config("layernorm", [])
    output_dir = Path(settings.output_dir)
    all_settings = {**asdict(settings), **asdict(measurement)}
    fixed_settings = {name: all_settings[name] for name in sorted(all_settings.keys() - {"output_dir", "processes"})}
    check_settings(output_dir, fixed_settings)
    for folder, dataset_name, split, samples in (
        ("pretrain", settings.pretrain_dataset_name, "train", settings.train_samples),
        ("train", settings.dataset_name, "train", settings.train_samples),
        ("eval", settings.dataset_name, measurement.eval_split, max(measurement.eval_samples, measurement.certify_samples)),
    ):  # fmt: skip
        decode_images(
            output_dir / "images" / folder, dataset_name, split, samples, config.image_size, measurement.processes
        )
    measurement.check_images(output_dir / "images" / "eval")
    arms = {arm.name: arm for arm in list_arms(settings) if not arm.is_finished(output_dir)}
    write = partial(write_results, settings, measurement, fixed_settings)
    run_arms(partial(run_arm, settings, measurement), arms, output_dir, measurement.processes, write)
    write()
    rows = [
        {
            "comparison": name,
            "difference": f"{comparison['difference']:+.1%}",
            "95 % interval": "{:+.1%} to {:+.1%}".format(*comparison["interval_95"]),
        }
        for name, comparison in read_json(output_dir / "results.json")["comparisons"].items()
    ]
    print_table(Console(), "Differences of accuracy after clean finetuning", rows)


if __name__ == "__main__":
    with exit_on_error():
        parsed = argument_parser((StudySettings, MeasurementSettings), __doc__).parse_args_into_dataclasses()
        study(*parsed)
