"""Does a count head save draws? Compares runs of the same images without the head and with it, image by image.

Example:
    python scripts/studies/guided_runs.py --model my-model --count_head my-counts --frequencies runs/measured \\
        --pairs runs/sequential=runs/sequential-with-the-head --output_dir my-counts/results/guided

Writes OUTPUT_DIR/guided.json: forward passes per image, their ratio with a bootstrap interval over images, and what the runs
certify. The class frequencies that other runs measured for the same images (--frequencies) show what any head could save:
the rules are simulated without a head, with the head's predictions, and with the frequencies themselves in their place.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from hf_smoothing import GaussianNoise, SmoothedClassifier
from hf_smoothing.core.bounds import FloatArray
from hf_smoothing.core.count_predictor import CountPredictor
from hf_smoothing.core.rule_protocols import CleanPass
from hf_smoothing.core.rules import make_rule
from hf_smoothing.core.weights import weights_digest
from hf_smoothing.diagnostics.simulation import simulate
from hf_smoothing.reporting.results import Result, read_results
from hf_smoothing.reporting.tables import print_table
from hf_smoothing.runs.identity import open_images
from hf_smoothing.utils.errors import exit_on_error
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

RULE_SETTINGS = ("method", "alpha", "radii", "draws", "max_draws")
SAME = (*RULE_SETTINGS, "dataset_name", "split", "every", "model_weights", "dtype")


def read_pair(pair: str) -> tuple[list[Result], list[Result]]:
    """
    Runs without a count head and as many with it, of the same images.

    Args:
        pair: `RUN,RUN=RUN,RUN`, folders of the runs without the head and of those with it.

    Raises:
        ValueError: for runs that are no such pair.
    """
    without, guided = (read_results([Path(path) for path in side.split(",")]) for side in pair.split("=", 1))
    heads = {result.settings.get("count_head_weights") for result in guided}
    if any(result.settings["count_head"] for result in without) or len(heads) > 1 or None in heads:
        raise ValueError(f"{pair}: name the runs without a count head first, then those with it.")
    first = without[0]
    for result in [*without, *guided]:
        differing = [name for name in SAME if result.settings[name] != first.settings[name]]
        differing += ["noise level"] if result.sigma != first.sigma else []
        differing += ["images"] if result.column("index") != first.column("index") else []
        if differing:
            raise ValueError(f"{result.source} and {first.source} differ in {', '.join(differing)}.")
    return without, guided


def compare_runs(without: list[Result], guided: list[Result], resamplings: int, seed: int) -> dict[str, Any]:
    """
    Forward passes per image without a head and with it, how many times fewer these are, and what the runs certify.

    The interval of the ratio is the 95 % percentile interval over images drawn with replacement, the same on both sides.
    """
    first = without[0]
    passes = [np.mean([run.column("num_samples") for run in runs], axis=0) for runs in (without, guided)]
    images = len(first.rows)
    chosen = np.random.default_rng(seed).integers(images, size=(resamplings, images))
    ratios = passes[0][chosen].sum(1) / passes[1][chosen].sum(1)
    row: dict[str, Any] = {name: first.settings[name] for name in RULE_SETTINGS}
    row |= {"sigma": first.sigma, "images": images, "runs": len(without)}
    row |= {
        "ratio": float(passes[0].sum() / passes[1].sum()),
        "interval_95": np.quantile(ratios, [0.025, 0.975]).tolist(),
    }
    for name, runs, spent in zip(("without", "with"), (without, guided), passes):
        right = np.array([np.equal(run.column("prediction"), run.column("label")) for run in runs])
        radii = np.array([run.column("radius") for run in runs])
        row[name] = {
            "passes": float(spent.mean()),
            "median": float(np.median([run.column("num_samples") for run in runs])),
            "certified": float((right & (radii >= max(first.decided_radii, default=0.0))).mean()),
            "acr": float((right * radii).mean()),
        }
    return row


@torch.inference_mode()
def predict(result: Result, model: str, predictor: CountPredictor) -> tuple[FloatArray, FloatArray]:
    """The classifier's logits and the head's frequencies for the images of a run, each `(images, classes)`."""
    smoothed = SmoothedClassifier.from_pretrained(model, GaussianNoise(result.sigma))
    inputs = open_images(result.settings).bind(predictor.class_names, smoothed.preprocessing)
    logits, predicted = [], []
    for indices in np.array_split(result.column("index"), max(1, len(result.rows) // 100)):
        pixels = torch.stack([inputs[int(index)][0] for index in indices])
        logits.append(smoothed.base_classifier([pixels], 0.0).double().numpy())
        predicted.append(predictor(pixels, result.sigma).numpy())
    return np.concatenate(logits), np.concatenate(predicted)


def simulate_runs(
    result: Result, frequencies: FloatArray, logits: FloatArray, predicted: FloatArray, repeats: int, seed: int
) -> dict[str, dict[str, float]]:
    """Forward passes per image of a run's rule if draws have these frequencies: the mean and its standard error."""
    rule = make_rule(**{name: value for name in RULE_SETTINGS if (value := result.settings[name]) is not None})
    clean_passes = {
        "without": CleanPass(logits) if rule.uses_clean_pass else None,
        "with": CleanPass(predicted, frequencies=True),
        "knowing": CleanPass(frequencies, frequencies=True),
    }
    simulated = {}
    for name, clean in clean_passes.items():
        means = [
            simulate(rule, GaussianNoise(result.sigma), frequencies, clean, np.random.default_rng([seed, repeat]))[
                1
            ].mean()
            + (clean is not None)
            for repeat in range(repeats)
        ]
        simulated[name] = {"mean": float(np.mean(means)), "error": float(np.std(means, ddof=1) / repeats**0.5)}
    return simulated


def find_frequencies(result: Result, measured: list[Result]) -> FloatArray:
    """Class frequencies that another run measured for the images, `(images, classes)`; half a draw is spread over all."""
    for other in measured:
        same = other.column("index") == result.column("index") and other.column("label") == result.column("label")
        if same and other.sigma == result.sigma and other.model == result.model:
            counts = np.array(other.column("counts"), float) + 0.5 / len(other.rows[0]["counts"])
            return np.asarray(counts / counts.sum(1, keepdims=True))
    raise ValueError(f"{result.source}: no run of --frequencies has its images, model and noise level.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="base classifier")
    parser.add_argument("--count_head", required=True, help="count head that guided the runs")
    parser.add_argument("--pairs", nargs="+", required=True, help="RUN,...=RUN,...: without the head, with it")
    parser.add_argument("--frequencies", nargs="+", required=True, help="runs that measured frequencies of the images")
    parser.add_argument("--output_dir", required=True, help="folder of guided.json")
    for flag, default, text in (
        ("--repeats", 8, "simulated runs"),
        ("--resamplings", 10_000, "bootstrap samples of the images"),
        ("--seed", 0, "seed of both"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=f"{text} (default: {default})")
    return parser.parse_args()


def study(args: argparse.Namespace) -> None:
    """Compare and simulate; write the results."""
    pairs = [read_pair(pair) for pair in args.pairs]
    measured = read_results([Path(path) for path in args.frequencies])
    predictor = CountPredictor.from_pretrained(args.count_head)
    rows = []
    for without, guided in pairs:
        if guided[0].settings["count_head_weights"] != weights_digest(predictor.model):
            raise ValueError(f"{guided[0].source} was made with another count head than {args.count_head}.")
        frequencies = find_frequencies(without[0], measured)
        figures = predict(without[0], args.model, predictor)
        simulated = simulate_runs(without[0], frequencies, *figures, args.repeats, args.seed)
        rows.append({**compare_runs(without, guided, args.resamplings, args.seed), "simulated": simulated})
    folder, settings = Path(args.output_dir), pairs[0][0][0].settings
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "command": command_line(),
        "settings": vars(args),
        "pairs": rows,
        "dataset_name": settings["dataset_name"],
        "split": settings["split"],
        "run_commands": [result.run["command"] for pair in pairs for side in pair for result in side],
        "versions": package_versions(),
    }
    write_json(results, folder / "guided.json")
    shown = [
        {
            "method": row["method"],
            "sigma": f"{row['sigma']:g}",
            "without": f"{row['without']['passes']:.1f}",
            "with": f"{row['with']['passes']:.1f}",
            "ratio": f"{row['ratio']:.2f} ({row['interval_95'][0]:.2f} to {row['interval_95'][1]:.2f})",
            "simulated": ", ".join(f"{name} {figures['mean']:.1f}" for name, figures in row["simulated"].items()),
        }
        for row in rows
    ]
    print_table(Console(width=140), "Forward passes per image", shown)


if __name__ == "__main__":
    with exit_on_error():
        study(parse_args())
