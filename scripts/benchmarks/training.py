"""Measure the training loop on this machine: its speed over that of a bare loop on the same model and batches.

    python scripts/benchmarks/training.py --output training-speed.json

The bare loop does forward, backward, clipping and the optimizer's step on one batch that is at hand; the rest is what
reading, augmenting, noise, seeding and logging cost. Images are the 200 that ship with the package, as often as it takes
for no epoch to end in a measurement.
"""

import argparse
import json
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
from hf_smoothing.training.optimizer import group_parameters
from hf_smoothing.training.training_images import ImageSettings, find_class_names
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.provenance import command_line, package_versions


def build(names: list[str], args: argparse.Namespace) -> MixedNoiseViTForImageClassification:
    torch.manual_seed(0)
    config = MixedNoiseViTConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        patch_size=args.patch_size,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return MixedNoiseViTForImageClassification(config)


def bare_seconds(model: nn.Module, steps: int, batch_size: int, device: torch.device) -> float:
    """Time of `steps` updates on one batch."""
    model = model.to(device=device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(group_parameters(model, 1.5e-3, 0.05, 1.0))
    pixels = torch.rand(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (batch_size,), device=device)
    started = 0.0
    for step in range(-1, steps):
        if step == 0:  # the first update allocates
            started = time.perf_counter()
        nn.functional.cross_entropy(model(pixels).logits, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def loop_seconds(images_file: Path, steps: int, args: argparse.Namespace) -> float:
    """Time of as many updates in the training loop, by the difference of a long and a short training."""
    seconds = []
    for length in (1, steps + 1):
        with tempfile.TemporaryDirectory() as folder:
            image_settings = ImageSettings(str(images_file), sigmas=[0.0, 0.25, 0.5, 1.0])
            images = image_settings.open()
            settings = TrainingSettings(
                folder,
                max_train_steps=length,
                per_device_train_batch_size=args.batch_size,
                checkpointing_steps="1000000",
            )
            model, accelerator = build(find_class_names(images), args), settings.create_accelerator()
            results = train_classifier(model, images, image_settings, settings, EvaluationSettings(), accelerator)
            seconds.append(results["seconds"])
    return seconds[1] - seconds[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="updates in one measurement (default: 5)")
    parser.add_argument("--repeats", type=int, default=15, help="measurements; their median is reported (default: 15)")
    parser.add_argument("--batch_size", type=int, default=128, help="images in a batch (default: 128)")
    parser.add_argument("--hidden_size", type=int, default=128, help="width of the model (default: 128)")
    parser.add_argument("--num_hidden_layers", type=int, default=4, help="its transformer blocks (default: 4)")
    parser.add_argument("--num_attention_heads", type=int, default=4, help="its attention heads (default: 4)")
    parser.add_argument("--patch_size", type=int, default=4, help="pixels a side of a token (default: 4)")
    parser.add_argument("--output", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    ratios, speeds = [], []
    with tempfile.TemporaryDirectory() as folder:
        images_file = Path(folder) / "images.parquet"
        demo = load_demo_images()
        concatenate_datasets([demo] * math.ceil((args.steps + 2) * args.batch_size / len(demo))).to_parquet(
            images_file
        )
        names = demo.features["label"].names
        sides = {
            "bare": lambda: bare_seconds(build(names, args), args.steps, args.batch_size, device),
            "loop": lambda: loop_seconds(images_file, args.steps, args),
        }
        for repeat in range(args.repeats):
            # in turn, and the first one in turn: a slow moment of the machine must not fall on one side alone
            order = list(sides) if repeat % 2 else list(sides)[::-1]
            seconds = {side: sides[side]() for side in order}
            ratios.append(seconds["bare"] / seconds["loop"])
            speeds.append(args.steps * args.batch_size / seconds["loop"])
    of_median: Any = quantile_test(ratios, p=0.5)
    low, high = of_median.confidence_interval(0.95)
    results = {
        "command": command_line(),
        "images_per_second": statistics.median(speeds),
        "ratio": statistics.median(ratios),
        "ratio_interval_95": [low, high],
        "ratios": ratios,
        "device": str(device),
        "num_threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in build(names, args).parameters()),
        "versions": package_versions(),
    }
    print(
        f"{results['images_per_second']:.0f} images/s, {results['ratio']:.3f} of a bare loop (median of {args.repeats}, "
        f"95 % interval {low:.3f} to {high:.3f})"
    )
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
