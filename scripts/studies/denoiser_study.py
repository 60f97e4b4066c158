"""What a denoiser is worth before a classifier trained on clean images only: none, `wiener`, or a diffusion model.

Example:
    accelerate launch scripts/pretrain.py --dataset_name uoft-cs/cifar10 --sigmas 0 --output_dir clean-classifier
    accelerate launch scripts/train_denoiser.py --dataset_name uoft-cs/cifar10 --output_dir denoiser
    python scripts/studies/denoiser_study.py --model clean-classifier --denoiser denoiser --dataset uoft-cs/cifar10 \\
        --output_dir study

Certifies the same random images three times, and writes `study.json`, `study.md`, and a report with curves in `report`.
Interrupted, it resumes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from hf_smoothing.hub.results_pages import render_results
from hf_smoothing.reporting.report import write_report
from hf_smoothing.runs.dataset_run import certify_dataset
from hf_smoothing.runs.settings import NoiseLevel, RunSettings
from hf_smoothing.utils.argument_parser import argument_parser
from hf_smoothing.utils.errors import exit_on_error
from hf_smoothing.utils.files import read_json, write_json
from hf_smoothing.utils.processes import start_processes
from hf_smoothing.utils.provenance import command_line, package_versions


@dataclass
class StudySettings:
    model: str = HfArg(
        help="classifier that was trained on clean images, a folder of scripts/pretrain.py or finetune.py"
    )
    denoiser: str = HfArg(help="diffusion model, a folder of scripts/train_denoiser.py")
    dataset: str = HfArg(help="dataset of the test images")
    output_dir: Path = HfArg(help="folder for the runs, the report and study.json")
    split: str = HfArg(default="test", help="split of the test images")
    max_samples: int = HfArg(default=200, help="number of images, chosen at random, the same for all")
    sigma: float = HfArg(default=0.25, help="noise level, in [0, 1] pixels")
    radii: list[float] = HfArg(
        default_factory=lambda: [0.0, 0.25, 0.5], help="radii at which certified accuracy is shown"
    )
    draws: int = HfArg(default=600, help="mean number of draws per image to plan for (rule two-stage)")
    seed: int = HfArg(default=0, help="seed of the noise")
    batch_size: int = HfArg(default=256, help="draws per forward pass")
    device: str | None = HfArg(default=None, help="where to compute (default: a GPU if there is one)")


def certify_all(settings: StudySettings) -> list[Path]:
    """Certify the images with each denoiser; the folders of the runs."""
    accelerator = start_processes()
    folders = []
    for name, denoiser in (("none", None), ("wiener", "wiener"), ("diffusion", settings.denoiser)):
        run_settings = RunSettings(
            settings.model,
            settings.dataset,
            [NoiseLevel(settings.sigma)],
            split=settings.split,
            max_samples=settings.max_samples,
            draws=settings.draws,
            seed=settings.seed,
            denoiser=denoiser,
        )
        folders.append(settings.output_dir / name)
        certify_dataset(
            run_settings,
            folders[-1],
            accelerator=accelerator,
            batch_size=settings.batch_size,
            device=settings.device,
        )
    return folders


def describe_trained(folder: str) -> dict[str, Any]:
    """What the study shows of a training; of one that was cut short, what its log says; empty where there is neither."""
    results, log = Path(folder) / "results" / "training.json", Path(folder) / "training_log.jsonl"
    if results.is_file():
        names = ("parameters", "steps", "images_seen", "seconds", "device", "evaluation", "settings", "command")
        return {name: value for name, value in read_json(results).items() if name in names}
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    evaluations = [row["evaluation"] for row in rows if "evaluation" in row]
    return {"cut_short_after_steps": rows[-1]["step"], "evaluation": (evaluations or [None])[-1]} if rows else {}


def main() -> None:
    parser = argument_parser((StudySettings,), __doc__)
    with exit_on_error():
        (settings,) = parser.parse_args_into_dataclasses()
        folders = certify_all(settings)
        report, _ = write_report(folders, settings.output_dir / "report", radii=settings.radii)
        study = {
            "command": command_line(),
            "settings": {name: value for name, value in vars(settings).items() if name != "output_dir"},
            "classifier": describe_trained(settings.model),
            "denoiser": describe_trained(settings.denoiser),
            "results": [{**entry, "denoiser_kind": folder.name} for folder, entry in zip(folders, report["results"])],
            "versions": package_versions("accelerate", "datasets", "diffusers"),
        }
        write_json(study, settings.output_dir / "study.json")
        text = render_results("denoiser_study", study)
        (settings.output_dir / "study.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
