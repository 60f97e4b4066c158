"""What a certificate costs: the engine against the bare forward pass, the rule against Wald's bound, and both against the
usual protocol.

    python scripts/benchmarks/certification.py --quick        # under two minutes on two cores
    python scripts/benchmarks/certification.py --output benchmark.json

Draws to decide a radius are simulated from class frequencies measured on the shipped images, so that every rule sees the
same images, and many more draws than there is time to make.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import special

from hf_smoothing import GaussianNoise, SequentialRule, SmoothedClassifier, load_demo_images
from hf_smoothing.core.bounds import clopper_pearson_lower
from hf_smoothing.core.preprocessing import to_pixels
from hf_smoothing.core.sampling_rule import CleanPass
from hf_smoothing.diagnostics.simulation import simulate, wald_draws
from hf_smoothing.utils.provenance import command_line, package_versions

BUDGET = 100_000
USUAL = 100 + BUDGET
STAGES = (100, 1_000, 10_000, BUDGET)
RADII = (0.25, 0.5, 0.75, 1.0)


Sampler = Callable[[int], np.ndarray]


def uncut(draw: Sampler, radius: float, noise: GaussianNoise, alpha: float, step: int = 8) -> tuple[bool, int]:
    """100 draws choose the class; then the e-process of the whole Jeffreys (Krichevsky-Trofimov) prior, claimed above p0."""
    p0 = noise.probability_needed(radius)
    top = int(draw(100).argmax())
    hits = draws = 0
    while draws < BUDGET:
        hits += int(draw(step)[top])
        draws += step
        log_e = special.betaln(0.5 + hits, 0.5 + draws - hits) - special.betaln(0.5, 0.5)
        log_e -= special.xlogy(hits, p0) + special.xlog1py(draws - hits, -p0)
        if log_e >= np.log(1 / alpha) or (hits < p0 * draws and log_e >= np.log(100)):
            return hits > p0 * draws, 100 + draws
        step = max(8, draws // 64)
    return False, 100 + draws


def staged(draw: Sampler, radius: float, noise: GaussianNoise, alpha: float) -> tuple[bool, int]:
    """100 draws choose the class; Clopper-Pearson at 100, 1,000, 10,000, 100,000 draws with alpha split (Horvath 2022)."""
    p0 = noise.probability_needed(radius)
    top = int(draw(100).argmax())
    hits = draws = 0
    for stage in STAGES:
        hits += int(draw(stage - draws)[top])
        draws = stage
        if clopper_pearson_lower(hits, draws, alpha / len(STAGES)) > p0:
            return True, 100 + draws
        if clopper_pearson_lower(draws - hits, draws, alpha / len(STAGES)) > 1 - p0:
            break
    return False, 100 + draws


def draws_to_decide(
    counts: np.ndarray, scores: np.ndarray, sigma: float, alpha: float, repeats: int
) -> list[dict[str, Any]]:
    """Mean draws of each rule for each radius, over the images whose measured p clears it and over all of them."""
    noise = GaussianNoise(sigma)
    generator = np.random.default_rng(0)
    frequencies = counts / counts.sum(1, keepdims=True)
    rows = []
    for radius in RADII:
        p0 = noise.probability_needed(radius)
        clears = frequencies.max(1) > p0
        bound = np.array([wald_draws(p, p0, alpha) for p in frequencies[clears].max(1)])
        # an image whose p is within a hair of p0 is nobody's to claim: leave out what the budget cannot decide
        decidable = bound <= BUDGET / 4
        found: dict[str, list[tuple[bool, int]]] = {"ours": [], "uncut": [], "staged": []}
        for p, image_scores in zip(frequencies, scores):

            def draw(count: int, p: np.ndarray = p) -> np.ndarray:
                return generator.multinomial(count, p)

            rule, clean = SequentialRule(radii=(radius,), alpha=alpha, max_draws=BUDGET), CleanPass(image_scores)
            for _ in range(repeats):
                outcome, spent_on = simulate(rule, noise, p, clean, generator)
                # the clean pass counts as a draw
                found["ours"].append((noise.radius(outcome.p_lower, outcome.p_upper) >= radius, 1 + spent_on))
                found["uncut"].append(uncut(draw, radius, noise, alpha))
                found["staged"].append(staged(draw, radius, noise, alpha))
        spent = {name: np.array([n for _, n in runs]).reshape(-1, repeats).mean(1) for name, runs in found.items()}
        claimed = {name: np.array([c for c, _ in runs]).reshape(-1, repeats).mean(1) for name, runs in found.items()}
        chosen = np.flatnonzero(clears)[decidable]
        rows.append(
            {
                "radius": radius,
                "sigma": sigma,
                "images": len(counts),
                "images_that_clear": int(clears.sum()),
                "of_them_decidable": len(chosen),
                "wald": mean(bound[decidable]),
                **{f"{name}_clearing": mean(values[chosen]) for name, values in spent.items()},
                **{f"{name}_claimed": mean(values[chosen]) for name, values in claimed.items()},
                **{f"{name}_all": float(values.mean()) for name, values in spent.items()},
                "fixed": USUAL,
            }
        )
    return rows


def mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def engine_over_bare(smoothed: SmoothedClassifier, pixels: list[torch.Tensor], repeats: int) -> dict[str, Any]:
    """Draws a second of the engine over those of the bare forward pass on batches of the same sizes; medians."""
    classifier, sizes = smoothed.base_classifier.classifier, list[int]()

    def spy(batch: torch.Tensor) -> Any:
        sizes.append(len(batch))
        return classifier(batch)

    rule = SequentialRule(radii=(0.25, 0.5), max_draws=400)

    def certify() -> None:
        for _ in smoothed.certify_stream(pixels, rule):
            pass

    smoothed.base_classifier.classifier = spy
    certify()
    smoothed.base_classifier.classifier = classifier
    shape = pixels[0].shape
    batches = {size: torch.rand(size, *shape) for size in set(sizes)}

    @torch.inference_mode()
    def bare() -> None:
        for size in sizes:
            classifier(batches[size])

    plain = SmoothedClassifier(classifier, GaussianNoise(smoothed.noise.sigma, lattice=False))

    def certify_in_floats() -> None:
        for _ in plain.certify_stream(pixels, rule):
            pass

    seconds: dict[str, list[float]] = {"engine": [], "bare": [], "floats": []}
    for _ in range(repeats):  # in turns, so that a slow moment of the machine meets all alike
        seconds["bare"].append(timed(bare))
        seconds["engine"].append(timed(certify))
        seconds["floats"].append(timed(certify_in_floats))
    ratios = [bare / engine for bare, engine in zip(seconds["bare"], seconds["engine"])]
    return {
        "draws": sum(sizes),
        "batches": len(sizes),
        "engine_draws_per_second": sum(sizes) / statistics.median(seconds["engine"]),
        "bare_draws_per_second": sum(sizes) / statistics.median(seconds["bare"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds_with_lattice_over_floats": statistics.median(
            engine / floats for engine, floats in zip(seconds["engine"], seconds["floats"])
        ),
    }


@torch.inference_mode()
def usual_protocol_seconds(
    smoothed: SmoothedClassifier, pixels: torch.Tensor, measured: int, batch: int = 1000
) -> float:
    """Seconds an image of the usual protocol, one image at a time, extrapolated from `measured` of its draws."""

    def part() -> None:
        for first in range(0, measured, batch):
            size = min(batch, measured - first)
            noisy = pixels + smoothed.noise.sigma * torch.randn(size, *pixels.shape)
            smoothed.base_classifier.classifier(noisy).logits.argmax(1).bincount(minlength=10)

    return timed(part) * USUAL / measured


def shown(draws: float | None) -> str:
    return "-" if draws is None else f"{draws:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/mixed-noise-vit-nano-cifar10")
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument(
        "--quick", action="store_true", help="fewer images and repeats: under two minutes on two cores"
    )
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    parser.add_argument(
        "--engine_only", action="store_true", help="time the engine alone, and put that into an --output that is there"
    )
    args = parser.parse_args()
    num_images, measure, repeats = (40, 300, 3) if args.quick else (200, 500, 5)

    console = Console()
    smoothed = SmoothedClassifier.from_pretrained(args.model, GaussianNoise(args.sigma))
    pictures = load_demo_images().select(range(num_images))["image"]
    pixels = [to_pixels(picture, smoothed.preprocessing) for picture in pictures]
    if args.engine_only:
        engine = engine_over_bare(smoothed, pixels[: 12 if args.quick else 40], repeats=5)
        engine["command"] = command_line()
        console.print(engine)
        if args.output:
            args.output.write_text(
                json.dumps({**json.loads(args.output.read_text()), "engine": engine}, indent=2) + "\n"
            )
        return
    console.print(f"Measuring class frequencies: {measure} draws of each of {num_images} images ...")
    measured = smoothed.certify(pixels, "fixed", n0=1, n=measure, progress=True)
    counts = np.array([found.counts for found in measured])
    with torch.inference_mode():
        scores = smoothed.base_classifier.classifier(torch.stack(pixels)).logits.double().numpy()
    console.print("Timing the engine ...")
    engine = engine_over_bare(smoothed, pixels[: 12 if args.quick else 40], repeats=5)
    console.print("Simulating the rules ...")
    decide = draws_to_decide(counts, scores, args.sigma, args.alpha, repeats)
    usual = usual_protocol_seconds(smoothed, pixels[0], 2000)
    job = timed(lambda: smoothed.certify(pixels[:20], radii=RADII[:2], max_draws=2000)) / 20

    table = Table(
        title=f"Mean draws to decide a radius (sigma = {args.sigma:g}, alpha = {args.alpha:g}, {num_images} images)"
    )
    for column in (
        "r",
        "images that clear it",
        "Wald",
        "ours",
        "/ Wald",
        "uncut, n0",
        "staged CP",
        "fixed",
        "ours, all images",
    ):
        table.add_column(column, justify="right")
    for row in decide:
        table.add_row(
            f"{row['radius']:g}",
            f"{row['of_them_decidable']} of {row['images_that_clear']}",
            *(shown(row[key]) for key in ("wald", "ours_clearing")),
            f"{row['ours_clearing'] / row['wald']:.2f}" if row["wald"] else "-",
            *(shown(row[key]) for key in ("uncut_clearing", "staged_clearing", "fixed", "ours_all")),
        )
    console.print(table)
    console.print(
        f"Engine: {engine['engine_draws_per_second']:.0f} draws/s, {engine['ratio']:.3f} of the bare forward pass "
        f"({engine['bare_draws_per_second']:.0f}); the lattice takes "
        f"{engine['seconds_with_lattice_over_floats'] - 1:+.1%} time."
    )
    console.print(
        f"Deciding r = .25 and .5: {job:.2f} s an image; the usual protocol: {usual:.0f} s (extrapolated from 2,000 draws)."
    )
    if args.output:
        results = {
            "command": command_line(),
            "model": args.model,
            "sigma": args.sigma,
            "alpha": args.alpha,
            "budget": BUDGET,
            "measured_draws_an_image": measure,
            "repeats": repeats,
            "seed": 0,
            "engine": engine,
            "draws_to_decide": decide,
            "seconds_an_image": job,
            "seconds_an_image_usual_protocol_extrapolated": usual,
            "device": str(smoothed.device),
            "num_threads": torch.get_num_threads(),
            "dtype": "float32",
            "versions": package_versions(),
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
