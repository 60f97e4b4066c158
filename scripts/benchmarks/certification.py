"""Benchmark certification: the engine against the bare forward pass, and the sequential rule against other rules.

Examples:
    python scripts/benchmarks/certification.py --quick        # under two minutes on two cores
    python scripts/benchmarks/certification.py --output benchmark.json

Draws to decide a radius are simulated from class frequencies measured on the shipped images. So every rule gets the same
images, and many more draws than there is time to make.
"""

import argparse
import statistics
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy import special

from hf_smoothing import GaussianNoise, SequentialRule, SmoothedClassifier, load_demo_images
from hf_smoothing.core.bounds import clopper_pearson_lower
from hf_smoothing.core.preprocessing import to_pixels
from hf_smoothing.core.rule_protocols import CleanPass
from hf_smoothing.diagnostics.simulation import simulate, wald_draws
from hf_smoothing.reporting.tables import print_table
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

BUDGET = 100_000
USUAL = 100 + BUDGET
"""Draws per image of the usual protocol."""
STAGES = (100, 1_000, 10_000, BUDGET)
RADII = (0.25, 0.5, 0.75, 1.0)
ENGINE_REPEATS = 5
TIMED_DRAWS = 2000
BATCH_SIZE = 1000

Sampler = Callable[[int], np.ndarray]
"""Class counts of a number of draws."""


def decide_uncut(draw: Sampler, radius: float, noise: GaussianNoise, alpha: float) -> tuple[bool, int]:
    """100 draws select the class; then an e-process with the Jeffreys prior (Krichevsky-Trofimov) on all of (0, 1)."""
    p_needed = noise.probability_needed(radius)
    top = int(draw(100).argmax())
    hits, draws, step = 0, 0, 8
    while draws < BUDGET:
        hits += int(draw(step)[top])
        draws += step
        log_e = special.betaln(0.5 + hits, 0.5 + draws - hits) - special.betaln(0.5, 0.5)
        log_e -= special.xlogy(hits, p_needed) + special.xlog1py(draws - hits, -p_needed)
        above = hits > p_needed * draws
        if log_e >= np.log(1 / alpha) or (hits < p_needed * draws and log_e >= np.log(100)):
            return above, 100 + draws
        step = max(8, draws // 64)
    return False, 100 + draws


def decide_in_stages(draw: Sampler, radius: float, noise: GaussianNoise, alpha: float) -> tuple[bool, int]:
    """100 draws select the class; then Clopper-Pearson at each stage, with a share of alpha (Horvath 2022)."""
    p_needed, alpha = noise.probability_needed(radius), alpha / len(STAGES)
    top = int(draw(100).argmax())
    hits = draws = 0
    for stage in STAGES:
        hits += int(draw(stage - draws)[top])
        draws = stage
        if clopper_pearson_lower(hits, draws, alpha) > p_needed:
            return True, 100 + draws
        if clopper_pearson_lower(draws - hits, draws, alpha) > 1 - p_needed:
            break
    return False, 100 + draws


def compare_rules(
    counts: np.ndarray, logits: np.ndarray, sigma: float, alpha: float, repeats: int
) -> list[dict[str, Any]]:
    """Mean draws of each rule for each radius: over the images whose measured p suffices for it, and over all."""
    noise = GaussianNoise(sigma)
    generator = np.random.default_rng(0)
    frequencies = counts / counts.sum(1, keepdims=True)
    rows = []
    for radius in RADII:
        p_needed = noise.probability_needed(radius)
        clears = frequencies.max(1) > p_needed
        bounds = np.array([wald_draws(p, p_needed, alpha) for p in frequencies[clears].max(1)])
        # no rule can decide an image whose p is very near p_needed: leave out what the budget does not suffice for
        decidable = bounds <= BUDGET / 4
        draws, claims = simulate_rules(frequencies, logits, radius, noise, alpha, repeats, generator)
        images = np.flatnonzero(clears)[decidable]
        rows.append(
            {
                "radius": radius,
                "sigma": sigma,
                "images": len(counts),
                "images_that_clear": int(clears.sum()),
                "of_them_decidable": len(images),
                "wald": mean(bounds[decidable]),
                **{f"{name}_clearing": mean(values[images]) for name, values in draws.items()},
                **{f"{name}_claimed": mean(values[images]) for name, values in claims.items()},
                **{f"{name}_all": mean(values) for name, values in draws.items()},
                "fixed": USUAL,
            }
        )
    return rows


def simulate_rules(
    frequencies: np.ndarray,
    logits: np.ndarray,
    radius: float,
    noise: GaussianNoise,
    alpha: float,
    repeats: int,
    generator: np.random.Generator,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """For each rule and image, over `repeats` simulations: the mean draws, and the share that claims the radius."""
    rule = SequentialRule(radii=(radius,), alpha=alpha, max_draws=BUDGET)
    decisions: dict[str, list[tuple[bool, int]]] = {"ours": [], "uncut": [], "staged": []}
    for p, image_logits in zip(frequencies, logits):
        clean = CleanPass(np.tile(image_logits, (repeats, 1)))
        outcomes, num_draws = simulate(rule, noise, np.tile(p, (repeats, 1)), clean, generator)
        decisions["ours"] += zip(outcomes.radii >= radius, 1 + num_draws)  # the clean pass counts as a draw
        draw = partial(generator.multinomial, pvals=p)
        for _ in range(repeats):
            decisions["uncut"].append(decide_uncut(draw, radius, noise, alpha))
            decisions["staged"].append(decide_in_stages(draw, radius, noise, alpha))
    means = {name: np.reshape(pairs, (-1, repeats, 2)).mean(1) for name, pairs in decisions.items()}
    return {name: rows[:, 1] for name, rows in means.items()}, {name: rows[:, 0] for name, rows in means.items()}


def mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


measure_seconds = partial(timeit.timeit, number=1)


def compare_engine(smoothed: SmoothedClassifier, pixels: list[torch.Tensor]) -> dict[str, Any]:
    """Draws per second of the engine, and of the bare forward pass on batches of the same sizes; medians."""
    classifier, sizes = smoothed.base_classifier.classifier, list[int]()

    def record_size(batch: torch.Tensor) -> Any:
        sizes.append(len(batch))
        return classifier(batch)

    rule = SequentialRule(radii=(0.25, 0.5), max_draws=400)

    def certify(smoothed: SmoothedClassifier) -> None:
        for _ in smoothed.certify_stream(pixels, rule, seed=0):  # the same batches each time
            pass

    smoothed.base_classifier.classifier = record_size
    certify(smoothed)
    smoothed.base_classifier.classifier = classifier
    batches = {size: torch.rand(size, *pixels[0].shape) for size in set(sizes)}

    @torch.inference_mode()
    def classify() -> None:
        for size in sizes:
            classifier(batches[size])

    bare, engine = [], []
    for _ in range(ENGINE_REPEATS):  # in turn, so that a slow moment of the machine affects both
        bare.append(measure_seconds(classify))
        engine.append(measure_seconds(lambda: certify(smoothed)))
    ratios = [first / second for first, second in zip(bare, engine)]
    return {
        "draws": sum(sizes),
        "batches": len(sizes),
        "engine_draws_per_second": sum(sizes) / statistics.median(engine),
        "bare_draws_per_second": sum(sizes) / statistics.median(bare),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


@torch.inference_mode()
def estimate_usual_seconds(smoothed: SmoothedClassifier, pixels: torch.Tensor) -> float:
    """Seconds per image of the usual protocol, one image at a time, extrapolated from `TIMED_DRAWS` draws."""

    def count_classes() -> None:
        for _ in range(TIMED_DRAWS // BATCH_SIZE):
            noisy = pixels + smoothed.noise.sigma * torch.randn(BATCH_SIZE, *pixels.shape)
            smoothed.base_classifier.classifier(noisy).logits.argmax(1).bincount(minlength=10)

    return measure_seconds(count_classes) * USUAL / TIMED_DRAWS


def show(results: dict[str, Any], console: Console) -> None:
    """The results on the terminal."""

    def number(value: float | None, digits: int = 0) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    rows = [
        {
            "r": f"{row['radius']:g}",
            "images that clear it": f"{row['of_them_decidable']} of {row['images_that_clear']}",
            "Wald": number(row["wald"]),
            "ours": number(row["ours_clearing"]),
            "/ Wald": number(row["wald"] and row["ours_clearing"] / row["wald"], 2),
            "uncut, n0": number(row["uncut_clearing"]),
            "staged CP": number(row["staged_clearing"]),
            "fixed": number(row["fixed"]),
            "ours, all images": number(row["ours_all"]),
        }
        for row in results["draws_to_decide"]
    ]
    sigma, alpha = results["sigma"], results["alpha"]
    print_table(console, f"Mean draws to decide a radius (sigma = {sigma:g}, alpha = {alpha:g})", rows)
    engine = results["engine"]
    console.print(
        f"Engine: {engine['engine_draws_per_second']:.0f} draws/s, {engine['ratio']:.3f} of the bare forward pass "
        f"({engine['bare_draws_per_second']:.0f})."
    )
    console.print(
        f"Deciding r = .25 and .5 takes {results['seconds_an_image']:.2f} s per image, the usual protocol "
        f"{results['seconds_an_image_usual_protocol_extrapolated']:.0f} s (extrapolated from {TIMED_DRAWS:,} draws)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/mixed-noise-vit-nano-cifar10", help="folder of a model")
    parser.add_argument("--sigma", type=float, default=0.5, help="noise level (default: 0.5)")
    parser.add_argument("--alpha", type=float, default=0.001, help="level of the rules (default: 0.001)")
    quick = "fewer images and repeats: under two minutes on two cores"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    num_images, num_draws, repeats = (40, 300, 3) if args.quick else (200, 500, 5)
    console = Console()
    smoothed = SmoothedClassifier.from_pretrained(args.model, GaussianNoise(args.sigma))
    pictures = load_demo_images().select(range(num_images))["image"]
    pixels = [to_pixels(picture, smoothed.preprocessing) for picture in pictures]
    console.print("Timing the engine ...")
    engine = compare_engine(smoothed, pixels[: 12 if args.quick else 40])
    console.print(f"Measuring class frequencies with {num_draws} draws of each of {num_images} images ...")
    certificates = smoothed.certify(pixels, "fixed", n0=1, n=num_draws, seed=0, progress=True)
    counts = np.array([certificate.counts for certificate in certificates])
    with torch.inference_mode():
        logits = smoothed.base_classifier.classifier(torch.stack(pixels)).logits.double().numpy()
    console.print("Simulating the rules ...")
    results = {
        "command": command_line(),
        "model": args.model,
        "sigma": args.sigma,
        "alpha": args.alpha,
        "budget": BUDGET,
        "measured_draws_an_image": num_draws,
        "repeats": repeats,
        "seed": 0,
        "engine": engine,
        "draws_to_decide": compare_rules(counts, logits, args.sigma, args.alpha, repeats),
        "seconds_an_image": measure_seconds(
            lambda: smoothed.certify(pixels[:20], radii=RADII[:2], max_draws=2000, seed=0)
        )
        / 20,
        "seconds_an_image_usual_protocol_extrapolated": estimate_usual_seconds(smoothed, pixels[0]),
        "device": str(smoothed.device),
        "num_threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": package_versions(),
    }
    show(results, console)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(results, args.output)


if __name__ == "__main__":
    main()
