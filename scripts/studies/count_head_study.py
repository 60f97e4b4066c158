"""How good is a count head? Compares its estimates with Monte-Carlo certificates of the same images, counting all of them.

Example:
    accelerate launch scripts/certify.py --model_name_or_path my-model --dataset_name uoft-cs/cifar10 --every 20 \\
        --sigma 0.25 0.5 1 --method fixed --n 10000 --output_dir runs/fixed
    python scripts/studies/count_head_study.py --model my-model --count_head my-counts --run runs/fixed \\
        --sequential runs/sequential runs/sequential-with-the-head --output_dir my-counts/results

Writes OUTPUT_DIR/study.json and a picture: disagreement, over- and underestimation, calibration of the predicted p_A,
accuracy of the estimate and of the conformal radius beside Monte-Carlo, draws of the sequential rule with and without the
head, seconds per image, and the number of images after which the training has paid off. A head that `hf-smoothing calibrate`
calibrated, on other images and for as many draws, is evaluated as it is; besides, the study calibrates on random halves.
"""

import argparse
import json
import math
import sys
import timeit
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from tqdm.auto import tqdm

from hf_smoothing import GaussianNoise, SequentialRule, SmoothedClassifier
from hf_smoothing.core.count_predictor import CountPredictor
from hf_smoothing.core.rule_protocols import CleanPass, radii_in_reach
from hf_smoothing.core.weights import weights_digest
from hf_smoothing.count_head.calibrate import refuse_training_images
from hf_smoothing.count_head.comparison import Comparison, compare_with_certificates, predict_counts
from hf_smoothing.count_head.evaluation import (
    compute_errors,
    evaluate_calibration,
    evaluate_random_splits,
    expect_accuracy,
)
from hf_smoothing.count_head.measured_counts import MeasuredCounts, read_counts
from hf_smoothing.diagnostics.simulation import simulate, wald_draws
from hf_smoothing.reporting.report import summarize
from hf_smoothing.reporting.results import read_results
from hf_smoothing.reporting.tables import print_table
from hf_smoothing.runs.run_folder import RunFolder
from hf_smoothing.utils.errors import exit_on_error
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)
SETTINGS = ("model_name_or_path", "dataset_name", "split", "every")
DELTAS = (0.1, 0.05)
BUDGET = 100_000
USUAL = 100 + BUDGET  # draws per image of the usual protocol
MIN_REPEATS = 4  # simulations per image


def clean_passes(frequencies: np.ndarray, predicted: np.ndarray, logits: np.ndarray) -> dict[str, CleanPass]:
    """What the rule is told of an image: the classifier's logits, the head's ranking or its frequencies, lies, the truth."""
    permuted = np.roll(predicted, 1)
    sure = np.full(len(predicted), 0.001 / (len(predicted) - 1))
    sure[permuted.argmax()] = 0.999
    return {
        "without": CleanPass(logits),
        "ranking": CleanPass(np.log(predicted)),
        "with": CleanPass(predicted, frequencies=True),
        "permuted": CleanPass(permuted, frequencies=True),
        "permuted_and_sure": CleanPass(sure, frequencies=True),
        "knowing": CleanPass(frequencies, frequencies=True),
    }


def simulate_draws_to_decide(
    comparison: Comparison, logits: np.ndarray, radius: float, draws_a_repeat: int, seed: int
) -> dict[str, Any] | None:
    """
    Mean draws of the images whose measured p_A suffices for the radius and that a quarter of the budget can decide.

    An image is simulated once for every `draws_a_repeat` draws of its Wald bound, because a few hard images make up most of
    the mean and of its error. `logits` are those of the base classifier for the clean images, `(images, classes)`.
    """
    noise = GaussianNoise(comparison.sigma)
    p_needed = float(noise.probability_needed(radius))
    frequencies = comparison.counts / comparison.n
    # a class counted in every draw has an unknown p below 1: take it as if half a draw had missed
    top = np.minimum(frequencies.max(1), 1 - 0.5 / comparison.n)
    bounds = np.array([wald_draws(p, p_needed, comparison.alpha) if p > p_needed else np.inf for p in top])
    images = np.flatnonzero(bounds <= BUDGET / 4)
    if not len(images):
        return None
    rule = SequentialRule(radii=(radius,), alpha=comparison.alpha, max_draws=BUDGET)
    means: dict[str, list[float]] = defaultdict(list)
    variances: dict[str, list[float]] = defaultdict(list)
    claimed: dict[str, list[float]] = defaultdict(list)
    for image in tqdm(images, f"sigma {comparison.sigma:g}, radius {radius:g}", leave=False):
        passes = clean_passes(frequencies[image], comparison.probabilities[image], logits[image])
        repeats = max(MIN_REPEATS, math.ceil(bounds[image] / draws_a_repeat))
        for name, clean_pass in passes.items():
            generator = np.random.default_rng([seed, int(image)])
            clean = CleanPass(np.tile(clean_pass.scores, (repeats, 1)), clean_pass.frequencies)
            outcomes, num_draws = simulate(rule, noise, np.tile(frequencies[image], (repeats, 1)), clean, generator)
            means[name].append(float(1 + num_draws.mean()))  # the clean pass counts
            variances[name].append(float(num_draws.var(ddof=1)) / repeats)
            claimed[name].append(float((outcomes.radii >= radius).mean()))
    return {
        "sigma": comparison.sigma,
        "radius": radius,
        "images": len(images),
        "wald": float(bounds[images].mean()),
        "draws": {name: float(np.mean(values)) for name, values in means.items()},
        # the error of the simulation for these images, not the spread over other images
        "errors": {name: float(np.sqrt(sum(values)) / len(images)) for name, values in variances.items()},
        "claimed": {name: float(np.mean(values)) for name, values in claimed.items()},
    }


@torch.inference_mode()
def compute_clean_logits(smoothed: SmoothedClassifier, measured: MeasuredCounts) -> np.ndarray:
    """The base classifier's logits of the clean images: `(rows, classes)`."""
    inputs = measured.open_images().bind(measured.settings["label_names"], smoothed.preprocessing)
    indices, rows = np.unique(measured.indices, return_inverse=True)
    batches = np.array_split(indices, range(smoothed.batch_size, len(indices), smoothed.batch_size))
    logits = [
        smoothed.base_classifier([torch.stack([inputs[index][0] for index in batch]).to(smoothed.device)], 0.0)
        for batch in batches
    ]
    return torch.cat(logits).double().cpu().numpy()[rows]


def measure_seconds(
    args: argparse.Namespace,
    smoothed: SmoothedClassifier,
    predictor: CountPredictor,
    measured: MeasuredCounts,
    sequential: list[dict[str, Any]],
) -> dict[str, Any]:
    """Seconds per image: of the estimate in batches, and of the sampling rules at the measured rate of draws."""
    inputs = measured.open_images().bind(predictor.class_names, smoothed.preprocessing)
    indices = np.unique(measured.indices)[: args.batch_size]
    batch = torch.stack([inputs[index][0] for index in indices])
    sigma = float(measured.sigmas.max())

    def estimate() -> None:
        predictor(batch, sigma).cpu()

    estimate()  # warm up
    seconds_per_estimate = float(np.median(timeit.repeat(estimate, number=1, repeat=7))) / len(batch)
    draws = args.timed_draws
    smoothed.certify(batch[:1], method="counts", n=args.batch_size)
    timings = timeit.repeat(lambda: smoothed.certify(batch[:1], method="counts", n=draws), number=1, repeat=3)
    seconds_per_draw = float(np.median(timings)) / draws
    usual = seconds_per_draw * USUAL
    seconds = {"estimate": seconds_per_estimate, "usual": usual, "timed_draws": draws}
    seconds["ratio"] = usual / seconds_per_estimate
    if without_head := [row["draws"] for row in sequential if not row["with_head"]]:
        seconds["sequential"] = seconds_per_draw * float(np.mean(without_head))
        seconds["ratio_of_sequential"] = seconds["sequential"] / seconds_per_estimate
    return seconds


def plot(comparisons: list[Comparison], errors: list[dict[str, Any]], path: Path) -> None:
    """Estimated against certified radius, and the calibration of the predicted p_A."""
    figure = Figure(figsize=(4 * len(comparisons), 7.5), layout="constrained")
    axes = np.atleast_2d(figure.subplots(2, len(comparisons), squeeze=False))
    for comparison, row, (upper, lower) in zip(comparisons, errors, axes.T):
        certified, estimated, agrees = comparison.certified_radii, comparison.estimated_radii, comparison.agrees
        for images, label in ((agrees, "same class"), (~agrees, "another class, or Monte-Carlo abstains")):
            upper.scatter(certified[images], estimated[images], s=6, alpha=0.5, label=label)
        largest = max(certified.max(), estimated.max(), 1e-3)
        upper.plot([0, largest], [0, largest], color="gray", linewidth=0.8)
        upper.set(title=f"sigma = {comparison.sigma:g}", xlabel="Monte-Carlo radius", ylabel="estimated radius")
        curve = row["calibration_curve"]
        lower.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
        lower.plot([bin["predicted"] for bin in curve], [bin["measured"] for bin in curve], marker="o")
        lower.set(xlabel="predicted share of the top class", ylabel="measured share", xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def evaluate_own_calibration(comparison: Comparison, predictor: CountPredictor) -> list[dict[str, Any]]:
    """The claims of the head's own calibration, at each delta for which it has enough images."""
    calibration = predictor.calibration
    if calibration is None or (calibration.n, calibration.alpha) != (comparison.n, comparison.alpha):
        return []  # it is for other certificates
    if shared := calibration.count_shared_images(comparison.sigma, comparison.probabilities):
        raise ValueError(f"The head was calibrated on {shared} of the images of this very run: use a run on others.")
    return [
        {
            "sigma": comparison.sigma,
            "calibrated_on": calibration.description,
            **evaluate_calibration(comparison, calibration, delta, RADII, decided=decided),
        }
        for delta in DELTAS
        if delta * (calibration.images[comparison.sigma] + 1) >= 1
        for decided in list_questions(comparison)
    ]


def list_questions(comparison: Comparison) -> list[list[float] | None]:
    """The radii to decide: none (each image's own radius), all that the draws can show together, and each alone."""
    radii = radii_in_reach(RADII[1:], GaussianNoise(comparison.sigma), comparison.n, comparison.alpha)
    return [None, *([radii] if len(radii) > 1 else []), *([radius] for radius in radii)]


def read_sequential(runs: list[Path], measured: MeasuredCounts, head_weights: str) -> list[dict[str, Any]]:
    """Draws per image and accuracy of the sequential rule on the same images, without the head and with it."""
    rows: list[dict[str, Any]] = []
    results = read_results(runs)
    for result in results:
        if any(result.settings[name] != results[0].settings[name] for name in ("radii", "max_draws")):
            raise ValueError(f"{result.source} and {results[0].source} have different radii or budgets.")
        with_head = result.settings.get("count_head") is not None
        if with_head and result.settings["count_head_weights"] != head_weights:
            raise ValueError(f"{result.source} was made with another count head.")
        shared = ("dataset_name", "split", "every", "max_samples", "alpha", "model_weights")
        if differing := [name for name in shared if result.settings.get(name) != measured.settings[name]]:
            raise ValueError(f"{result.source} has another {', '.join(differing)} than the run of --method fixed.")
        accuracy = summarize([result], RADII)["results"][0]["certified_accuracy"]
        rows.append(
            {
                "sigma": result.sigma,
                "draws": float(np.mean(result.column("num_samples"))),
                "budget": result.settings["max_draws"],
                "with_head": with_head,
                "accuracy": [{name: row[name] for name in ("radius", "share", "standing")} for row in accuracy],
            }
        )
    return rows


def compute_payback(
    count_head: Path, counting_seconds: float | None, seconds: dict[str, Any]
) -> dict[str, float] | None:
    """The number of images from which on counting and training cost less time than certifying in other ways."""
    training = count_head / "results" / "training.json"
    if counting_seconds is None or not training.exists():
        return None
    trained = json.loads(training.read_text())
    spent = counting_seconds + trained["preparation_seconds"] + trained["seconds"]
    others = {"images": "usual", "images_of_sequential": "sequential"}
    payback = {name: spent / (seconds[rule] - seconds["estimate"]) for name, rule in others.items() if rule in seconds}
    return {"seconds": spent, **payback}


def read_seconds(run: Path) -> float:
    """Duration of a run, with the number of processes of its last session."""
    folder = RunFolder(run)
    seconds = sum(row["seconds"] for row in folder.read_records(["seconds"]))
    return seconds / folder.read_run()["sessions"][-1]["num_processes"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, text in {
        "--model": "base classifier",
        "--count_head": "count head",
        "--run": "finished run of --method fixed, on images not trained on",
        "--output_dir": "folder for study.json and the picture",
    }.items():
        parser.add_argument(flag, required=True, help=text)
    sequential = "finished runs of --method sequential on the same images, without and with the head, to compare with"
    parser.add_argument("--sequential", nargs="*", default=[], help=sequential)
    parser.add_argument("--counts", help="the run that the head was trained on, for its cost")
    for flag, default, text in (
        ("--batch_size", 256, "images per forward pass"),
        ("--timed_draws", 2048, "draws that measure the rate"),
        ("--splits", 200, "random calibration halves"),
        ("--expected_n", 10_000, "draws for which the expected Monte-Carlo accuracy is computed too"),
        ("--draws_a_repeat", 50, "simulate each image once for so many draws of Wald's bound, and at least 4 times"),
        ("--seed", 0, "seed of splits and simulated draws"),
        ("--device", "cpu", "device to compute on"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=f"{text} (default: {default})")
    return parser.parse_args()


def study(args: argparse.Namespace) -> None:
    """Compare, evaluate, simulate and time; write the results."""
    measured, count_head = read_counts(Path(args.run)), Path(args.count_head)
    if measured.settings["method"] != "fixed":
        raise ValueError(f"{args.run} is of method {measured.settings['method']!r}: use a run of --method fixed.")
    refuse_training_images(count_head, measured.settings)
    predictor = CountPredictor.from_pretrained(
        args.count_head, device=args.device, class_names=measured.settings["label_names"]
    )
    sequential = read_sequential([Path(run) for run in args.sequential], measured, weights_digest(predictor.model))
    comparisons = compare_with_certificates(measured, predict_counts(predictor, measured, args.count_head))
    smoothed = SmoothedClassifier.from_pretrained(
        args.model, GaussianNoise(0.5), batch_size=args.batch_size, device=args.device
    )
    logits = compute_clean_logits(smoothed, measured)
    calibrated = [row for comparison in comparisons for row in evaluate_own_calibration(comparison, predictor)]
    counting_seconds = None if args.counts is None else read_seconds(Path(args.counts))
    if predictor.calibration is not None and not calibrated:
        print("Left out: the head's own calibration. It is for other draws, or has too few images.", file=sys.stderr)
    errors = [compute_errors(comparison, RADII) for comparison in comparisons]
    seconds = measure_seconds(args, smoothed, predictor, measured, sequential)
    simulations = [
        simulate_draws_to_decide(comparison, logits[rows], share * comparison.sigma, args.draws_a_repeat, args.seed)
        for comparison in comparisons
        for rows in [measured.sigmas == comparison.sigma]
        for share in (0.5, 1.0)
    ]
    results = {
        "command": command_line(),
        "settings": {name: measured.settings[name] for name in SETTINGS},
        "alpha": measured.settings["alpha"],
        "seed": args.seed,
        "errors": errors,
        "expected": [
            {"sigma": comparison.sigma, **expect_accuracy(comparison, args.expected_n, RADII)}
            for comparison in comparisons
        ],
        "conformal": [
            {"sigma": comparison.sigma}
            | evaluate_random_splits(comparison, delta, RADII, args.splits, args.seed, decided=decided)
            for comparison in comparisons
            for delta in DELTAS
            for decided in list_questions(comparison)
        ],
        "calibrated": calibrated,
        "sequential": sequential,
        "draws_to_decide": [row for row in simulations if row is not None],
        "seconds_an_image": seconds,
        "payback": compute_payback(count_head, counting_seconds, seconds),
        "device": args.device,
        "num_threads": torch.get_num_threads(),
        "versions": package_versions(),
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(results, folder / "study.json")
    plot(comparisons, errors, folder / "count-head.png")
    show(results)


def show(results: dict[str, Any]) -> None:
    """The main results on the terminal."""
    rows = [
        {"sigma": f"{row['sigma']:g}"}
        | {name: f"{row[name]:.1%}" for name in ("disagreement", "overestimated", "underestimated")}
        for row in results["errors"]
    ]
    print_table(Console(), "Estimates beside Monte-Carlo certificates", rows)
    seconds = results["seconds_an_image"]
    print(
        f"An estimate takes {seconds['estimate']:.2g} s per image, the usual protocol {seconds['ratio']:,.0f} times that."
    )


if __name__ == "__main__":
    with exit_on_error():
        study(parse_args())
