"""Benchmark what users ask first, "how far does it hold?": pictures one by one, with real draws.

    python scripts/benchmarks/single_pictures.py --output single-pictures.json

Every shipped picture is certified alone, by the default rule and by the usual protocol (n0 = 100, n = 1,000), in turn.
Seconds are those of the call, with the model loaded and the plan of the default rule made.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm

from hf_smoothing import FixedRule, GaussianNoise, SmoothedClassifier, TwoStageRule, load_demo_images
from hf_smoothing.core.certificates import Certificate
from hf_smoothing.core.preprocessing import to_pixels
from hf_smoothing.core.rule_protocols import Rule
from hf_smoothing.reporting.tables import print_table
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions


def certify_in_turn(
    smoothed: SmoothedClassifier, pixels: list[torch.Tensor], rules: dict[str, Rule], seed: int
) -> dict[str, list[tuple[Certificate, float]]]:
    """Certificates and seconds of each picture, by rule."""
    results: dict[str, list[tuple[Certificate, float]]] = {name: [] for name in rules}
    for rule in rules.values():  # plans are made once, for all pictures
        list(smoothed.certify_stream(pixels[:1], rule, seed=seed + 1))
    for picture in tqdm(pixels, desc=f"sigma {smoothed.noise.sigma:g}"):
        for name, rule in rules.items():
            start = time.perf_counter()
            ((_, certificate),) = smoothed.certify_stream([picture], rule, seed=seed)
            results[name].append((certificate, time.perf_counter() - start))
    return results


def summarize(results: list[tuple[Certificate, float]], labels: list[int]) -> dict[str, Any]:
    certificates = [certificate for certificate, _ in results]
    radii = np.array([certificate.radius for certificate in certificates])
    right = np.array([certificate.prediction for certificate in certificates]) == np.array(labels)
    draws = np.array([certificate.num_samples for certificate in certificates])
    seconds = np.array([seconds for _, seconds in results])
    return {
        "images": len(results),
        "mean_radius": float(radii.mean()),
        "mean_radius_right": float((radii * right).mean()),
        "certified": float((radii > 0).mean()),
        "mean_draws": float(draws.mean()),
        "median_draws": float(np.median(draws)),
        "mean_seconds": float(seconds.mean()),
        "median_seconds": float(np.median(seconds)),
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = [
        {
            "sigma": f"{row['sigma']:g}",
            "rule": row["rule"],
            "mean radius": f"{row['mean_radius']:.3f}",
            "draws, mean": f"{row['mean_draws']:,.0f}",
            "median": f"{row['median_draws']:,.0f}",
            "seconds, mean": f"{row['mean_seconds']:.2f}",
            "median ": f"{row['median_seconds']:.2f}",
        }
        for row in rows
    ]
    print_table(console, "Pictures one by one", table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/mixed-noise-vit-nano-cifar10", help="folder of a model")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="noise levels")
    parser.add_argument("--every", type=int, default=1, help="use every n-th picture (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    examples = load_demo_images().select(range(0, 200, args.every))
    rules: dict[str, Rule] = {"two-stage": TwoStageRule(), "fixed": FixedRule(n0=100, n=1_000)}
    results: dict[str, Any] = {
        "command": command_line(),
        "model": args.model,
        "seed": args.seed,
        "alpha": rules["fixed"].alpha,
        "draws": TwoStageRule().draws,
        "device": "cpu",
        "num_threads": torch.get_num_threads(),
        "rows": [],
        "versions": package_versions(),
    }
    for sigma in args.sigma:
        smoothed = SmoothedClassifier.from_pretrained(args.model, GaussianNoise(sigma))
        pixels = [to_pixels(picture, smoothed.preprocessing) for picture in examples["image"]]
        for name, certificates in certify_in_turn(smoothed, pixels, rules, args.seed).items():
            results["rows"].append({"sigma": sigma, "rule": name} | summarize(certificates, examples["label"]))
        if args.output:  # after each noise level: a run takes long
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(results, args.output)
    show(results["rows"], Console())


if __name__ == "__main__":
    main()
