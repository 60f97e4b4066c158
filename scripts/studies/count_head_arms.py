"""Which way of training a count head is best? Trains small heads and evaluates them on images that no head was trained on.

Example:
    accelerate launch scripts/certify.py --model_name_or_path my-model --dataset_name uoft-cs/cifar10 --split train \\
        --max_samples 5000 --sigma 0.25 0.5 1 --method counts --n 16 --output_dir counts
    python scripts/studies/count_head_arms.py --model my-model --counts counts --run runs/fixed \\
        --output_dir my-counts/results

The arms compare: the losses (Jensen-Shannon, cross-entropy, Kullback-Leibler, logistic-normal); a frozen backbone or an own
one, which has its own number of steps; one head for all noise levels or one per level; noise levels between and beyond those
trained on; and, with `--same_cost`, few draws of many images or many draws of few images. `--run` is a run of --method fixed
on test images. Writes OUTPUT_DIR/arms.json. To resume an interrupted study, run its command again.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_smoothing.core.count_predictor import CountPredictor
from hf_smoothing.core.modeling_count_prediction import FREQUENCY_LOSSES, LOSSES
from hf_smoothing.count_head.calibrate import refuse_shared_images
from hf_smoothing.count_head.comparison import Comparison, compare_with_certificates, predict_counts
from hf_smoothing.count_head.evaluation import compute_errors
from hf_smoothing.count_head.measured_counts import MeasuredCounts, read_counts
from hf_smoothing.count_head.training import CountHeadSettings, build_count_model, train_count_head
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.argument_parser import exit_on_error
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

RADII = (0.25, 0.5, 0.75, 1.0)
RUN_SETTINGS = ("model_weights", "dataset_fingerprint", "every", "max_samples", "n", "seed")


@dataclass(frozen=True)
class Arm:
    """A way of training: its name, training data, loss, whether encoder and classifier are trained too, and the noise levels
    to evaluate at (by default all)."""

    name: str
    counts: MeasuredCounts
    loss: str = "jensen_shannon"
    own_backbone: bool = False
    eval_sigmas: Sequence[float] | None = None


def select_sigmas(counts: MeasuredCounts, sigmas: Sequence[float]) -> MeasuredCounts:
    return counts.select(np.isin(counts.sigmas, sigmas))


def limit_draws(counts: MeasuredCounts, total_draws: int) -> MeasuredCounts:
    """The counts of the first images, as many images as `total_draws` draws per noise level suffice for."""
    images = np.unique(counts.indices)[: total_draws // int(counts.counts[0].sum())]
    return counts.select(np.isin(counts.indices, images))


def list_arms(counts: MeasuredCounts, same_cost: Sequence[MeasuredCounts]) -> list[Arm]:
    """All arms of the study."""
    sigmas = sorted(set(counts.sigmas.tolist()))
    arms = [Arm(loss, counts, loss=loss) for loss in LOSSES]
    arms += [Arm(f"own backbone, {loss}", counts, loss, True) for loss in ("jensen_shannon", "logistic_normal")]
    arms += [
        Arm(f"for sigma {sigma:g} alone", select_sigmas(counts, [sigma]), eval_sigmas=[sigma]) for sigma in sigmas
    ]
    if len(sigmas) > 2:
        for left_out, kept in ((sigmas[1], sigmas[::2]), (sigmas[-1], sigmas[:-1])):
            arms.append(Arm(f"without sigma {left_out:g}", select_sigmas(counts, kept), eval_sigmas=[left_out]))
    if same_cost:
        total_draws = min(len(np.unique(run.indices)) * int(run.counts[0].sum()) for run in same_cost)
        arms += [
            Arm(f"few draws in all, {loss}", limit_draws(run, total_draws), loss=loss)
            for run in (counts, *same_cost)
            for loss in ("jensen_shannon", "cross_entropy")
        ]
    return arms


def evaluate_arm(arm: Arm, measured: MeasuredCounts, args: argparse.Namespace) -> dict[str, Any]:
    """Train an arm, and compute its errors on the images of the run."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingSettings(
            folder,
            max_train_steps=args.own_backbone_steps if arm.own_backbone else args.steps,
            per_device_train_batch_size=min(args.batch_size, len(np.unique(arm.counts.indices))),
            learning_rate=args.own_backbone_learning_rate if arm.own_backbone else args.learning_rate,
            checkpointing_steps="1000000",
            seed=args.seed,
        )
        head = CountHeadSettings(args.model, loss=arm.loss, own_backbone=arm.own_backbone, eval_share=0.0)
        torch.manual_seed(args.seed)
        model = build_count_model(head, arm.counts)
        training = train_count_head(model, arm.counts, head, settings, settings.create_accelerator())
        predictor = CountPredictor.from_pretrained(folder, class_names=measured.settings["label_names"])
        if arm.eval_sigmas is not None:
            measured = select_sigmas(measured, arm.eval_sigmas)
        # a head refuses noise levels beyond its trained range; the study measures how wrong it is there
        predictor.model.config.count_sigmas = sorted({*arm.counts.sigmas.tolist(), *measured.sigmas.tolist()})
        probabilities = predict_counts(predictor, measured, folder)
    return {
        "arm": arm.name,
        "images": len(set(arm.counts.indices.tolist())),
        "draws_an_image": int(arm.counts.counts[0].sum()),
        "steps": training["steps"],
        "seconds": training["seconds"],
        "errors": [summarize(comparison) for comparison in compare_with_certificates(measured, probabilities)],
    }


def summarize(comparison: Comparison) -> dict[str, Any]:
    """The errors of an arm at one noise level."""
    errors = compute_errors(comparison, RADII)
    certified, estimated = ([row["share"] for row in errors["accuracy"][name]] for name in ("monte_carlo", "estimate"))
    targets = torch.from_numpy(comparison.counts / comparison.n)
    logits = torch.from_numpy(np.log(np.maximum(comparison.probabilities, 1e-300)))
    return {
        "sigma": comparison.sigma,
        "jensen_shannon": float(FREQUENCY_LOSSES["jensen_shannon"](logits, targets)),
        "accuracy_gap": float(np.abs(np.subtract(certified, estimated)).max()),
        **{name: errors[name] for name in ("disagreement", "overestimated", "mean_excess")},
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, text in {
        "--model": "base classifier, a mixed-noise ViT",
        "--counts": "finished run of --method counts, on training images",
        "--run": "finished run of --method fixed, on images not trained on",
        "--output_dir": "folder for arms.json",
    }.items():
        parser.add_argument(flag, required=True, help=text)
    cut = "runs with more draws of fewer images; they and --counts are cut to the draws of the cheapest of them"
    parser.add_argument("--same_cost", nargs="*", default=[], help=cut)
    for flag, default, text in (
        ("--steps", 1000, "updates per arm"),
        ("--learning_rate", 1e-3, "peak learning rate"),
        ("--own_backbone_steps", 500, "updates with an own backbone"),
        ("--own_backbone_learning_rate", 5e-4, "peak learning rate with an own backbone"),
        ("--batch_size", 128, "images per batch"),
        ("--seed", 0, "seed of everything random"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=f"{text} (default: {default})")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    path = Path(args.output_dir) / "arms.json"
    with exit_on_error():
        counts, measured = read_counts(Path(args.counts)), read_counts(Path(args.run))
        same_cost = [read_counts(Path(folder)) for folder in args.same_cost]
        for run in (counts, *same_cost):
            refuse_shared_images(run.settings, measured.settings)
        results: dict[str, Any] = {
            "command": command_line(),
            "radii": RADII,
            "settings": vars(args),
            "judged": {name: measured.settings[name] for name in ("dataset_name", "split", "every", "n", "alpha")},
            "runs": [{name: run.settings[name] for name in RUN_SETTINGS} for run in (counts, *same_cost, measured)],
            "arms": [],
            "num_threads": torch.get_num_threads(),
            "versions": package_versions("accelerate"),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(path.read_text()) if path.exists() else results
        if any(earlier.get(name) != results[name] for name in ("settings", "runs")):
            raise ValueError(f"{path} holds arms of other settings or runs: choose another folder.")
        results["arms"] = earlier["arms"]
        arms = list_arms(counts, same_cost)
        for number, arm in enumerate(arms[len(results["arms"]) :], len(results["arms"]) + 1):
            print(f"Arm {number} of {len(arms)}: {arm.name}", flush=True)
            results["arms"].append(evaluate_arm(arm, measured, args))
            write_json(results, path)
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
