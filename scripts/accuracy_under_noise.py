"""Estimate a classifier's accuracy under noise: the majority answer to a few noisy copies of each image. No certificates.

Example:
    accelerate launch scripts/accuracy_under_noise.py --model_name_or_path my-model --dataset_name zh-plus/tiny-imagenet \\
        --eval_split valid --eval_samples 10000 --output my-model/results/evaluation.json
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.hf_argparser import HfArg

import hf_smoothing  # noqa: F401 (registers the mixed-noise ViT)
from hf_smoothing.core.preprocessing import Preprocessing
from hf_smoothing.core.weights import loading
from hf_smoothing.metrics.certified_accuracy import exact_interval
from hf_smoothing.reporting.tables import print_table
from hf_smoothing.training.evaluation import EvaluationSettings, create_evaluation
from hf_smoothing.training.training_images import ImageSettings
from hf_smoothing.training.training_log import MAJORITY_ACCURACY
from hf_smoothing.utils.argument_parser import argument_parser
from hf_smoothing.utils.errors import exit_on_error
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.processes import start_processes
from hf_smoothing.utils.provenance import command_line, package_versions


@dataclass
class ModelSettings:
    """The classifier, and where its accuracies go."""

    model_name_or_path: str = HfArg(help="image classifier on the Hub or in a local folder")
    dataset_name: str = HfArg(help="dataset: name on the Hub, local folder, or Parquet file")
    output: str = HfArg(help="JSON file to write")


def main() -> None:
    parser = argument_parser((ModelSettings, EvaluationSettings), __doc__)
    parser.set_defaults(eval_split="test")
    with exit_on_error():
        settings, evaluation = parser.parse_args_into_dataclasses()
        accelerator = start_processes()
        name = settings.model_name_or_path
        with loading(name):
            model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)
            preprocessing = Preprocessing.from_image_processor(AutoImageProcessor.from_pretrained(name))
        model.to(accelerator.device, memory_format=torch.channels_last).eval()
        class_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
        images = ImageSettings(settings.dataset_name)
        evaluate = create_evaluation(evaluation, images, class_names, preprocessing, accelerator)
        assert evaluate is not None
        started = time.monotonic()
        accuracies = evaluate(model)
        total = evaluate.num_images
        rows: list[dict[str, Any]] = [
            {
                "sigma": float(key.removeprefix(MAJORITY_ACCURACY)),
                "accuracy": accuracy,
                "interval_95": exact_interval(round(accuracy * total), total),
            }
            for key, accuracy in accuracies.items()
        ]
        if accelerator.is_main_process:
            results = {
                "command": command_line(),
                "dataset": {"name": settings.dataset_name, "split": evaluation.eval_split, "images": total},
                "draws": evaluation.eval_draws,
                "accuracies": rows,
                "seconds": time.monotonic() - started,
                "device": str(accelerator.device),
                "versions": package_versions("accelerate", "datasets"),
            }
            Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
            write_json(results, Path(settings.output))
            table = [
                {
                    "sigma": f"{row['sigma']:g}",
                    "accuracy": f"{row['accuracy']:.1%}",
                    "95 % interval": "{:.1%} to {:.1%}".format(*row["interval_95"]),
                }
                for row in rows
            ]
            print_table(Console(), f"Majority of {evaluation.eval_draws} noisy copies, {total} images", table)
    accelerator.end_training()


if __name__ == "__main__":
    main()
