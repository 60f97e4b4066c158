"""How good is a count head? Its estimates beside Monte-Carlo certificates of the same images, none left out.

    accelerate launch scripts/certify.py --model_name_or_path my-model --dataset_name uoft-cs/cifar10 --every 20 \\
        --sigma 0.25 0.5 1 --method fixed --n 10000 --output_dir runs/fixed
    python scripts/studies/count_head_study.py --model my-model --count_head my-counts --run runs/fixed \\
        --sequential runs/sequential runs/sequential-with-the-head --output_dir my-counts/results

Writes OUTPUT_DIR/study.json and a picture: disagreement, over- and underestimation, the calibration of the predicted p_A,
the accuracy of estimate and conformal radius beside Monte-Carlo, the draws of the sequential rule with and without the
head, seconds an image, and after how many images the training is paid back. A head that `hf-smoothing calibrate` has
calibrated, on other images and for as many draws, is judged as it is; besides, random halves of these are used to calibrate
and to judge.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from hf_smoothing import GaussianNoise, SequentialRule, SmoothedClassifier
from hf_smoothing.core.count_predictor import CountPredictor
from hf_smoothing.core.loading import weights_digest
from hf_smoothing.core.sampling_rule import CleanPass, radii_in_reach
from hf_smoothing.count_head.count_calibration import compare, predict_counts, refuse_training_images
from hf_smoothing.count_head.count_errors import Comparison, errors, expected_at, judged, random_splits
from hf_smoothing.count_head.measured_counts import Counts, read_counts
from hf_smoothing.diagnostics.simulation import simulate, wald_draws
from hf_smoothing.reporting.report import summarize
from hf_smoothing.reporting.results import read_results
from hf_smoothing.runs.run_folder import RunFolder
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)
DELTAS = (0.1, 0.05)
BUDGET = 100_000
USUAL = 100 + BUDGET
_REPEATS = 4
"""Simulations of an image, at least."""


def heads(frequencies: np.ndarray, predicted: np.ndarray, clean: np.ndarray) -> dict[str, CleanPass]:
    """What the sampler may be told: the classifier's clean pass, the head's ranking or all it says, lies, the truth."""
    permuted = np.roll(predicted, 1)
    sure = np.full(len(predicted), 0.001 / (len(predicted) - 1))
    sure[permuted.argmax()] = 0.999
    return {
        "without": CleanPass(clean),
        "ranking": CleanPass(np.log(predicted)),
        "with": CleanPass(predicted, frequencies=True),
        "permuted": CleanPass(permuted, frequencies=True),
        "permuted_and_sure": CleanPass(sure, frequencies=True),
        "knowing": CleanPass(frequencies, frequencies=True),
    }


def draws_to_decide(
    one: Comparison, clean: np.ndarray, radius: float, draws_a_repeat: int, seed: int
) -> dict[str, Any] | None:
    """
    Mean draws over the images whose measured p_A clears the radius and that a quarter of the budget can decide.

    Args:
        one: estimates and certificates.
        clean: `(images, classes)`, what the base classifier says of the clean images.
        radius: to decide.
        draws_a_repeat: an image is simulated once for so many draws of its Wald bound: a few hard images make up most of a
            mean, and of its error.
        seed: of the simulated draws.
    """
    noise = GaussianNoise(one.sigma)
    p0 = noise.probability_needed(radius)
    frequencies = one.counts / one.n
    # a class measured in every draw has a p below 1 that nobody knows: as if one draw had missed half
    top = np.minimum(frequencies.max(1), 1 - 0.5 / one.n)
    bounds = np.array([wald_draws(p, p0, one.alpha) if p > p0 else np.inf for p in top])
    chosen = np.flatnonzero(bounds <= BUDGET / 4)
    if not len(chosen):
        return None
    rule = SequentialRule(radii=(radius,), alpha=one.alpha, max_draws=BUDGET)
    spent: dict[str, list[list[int]]] = {}
    claimed: dict[str, list[float]] = {}
    for image in tqdm(chosen, f"sigma {one.sigma:g}, radius {radius:g}", leave=False):
        for name, told in heads(frequencies[image], one.probabilities[image], clean[image]).items():
            draws, claims = [], []
            for repeat in range(max(_REPEATS, math.ceil(bounds[image] / draws_a_repeat))):
                generator = np.random.default_rng([seed, int(image), repeat])
                found, drawn = simulate(rule, noise, frequencies[image], told, generator)
                draws.append(1 + drawn)  # the clean pass counts
                claims.append(noise.radius(found.p_lower, found.p_upper) >= radius)
            spent.setdefault(name, []).append(draws)
            claimed.setdefault(name, []).append(float(np.mean(claims)))
    return {
        "sigma": one.sigma,
        "radius": radius,
        "images": len(chosen),
        "wald": float(bounds[chosen].mean()),
        "draws": {name: float(np.mean([np.mean(draws) for draws in images])) for name, images in spent.items()},
        # of these images: how far the simulated draws may be off, not what others would take
        "errors": {
            name: float(np.sqrt(sum(np.var(draws, ddof=1) / len(draws) for draws in images)) / len(images))
            for name, images in spent.items()
        },
        "claimed": {name: float(np.mean(claims)) for name, claims in claimed.items()},
    }


@torch.inference_mode()
def clean_logits(smoothed: SmoothedClassifier, measured: Counts) -> np.ndarray:
    """What the base classifier says of the clean images: `(rows, classes)`."""
    inputs = measured.open().bind(measured.settings["label_names"], smoothed.preprocessing)
    wanted, rows = np.unique(measured.indices, return_inverse=True)
    logits = [
        smoothed.base_classifier([torch.stack([inputs[index][0] for index in some]).to(smoothed.device)], 0.0)
        for some in np.array_split(wanted, range(smoothed.batch_size, len(wanted), smoothed.batch_size))
    ]
    return torch.cat(logits).double().cpu().numpy()[rows]


def seconds_an_image(
    args: argparse.Namespace,
    smoothed: SmoothedClassifier,
    predictor: CountPredictor,
    measured: Counts,
    sequential: list[dict[str, Any]],
) -> dict[str, Any]:
    """Of the estimate, in batches, and of the sampling rules, from the rate at which the same model is drawn from."""
    inputs = measured.open().bind(predictor.class_names, smoothed.preprocessing)
    index = np.unique(measured.indices)[: args.batch_size]
    batch = torch.stack([inputs[one][0] for one in index])
    sigma = float(measured.sigmas.max())

    def seconds(call: Any) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def estimate() -> None:
        predictor(batch, sigma).cpu()

    estimate()  # the first pass sets things up
    asked = float(np.median([seconds(estimate) for _ in range(7)])) / len(batch)
    drawn = args.timed_draws
    smoothed.certify(batch[:1], method="counts", n=args.batch_size)
    drawing = float(
        np.median([seconds(lambda: smoothed.certify(batch[:1], method="counts", n=drawn)) for _ in range(3)])
    )
    usual = drawing / drawn * USUAL
    found = {"estimate": asked, "usual": usual, "timed_draws": drawn, "ratio": usual / asked}
    if without := [row["draws"] for row in sequential if not row["with_head"]]:
        spent = drawing / drawn * float(np.mean(without))
        found |= {"sequential": spent, "ratio_of_sequential": spent / asked}
    return found


def draw(all_of_them: list[Comparison], found: list[dict[str, Any]], path: Path) -> None:
    """Predicted against measured radius, and the calibration of the predicted p_A."""
    figure = Figure(figsize=(4 * len(all_of_them), 7.5), layout="constrained")
    axes = np.atleast_2d(figure.subplots(2, len(all_of_them), squeeze=False))
    for one, row, (above, below) in zip(all_of_them, found, axes.T):
        same = one.top == one.predictions
        for rows, color, label in (
            (same, "tab:blue", "same class"),
            (~same, "tab:red", "another class, or Monte-Carlo abstains"),
        ):
            above.scatter(one.measured[rows], one.estimated[rows], s=6, alpha=0.5, color=color, label=label)
        most = max(one.measured.max(), one.estimated.max(), 1e-3)
        above.plot([0, most], [0, most], color="gray", linewidth=0.8)
        above.set(title=f"sigma = {one.sigma:g}", xlabel="Monte-Carlo radius", ylabel="estimated radius")
        curve = row["calibration_curve"]
        below.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
        below.plot([bin["predicted"] for bin in curve], [bin["measured"] for bin in curve], marker="o")
        below.set(xlabel="predicted share of the top class", ylabel="measured share", xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def as_calibrated(one: Comparison, predictor: CountPredictor) -> list[dict[str, Any]]:
    """What the head's own calibration makes of its estimates, at each delta that it has images enough for."""
    calibration = predictor.calibration
    if calibration is None or (calibration.n, calibration.alpha) != (one.n, one.alpha):
        return []  # it speaks of other certificates than these
    if shared := calibration.shared_images(one.sigma, one.probabilities):
        raise ValueError(f"The head was calibrated on {shared} of the images of this very run: judge it on others.")
    return [
        {"calibrated_on": calibration.words, **judged(one, calibration, delta, RADII, decided=decided)}
        for delta in DELTAS
        if delta * (calibration.images[one.sigma] + 1) >= 1
        for decided in to_decide(one)
    ]


def to_decide(one: Comparison) -> list[list[float] | None]:
    """What a calibrated head may be asked: each image's own radius, or of the radii that the draws can show all or one."""
    reached = radii_in_reach(RADII[1:], GaussianNoise(one.sigma), one.n, one.alpha)
    return [None, *([reached] if len(reached) > 1 else []), *([radius] for radius in reached)]


def read_sequential(runs: list[Path], measured: Counts, count_head: str) -> list[dict[str, Any]]:
    """Draws an image and accuracy of the sequential rule on the same images, without the head and with it."""
    found: list[dict[str, Any]] = []
    results = read_results(runs)
    for result in results:
        if any(result.settings[name] != results[0].settings[name] for name in ("radii", "max_draws", "tolerance")):
            raise ValueError(
                f"{result.source} and {results[0].source} asked for different radii, or have other budgets."
            )
        steered = result.settings.get("count_head") is not None
        if steered and result.settings["count_head_weights"] != count_head:
            raise ValueError(f"{result.source} was drawn with another count head than this.")
        same = ("dataset_name", "split", "every", "max_samples", "alpha", "model_weights")
        other = [name for name in same if result.settings.get(name) != measured.settings[name]]
        if other:
            raise ValueError(f"{result.source} is of another {', '.join(other)} than the run of --method fixed.")
        accuracy = [
            {"radius": row["radius"], "share": row["share"], "standing": row["standing"]}
            for row in summarize([result], RADII)["results"][0]["certified_accuracy"]
        ]
        found.append(
            {
                "sigma": result.sigma,
                "draws": float(np.mean(result.column("num_samples"))),
                "budget": result.settings["max_draws"],
                "with_head": steered,
                "accuracy": accuracy,
            }
        )
    return found


def payback(folder: Path, counting: float | None, times: dict[str, Any]) -> dict[str, float] | None:
    """After how many images counting and training have cost less than certifying in another way would have."""
    training = folder / "results" / "training.json"
    if counting is None or not training.exists():
        return None
    trained = json.loads(training.read_text())
    spent = counting + trained["preparation_seconds"] + trained["seconds"]
    others = {"images": times["usual"]}
    if "sequential" in times:
        others["images_of_sequential"] = times["sequential"]
    return {"seconds": spent, **{name: spent / (cost - times["estimate"]) for name, cost in others.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base classifier")
    parser.add_argument("--count_head", required=True, help="the count head")
    parser.add_argument("--run", required=True, help="finished run of --method fixed on images that neither has seen")
    parser.add_argument(
        "--sequential",
        nargs="*",
        default=[],
        help="finished runs of --method sequential on the same images, without and with the head, to show beside",
    )
    parser.add_argument("--counts", help="the run that the head was trained on, for what it cost")
    parser.add_argument("--output_dir", required=True, help="where study.json and the picture go")
    parser.add_argument("--batch_size", type=int, default=256, help="images in one pass (default: 256)")
    parser.add_argument("--timed_draws", type=int, default=2048, help="draws to measure the rate with (default: 2048)")
    parser.add_argument("--splits", type=int, default=200, help="random calibration and test halves (default: 200)")
    parser.add_argument(
        "--expected_n",
        type=int,
        default=10_000,
        help="draws for which to say too what Monte-Carlo can be expected to certify (default: 10000)",
    )
    parser.add_argument(
        "--draws_a_repeat",
        type=int,
        default=50,
        help="simulations of the sequential rule: one for every so many draws that Wald's bound asks for, and 4 of an image "
        "at least (default: 50; fewer take longer and are more exact)",
    )
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--seed", type=int, default=0, help="of splits and simulated draws")
    args = parser.parse_args()
    for name in ("batch_size", "timed_draws", "splits", "expected_n", "draws_a_repeat"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    try:
        measured = read_counts(Path(args.run))
        if measured.settings["method"] != "fixed":
            raise ValueError(
                f"{args.run} is of method {measured.settings['method']!r}: compare with a run of --method fixed."
            )
        refuse_training_images(Path(args.count_head), measured.settings)
        predictor = CountPredictor.from_pretrained(
            args.count_head, device=args.device, class_names=measured.settings["label_names"]
        )
        sequential = read_sequential([Path(one) for one in args.sequential], measured, weights_digest(predictor.model))
        all_of_them = compare(measured, predict_counts(predictor, measured, args.count_head))
        smoothed = SmoothedClassifier.from_pretrained(
            args.model, GaussianNoise(0.5), batch_size=args.batch_size, device=args.device
        )
        clean = clean_logits(smoothed, measured)
        calibrated = [{"sigma": one.sigma, **row} for one in all_of_them for row in as_calibrated(one, predictor)]
        counting = None if args.counts is None else read_seconds(Path(args.counts))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if predictor.calibration is not None and not calibrated:
        print(
            f"Left out: the head's own calibration. It is for n={predictor.calibration.n} and "
            f"alpha={predictor.calibration.alpha:g}, the run is not, or it has too few images for any delta here.",
            file=sys.stderr,
        )
    found = [errors(one, RADII) for one in all_of_them]
    times = seconds_an_image(args, smoothed, predictor, measured, sequential)
    results = {
        "command": command_line(),
        "settings": {
            name: measured.settings[name] for name in ("model_name_or_path", "dataset_name", "split", "every")
        },
        "alpha": measured.settings["alpha"],
        "seed": args.seed,
        "errors": found,
        "expected": [{"sigma": one.sigma, **expected_at(one, args.expected_n, RADII)} for one in all_of_them],
        "conformal": [
            {"sigma": one.sigma, **random_splits(one, delta, RADII, args.splits, args.seed, decided=decided)}
            for one in all_of_them
            for delta in DELTAS
            for decided in to_decide(one)
        ],
        "calibrated": calibrated,
        "sequential": sequential,
        "draws_to_decide": [
            row
            for one in all_of_them
            for share in (0.5, 1.0)
            if (
                row := draws_to_decide(
                    one, clean[measured.sigmas == one.sigma], share * one.sigma, args.draws_a_repeat, args.seed
                )
            )
            is not None
        ],
        "seconds_an_image": times,
        "payback": payback(Path(args.count_head), counting, times),
        "device": args.device,
        "num_threads": torch.get_num_threads(),
        "versions": package_versions(),
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(results, folder / "study.json")
    draw(all_of_them, found, folder / "count-head.png")
    for row in found:
        print(
            f"sigma {row['sigma']:g}: disagreement {row['disagreement']:.1%}, overestimated {row['overestimated']:.1%}, "
            f"underestimated {row['underestimated']:.1%}"
        )
    print(f"an estimate takes {times['estimate']:.2g} s an image, the usual protocol {times['ratio']:,.0f} times that")


def read_seconds(run: Path) -> float:
    """What a run took, with as many processes as it had in the end."""
    folder = RunFolder(run)
    seconds = sum(row["seconds"] for row in folder.read_records(["seconds"]))
    return seconds / folder.read_run()["sessions"][-1]["num_processes"]


if __name__ == "__main__":
    main()
