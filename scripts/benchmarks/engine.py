"""Benchmark the engine: its draws per second over those of the bare forward pass.

Examples:
    python scripts/benchmarks/engine.py --quick               # a quarter of an hour on two cores
    python scripts/benchmarks/engine.py --output engine.json

Three classifiers: a model, one that takes a twentieth of its time, and one that takes almost none, on images of four pixels,
which shows the engine's own ceiling. The bare forward pass classifies batches of the same sizes that are already there.
"""

import argparse
import statistics
import timeit
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from hf_smoothing import FixedRule, GaussianNoise, SequentialRule, SmoothedClassifier, TwoStageRule, load_demo_images
from hf_smoothing.core.base_classifier import Classifier
from hf_smoothing.core.lattice import LatticeSampler
from hf_smoothing.core.preprocessing import to_pixels
from hf_smoothing.core.rule_protocols import Rule
from hf_smoothing.reporting.tables import print_table
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

RADII = (0.25, 0.5)
REPEATS = 9
IMAGE_SHARES = {"decide": 0.4, "fixed": 0.05, "find": 0.2, "predict": 1.0}
"""The part of the images that a rule gets: so that all take some full batches, since the last ones of a run are not full."""
Pixels = list[torch.Tensor]

measure_seconds = partial(timeit.timeit, number=1)


class FreeClassifier(nn.Module):
    """Logits that are a linear function of four pixels."""

    def __init__(self, num_classes: int):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.directions = nn.Parameter(torch.randn(4, num_classes, generator=generator), requires_grad=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.flatten(1) - 0.5) @ self.directions


def make_cheap_classifier() -> nn.Module:
    """A perceptron of 7 MFLOPs, a twentieth of the shipped model's."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 1152), nn.ReLU(), nn.Linear(1152, 10))


def make_rules(max_draws: int) -> dict[str, Rule]:
    return {
        "decide": SequentialRule(radii=RADII, max_draws=max_draws),
        "fixed": FixedRule(n0=100, n=max_draws),
        "find": TwoStageRule(draws=200, max_draws=max_draws),
        "predict": SequentialRule(radii=(0.0,), max_draws=max_draws),
    }


def certify(smoothed: SmoothedClassifier, pixels: Pixels, rule: Rule) -> int:
    """Certify all images; the number of forward passes."""
    return sum(certificate.num_samples for _, certificate in smoothed.certify_stream(pixels, rule, seed=0))


def record_batch_sizes(smoothed: SmoothedClassifier, pixels: Pixels, rule: Rule) -> list[int]:
    """The sizes of the forward passes of a run."""
    sizes: list[int] = []
    base = smoothed.base_classifier
    classifier = base.classifier

    def record(batch: torch.Tensor) -> Any:
        sizes.append(len(batch))
        return classifier(batch)

    base.classifier = record
    try:
        certify(smoothed, pixels, rule)
    finally:
        base.classifier = classifier
    return sizes


def measure_noise_share(smoothed: SmoothedClassifier, pixels: Pixels, rule: Rule) -> float:
    """The share of a run's time that it draws noise; on CUDA, launches it."""
    seconds = 0.0
    on_device = LatticeSampler.on_device

    def timed(*args: Any) -> LatticeSampler:
        sampler = on_device(*args)
        draw = sampler.draw

        def timed_draw(*args: Any) -> torch.Tensor:
            nonlocal seconds
            result: list[torch.Tensor] = []
            seconds += measure_seconds(lambda: result.append(draw(*args)))
            return result[0]

        sampler.draw = timed_draw  # type: ignore[assignment, method-assign]
        return sampler

    LatticeSampler.on_device = staticmethod(timed)  # type: ignore[assignment, method-assign]
    try:
        total = measure_seconds(lambda: certify(smoothed, pixels, rule))
    finally:
        LatticeSampler.on_device = staticmethod(on_device)  # type: ignore[method-assign]
    return seconds / total


def compare(smoothed: SmoothedClassifier, pixels: Pixels, rule: Rule) -> dict[str, Any]:
    """Draws per second of the engine and of the bare forward pass, in turn; medians."""
    device, classifier = smoothed.device, smoothed.base_classifier.classifier
    autocast = smoothed.base_classifier.autocast
    sizes = record_batch_sizes(smoothed, pixels, rule)
    batches = {size: torch.rand(size, *pixels[0].shape, device=device) for size in set(sizes)}

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def classify() -> None:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            for size in sizes:
                classifier(batches[size])
        synchronize()

    bare, engine = [], []
    for _ in range(REPEATS):  # in turn, so that a slow moment of the machine affects both
        bare.append(measure_seconds(classify))
        engine.append(measure_seconds(lambda: certify(smoothed, pixels, rule)))
    ratios = [first / second for first, second in zip(bare, engine)]
    return {
        "draws": sum(sizes),
        "draws_per_image": sum(sizes) / len(pixels),
        "engine_draws_per_second": sum(sizes) / statistics.median(engine),
        "bare_draws_per_second": sum(sizes) / statistics.median(bare),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "noise_share": measure_noise_share(smoothed, pixels, rule),
    }


def measure(
    classifiers: dict[str, tuple[Callable[[int], SmoothedClassifier], Pixels, int, Sequence[int]]],
) -> Iterator[dict[str, Any]]:
    """
    A row per classifier, rule and batch size. By name, classifiers are: what makes the smoothed classifier for a batch size,
    its images, draws per image, and batch sizes.
    """
    num_threads = torch.get_num_threads()
    for name, (make, pixels, max_draws, batch_sizes) in classifiers.items():
        for batch_size in batch_sizes:
            for rule_name, rule in make_rules(max_draws).items():
                images = pixels[: round(IMAGE_SHARES[rule_name] * len(pixels))]
                smoothed = make(batch_size)
                row = {"classifier": name, "rule": rule_name, "batch_size": batch_size, "images": len(images)}
                # the ceiling is that of one core
                torch.set_num_threads(1 if name.startswith("free") else num_threads)
                row["num_threads"] = torch.get_num_threads()
                yield row | compare(smoothed, images, rule)
    torch.set_num_threads(num_threads)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = [
        {
            "classifier": row["classifier"],
            "rule": row["rule"],
            "batch": row["batch_size"],
            "draws/s": f"{row['engine_draws_per_second']:,.0f}",
            "bare": f"{row['bare_draws_per_second']:,.0f}",
            "ratio": f"{row['ratio']:.3f}",
            "noise": f"{row['noise_share']:.1%}",
        }
        for row in rows
    ]
    print_table(console, "Draws per second of the engine and of the bare forward pass", table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/mixed-noise-vit-nano-cifar10", help="folder of a model")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="smaller batches only")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    device = torch.device(args.device)
    noise = GaussianNoise(0.25)
    shipped = SmoothedClassifier.from_pretrained(args.model, noise, device=device)
    pixels = [to_pixels(picture, shipped.preprocessing) for picture in load_demo_images()["image"]]
    generator = torch.Generator().manual_seed(1)
    tiny = list(torch.randint(0, 256, (3000, 1, 2, 2), generator=generator) / 255)
    cheap = make_cheap_classifier().to(device)

    def smooth(classifier: Classifier, batch_size: int, autocast: torch.dtype | None = None) -> SmoothedClassifier:
        return SmoothedClassifier(classifier, noise, batch_size=batch_size, device=device, autocast=autocast)

    model = shipped.base_classifier.classifier
    on_cuda = device.type == "cuda"
    small, large = ([1024] if on_cuda else [128]), ([] if args.quick else [4096])
    classifiers: dict[str, Any] = {
        "shipped model": (partial(smooth, model), pixels[:100], 400, small + large),
        "a twentieth": (partial(smooth, cheap), pixels, 1000, [128, 1024, *large]),
    }
    if on_cuda:
        bfloat16 = partial(smooth, model, autocast=torch.bfloat16)
        classifiers["shipped model, bfloat16"] = (bfloat16, pixels[:100], 400, small + large)
    for num_classes in (10, 100):
        free = FreeClassifier(num_classes).to(device)
        classifiers[f"free, {num_classes} classes"] = (partial(smooth, free), tiny, 10_000, [1024, *large])
    results: dict[str, Any] = {
        "command": command_line(),
        "model": args.model,
        "sigma": noise.sigma,
        "radii": RADII,
        "seed": 0,
        "device": torch.cuda.get_device_name() if on_cuda else str(device),
        "num_threads": torch.get_num_threads(),
        "rows": [],
        "versions": package_versions(),
    }
    for row in measure(classifiers):
        results["rows"].append(row)
        print(row["classifier"], row["rule"], row["batch_size"], f"{row['ratio']:.3f}", flush=True)
        if args.output:  # after each row: a run takes long
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(results, args.output)
    show(results["rows"], Console())


if __name__ == "__main__":
    main()
