"""Benchmark the training loop: its speed relative to a bare loop with the same model and batch size.

Example:
    python scripts/benchmarks/training.py --output training-speed.json

The bare loop computes forward and backward passes, clips gradients and updates weights, always on the same batch. The
difference is the cost of reading, augmentation, noise, seeds and logging. The images are the 200 that ship with the package,
repeated so often that no epoch ends during a measurement.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from scipy.stats import quantile_test
from torch import nn

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification, load_demo_images
from hf_smoothing.training.classifier_training import train_classifier
from hf_smoothing.training.evaluation import EvaluationSettings
from hf_smoothing.training.parameter_groups import group_parameters
from hf_smoothing.training.training_images import ImageSettings, find_class_names
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

STEPS = 5  # updates in one measurement
BATCH_SIZE = 128
ARCHITECTURE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 4}


def build_model(class_names: list[str], args: argparse.Namespace) -> MixedNoiseViTForImageClassification:
    torch.manual_seed(0)
    architecture = {name: getattr(args, name) for name in ARCHITECTURE}
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
    }
    return MixedNoiseViTForImageClassification(MixedNoiseViTConfig(**architecture, **labels))


def time_bare_loop(model: nn.Module, device: torch.device) -> float:
    """Seconds of the updates on one batch."""
    model = model.to(device=device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(group_parameters(model, 1.5e-3, 0.05, 1.0))
    pixels = torch.rand(BATCH_SIZE, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (BATCH_SIZE,), device=device)
    started = 0.0
    for step in range(-1, STEPS):
        if step == 0:  # the first update allocates
            started = time.perf_counter()
        nn.functional.cross_entropy(model(pixels).logits, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def time_training_loop(images_file: Path, args: argparse.Namespace) -> float:
    """Seconds of as many updates in the training loop: the difference of a long and a short training."""
    seconds = []
    for length in (1, STEPS + 1):
        with tempfile.TemporaryDirectory() as folder:
            image_settings = ImageSettings(str(images_file), sigmas=[0.0, 0.25, 0.5, 1.0])
            images = image_settings.open()
            settings = TrainingSettings(
                folder, max_train_steps=length, per_device_train_batch_size=BATCH_SIZE, checkpointing_steps="1000000"
            )
            model, accelerator = build_model(find_class_names(images), args), settings.create_accelerator()
            results = train_classifier(model, images, image_settings, settings, EvaluationSettings(), accelerator)
            seconds.append(results["seconds"])
    return seconds[1] - seconds[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="measurements; their median is reported (default: 15)")
    for name, default in ARCHITECTURE.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of the model (default: {default})")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    ratios, speeds = [], []
    with tempfile.TemporaryDirectory() as folder:
        images_file = Path(folder) / "images.parquet"
        demo = load_demo_images()
        copies = [demo] * math.ceil((STEPS + 2) * BATCH_SIZE / len(demo))
        concatenate_datasets(copies).to_parquet(images_file)
        class_names = demo.features["label"].names
        loops = {
            "bare": lambda: time_bare_loop(build_model(class_names, args), device),
            "loop": lambda: time_training_loop(images_file, args),
        }
        for repeat in range(args.repeats):
            # alternate their order, so that a slow moment of the machine affects both
            order = list(loops) if repeat % 2 else list(loops)[::-1]
            seconds = {name: loops[name]() for name in order}
            ratios.append(seconds["bare"] / seconds["loop"])
            speeds.append(STEPS * BATCH_SIZE / seconds["loop"])
    median_test: Any = quantile_test(ratios, p=0.5)
    low, high = median_test.confidence_interval(0.95)
    results = {
        "command": command_line(),
        "images_per_second": statistics.median(speeds),
        "ratio": statistics.median(ratios),
        "ratio_interval_95": [low, high],
        "ratios": ratios,
        "device": str(device),
        "num_threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in build_model(class_names, args).parameters()),
        "versions": package_versions(),
    }
    print(
        f"{results['images_per_second']:.0f} images/s, {results['ratio']:.3f} of a bare loop (median of {args.repeats}, "
        f"95 % interval {low:.3f} to {high:.3f})"
    )
    if args.output:
        write_json(results, args.output)


if __name__ == "__main__":
    main()
