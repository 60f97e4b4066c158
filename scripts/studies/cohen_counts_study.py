"""Compares predictions of class counts with published counts of n = 100,000 draws, on all test images.

Example:
    python scripts/studies/cohen_counts_study.py --counts test.parquet --dataset_name uoft-cs/cifar10 \\
        --predictions "ours=my-counts/predictions.parquet" "the paper's=runs/paper/predictions.parquet" \\
        --count_head my-counts --output_dir my-counts/results

The predictions come from `predict_counts.py` and `paper_surrogate.py`; the first ones are studied in full. Writes
OUTPUT_DIR/cohen-counts.json and pictures: disagreement, over- and underestimation, certified accuracy and average certified
radius beside Monte-Carlo's, as the head says and after a recalibration; how many certificates a recalibration takes; the
paper's own way of counting; conformal selection; certified accuracy from few certificates; seconds per image.
"""

import argparse
import timeit
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn
from torch.nn import functional

from hf_smoothing import GaussianNoise
from hf_smoothing.core.bounds import FloatArray, clopper_pearson_lower
from hf_smoothing.core.count_predictor import CountPredictor
from hf_smoothing.core.rule_protocols import radii_in_reach
from hf_smoothing.count_head.comparison import Comparison, compare_with_certificates
from hf_smoothing.count_head.evaluation import compute_errors
from hf_smoothing.count_head.measured_counts import MeasuredCounts, read_count_table
from hf_smoothing.count_head.prediction_tables import read_predictions
from hf_smoothing.count_head.recalibration import recalibrate_by_halves
from hf_smoothing.count_head.resampling import (
    LARGEST_GAP,
    evaluate_estimated_share,
    evaluate_few_certificates,
    evaluate_selection,
)
from hf_smoothing.reporting.tables import print_table
from hf_smoothing.utils.errors import exit_on_error
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SELECTED_RADII = (0.25, 0.5, 1.0)
FALSE_CLAIMS = (0.1, 0.2)
ESTIMATED_RADIUS = 0.5
SMALLEST_PAPER_RADIUS = 0.25
USUAL = 100_100  # draws per image of the usual protocol


def average_certified_radius(comparison: Comparison) -> dict[str, float]:
    """Mean radius, 0 where the class is wrong, of Monte-Carlo and of the estimate."""
    labels = comparison.labels
    return {
        "monte_carlo": float((comparison.certified_radii * (comparison.predictions == labels)).mean()),
        "estimate": float((comparison.estimated_radii * (comparison.predicted_classes == labels)).mean()),
    }


def count_as_published(comparison: Comparison) -> dict[str, Any]:
    """
    Count errors as the code of the paper does: hits rounded down, two-sided Clopper-Pearson, and only images that are right,
    agree, and have a radius of .25 on both sides.

    Returns:
        `kept`, the share of all images that count; and of these, the share with too large an estimate (`overestimated`), and
        the mean absolute error of the radius.
    """

    def compute_published_radii(hits: FloatArray) -> FloatArray:
        # both sides together have level alpha
        p_lower = clopper_pearson_lower(np.floor(hits + 1e-9), comparison.n, comparison.alpha / 2)
        return comparison.compute_radii(p_lower)

    tops = comparison.counts.argmax(1)
    estimated = compute_published_radii(comparison.n * comparison.probabilities.max(1))
    measured = compute_published_radii(comparison.counts.max(1).astype(np.float64))
    kept = (tops == comparison.labels) & (comparison.predicted_classes == tops)
    kept &= np.minimum(estimated, measured) >= SMALLEST_PAPER_RADIUS
    if not kept.any():
        return {"kept": 0.0, "overestimated": None, "mean_absolute_error": None}
    errors = estimated[kept] - measured[kept]
    return {
        "kept": float(kept.mean()),
        "overestimated": float((errors > 0).mean()),
        "mean_absolute_error": float(np.abs(errors).mean()),
    }


def describe_errors(comparison: Comparison) -> dict[str, Any]:
    """Errors of the estimates, counting all images, and how far their certified accuracy is from Monte-Carlo's."""
    errors = compute_errors(comparison, RADII)
    return {
        **errors,
        "acr": average_certified_radius(comparison),
        "largest_deviation": largest_deviation(errors),
        "published": count_as_published(comparison),
    }


def largest_deviation(errors: dict[str, Any]) -> float:
    """The largest difference between the certified accuracies of estimate and Monte-Carlo, over all radii."""
    accuracy = errors["accuracy"]
    return max(
        abs(ours["share"] - theirs["share"]) for ours, theirs in zip(accuracy["estimate"], accuracy["monte_carlo"])
    )


def evaluate_predictions(comparisons: list[Comparison], seed: int) -> list[dict[str, Any]]:
    """Errors at each noise level, of the estimates and of the recalibrated ones."""
    rows = []
    for comparison in comparisons:
        recalibrated, halves = recalibrate_by_halves(comparison, seed)
        deviations = [largest_deviation(compute_errors(half, RADII)) for half in halves]
        rows.append(
            {
                "sigma": comparison.sigma,
                "estimate": describe_errors(comparison),
                "recalibrated": {**describe_errors(recalibrated), "deviations_of_halves": deviations},
            }
        )
    return rows


def certify_training_images(measured: MeasuredCounts) -> list[dict[str, Any]]:
    """
    Certified accuracy of Monte-Carlo on images that the base classifiers were trained on, at each noise level. A head that
    learned from counts of these images carries it over to other images, on which the classifiers are right less often.
    """
    rows = []
    for sigma in np.unique(measured.sigmas):
        at_sigma = measured.select_sigmas([float(sigma)])
        noise, right = GaussianNoise(float(sigma)), at_sigma.predictions == at_sigma.labels
        needed = [noise.probability_needed(radius) for radius in RADII]
        # alpha bounds what so many draws can prove: where a radius is out of reach, no image has it
        shares = [float((right & (at_sigma.p_lower >= p)).mean()) for p in needed]
        rows.append({"sigma": float(sigma), "accuracy": [{"radius": r, "share": s} for r, s in zip(RADII, shares)]})
    return rows


def select_claims(comparison: Comparison, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Conformal selection at the radii that the draws can show."""
    radii = radii_in_reach(SELECTED_RADII, GaussianNoise(comparison.sigma), comparison.n, comparison.alpha)
    return [
        {"sigma": comparison.sigma, **row}
        for false_claims in FALSE_CLAIMS
        for row in evaluate_selection(comparison, radii, false_claims, args.splits, args.seed)
    ]


def estimate_shares(comparison: Comparison, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Certified accuracy from few certificates, with the head's estimates and with useless ones."""
    noise, radius = GaussianNoise(comparison.sigma), ESTIMATED_RADIUS
    if not radii_in_reach([radius], noise, comparison.n, comparison.alpha):
        return []
    labels = comparison.labels
    right = (comparison.predictions == labels) & (comparison.certified_radii >= radius)
    estimated = (comparison.predicted_classes == labels) & (comparison.estimated_radii >= radius)
    heads = {"head": estimated, "useless": np.random.default_rng(args.seed).permutation(estimated)}
    return [
        {
            "sigma": comparison.sigma,
            "radius": radius,
            "estimates": name,
            **evaluate_estimated_share(right, shares, sample, args.resamplings, args.seed),
        }
        for name, shares in heads.items()
        for sample in args.samples
    ]


class ResNet110(nn.Module):
    """The base classifier of Cohen et al. (arXiv 1902.02918), with random weights: its time does not depend on them."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16] * 18 + [32] * 18 + [64] * 18
        pairs = list(zip([16, *widths], widths))
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.one = nn.ModuleList(nn.Conv2d(a, b, 3, stride=b // a, padding=1, bias=False) for a, b in pairs)
        self.two = nn.ModuleList(nn.Conv2d(b, b, 3, padding=1, bias=False) for _, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs for _ in range(2))
        self.last = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.first(images)
        for one, two, norm_one, norm_two in zip(self.one, self.two, self.norms[::2], self.norms[1::2]):
            changed = norm_two(two(functional.relu(norm_one(one(features)))))
            stride = features.shape[-1] // changed.shape[-1]
            shortcut = functional.pad(
                features[..., ::stride, ::stride], [0] * 5 + [changed.shape[1] - features.shape[1]]
            )
            features = functional.relu(changed + shortcut)
        return self.last(features.mean((2, 3)))


@torch.inference_mode()
def measure_seconds(count_head: str, batch_size: int) -> dict[str, float]:
    """Seconds per image on this CPU: of the estimate, and of fixed n = 100,000 with the forward passes of a ResNet-110."""
    predictor, resnet = CountPredictor.from_pretrained(count_head), ResNet110().eval()
    config = predictor.model.config
    batch = torch.rand(batch_size, 3, config.image_size, config.image_size)
    sigma = max(config.count_sigmas or [0.0])

    def measure(call: Any) -> float:
        call()  # warm up
        return float(np.median(timeit.repeat(call, number=1, repeat=5))) / batch_size

    estimate, draw = measure(lambda: predictor(batch, sigma)), measure(lambda: resnet(batch))
    return {"estimate": estimate, "fixed": USUAL * draw, "ratio": USUAL * draw / estimate, "batch_size": batch_size}


def plot_accuracy(arms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Certified accuracy of Monte-Carlo and of all estimates, at each noise level."""
    sigmas = [row["sigma"] for row in next(iter(arms.values()))]
    figure = Figure(figsize=(4 * len(sigmas), 3.6), layout="constrained")
    axes = figure.subplots(1, len(sigmas), squeeze=False)[0]
    for level, (axis, sigma) in enumerate(zip(axes, sigmas)):
        accuracy = next(iter(arms.values()))[level]["estimate"]["accuracy"]["monte_carlo"]
        axis.plot(RADII, [100 * row["share"] for row in accuracy], color="black", linewidth=2, label="Monte-Carlo")
        for name, rows in arms.items():
            for kind, style in (("estimate", "-"), ("recalibrated", ":")):
                shares = [100 * row["share"] for row in rows[level][kind]["accuracy"]["estimate"]]
                axis.plot(RADII, shares, style, marker=".", label=f"{name}{', recalibrated' if style == ':' else ''}")
        axis.set(title=f"sigma = {sigma:g}", xlabel="radius", ylim=(0, None))
    axes[0].set_ylabel("certified accuracy in %")
    axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def plot_images(comparisons: list[Comparison], errors: list[dict[str, Any]], path: Path) -> None:
    """Estimated against certified radius of each image, and the calibration of the predicted p_A."""
    figure = Figure(figsize=(4 * len(comparisons), 7.2), layout="constrained")
    axes = figure.subplots(2, len(comparisons), squeeze=False)
    for comparison, row, (upper, lower) in zip(comparisons, errors, axes.T):
        certified, estimated = comparison.certified_radii, comparison.estimated_radii
        for images, label in ((comparison.agrees, "same class"), (~comparison.agrees, "another class, or abstains")):
            upper.scatter(certified[images], estimated[images], s=1, alpha=0.3, label=label)
        upper.axline((0, 0), slope=1, color="gray", linewidth=0.8)
        upper.set(title=f"sigma = {comparison.sigma:g}", xlabel="Monte-Carlo radius", ylabel="estimated radius")
        curve = row["estimate"]["calibration_curve"]
        lower.axline((0, 0), slope=1, color="gray", linewidth=0.8)
        lower.plot([bin["predicted"] for bin in curve], [bin["measured"] for bin in curve], marker="o")
        lower.set(xlabel="predicted share of the top class", ylabel="measured share", xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].legend(fontsize=7, markerscale=4)
    figure.savefig(path, dpi=110)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", required=True, help="Parquet file with the counts of the test images")
    parser.add_argument("--dataset_name", required=True, help="dataset of the images")
    parser.add_argument("--split", default="test", help="its split (default: test)")
    parser.add_argument("--predictions", nargs="+", required=True, help="NAME=FILE of each table of predictions")
    parser.add_argument("--training_counts", help="Parquet file with the counts of the training images, split train")
    parser.add_argument("--count_head", help="count head of the first predictions, to measure its time")
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 500], help="numbers of certificates")
    parser.add_argument(
        "--certificates", type=int, nargs="+", default=[100, 200, 500, 1000], help="to recalibrate with"
    )
    parser.add_argument("--output_dir", required=True, help="folder for results and pictures")
    for flag, default, text in (
        ("--splits", 500, "random halves that calibrate the selection"),
        ("--resamplings", 2000, "random samples of certificates"),
        ("--repeats", 200, "random samples to recalibrate with"),
        ("--batch_size", 256, "images per forward pass, to measure time"),
        ("--seed", 0, "seed of halves and samples"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=f"{text} (default: {default})")
    return parser.parse_args()


def compare(measured: MeasuredCounts, path: str) -> list[Comparison]:
    """Predictions of a table beside the certificates, at each noise level that was predicted."""
    return compare_with_certificates(measured, read_predictions(measured, Path(path)))


def main() -> None:
    args = parse_args()
    with exit_on_error():
        measured = read_count_table(Path(args.counts), args.dataset_name, args.split)
        paths = dict(pair.split("=", 1) for pair in args.predictions)
        comparisons = {name: compare(measured, path) for name, path in paths.items()}
        arms = {name: evaluate_predictions(levels, args.seed) for name, levels in comparisons.items()}
        first = comparisons[next(iter(comparisons))]
        training = args.training_counts and read_count_table(Path(args.training_counts), args.dataset_name, "train")
        results = {
            "command": command_line(),
            "settings": vars(args),
            "images": measured.describe_images(),
            "n": measured.settings["n"],
            "alpha": measured.settings["alpha"],
            "radii": RADII,
            "arms": arms,
            "training_images": certify_training_images(training) if training else None,
            "largest_gap": LARGEST_GAP,
            "few_certificates": [
                {
                    "sigma": comparison.sigma,
                    **evaluate_few_certificates(comparison, RADII, certificates, args.repeats, args.seed),
                }
                for comparison in first
                for certificates in args.certificates
            ],
            "selection": [row for comparison in first for row in select_claims(comparison, args)],
            "estimated_shares": [row for comparison in first for row in estimate_shares(comparison, args)],
            "seconds_an_image": None if args.count_head is None else measure_seconds(args.count_head, args.batch_size),
            "num_threads": torch.get_num_threads(),
            "versions": package_versions(),
        }
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(results, folder / "cohen-counts.json")
        plot_accuracy(arms, folder / "cohen-counts-accuracy.png")
        plot_images(first, arms[next(iter(arms))], folder / "cohen-counts-images.png")
        show(arms)


def show(arms: dict[str, list[dict[str, Any]]]) -> None:
    """Certified accuracies on the terminal."""
    rows = []
    for name, levels in arms.items():
        for level in levels:
            kinds = {"estimate": level["estimate"]["accuracy"]["estimate"]}
            kinds["recalibrated"] = level["recalibrated"]["accuracy"]["estimate"]
            if name == next(iter(arms)):
                kinds = {"Monte-Carlo": level["estimate"]["accuracy"]["monte_carlo"], **kinds}
            for kind, accuracy in kinds.items():
                shares = {f"r = {row['radius']:g}": f"{row['share']:.1%}" for row in accuracy}
                rows.append({"sigma": f"{level['sigma']:g}", "predictions": f"{name}: {kind}", **shares})
    print_table(Console(width=140), "Certified accuracy", sorted(rows, key=lambda row: float(row["sigma"])))


if __name__ == "__main__":
    main()
