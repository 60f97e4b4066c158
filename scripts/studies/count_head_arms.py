"""Which way of training a count head is best? Small trainings, judged on images that none was made with.

    accelerate launch scripts/certify.py --model_name_or_path my-model --dataset_name uoft-cs/cifar10 --split train \\
        --max_samples 5000 --sigma 0.25 0.5 1 --method counts --n 16 --output_dir counts
    python scripts/studies/count_head_arms.py --model my-model --counts counts --run runs/fixed \\
        --output_dir my-counts/results

Arms: the loss (Jensen-Shannon, cross-entropy, Kullback-Leibler, logistic-normal); the classifier's frozen backbone or an
own one, which has steps of its own; one head for all noise levels or one for each; noise levels between and beyond those
trained on; and, with `--same_cost`, few draws of many images or many of few. `--run` is of --method fixed, on test images.
Writes OUTPUT_DIR/arms.json; run again, it goes on.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_smoothing.core.count_predictor import CountPredictor
from hf_smoothing.core.modeling_count_prediction import LOSSES, OF_FREQUENCIES
from hf_smoothing.count_head.count_calibration import compare, predict_counts, refuse_shared_images
from hf_smoothing.count_head.count_errors import errors
from hf_smoothing.count_head.count_training import build_count_model, train_count_head
from hf_smoothing.count_head.measured_counts import Counts, read_counts
from hf_smoothing.training.training_loop import TrainingSettings
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

RADII = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Arm:
    """
    A way of training.

    Args:
        name: as it is shown.
        counts: what it is trained on.
        loss: one of `LOSSES`.
        own_backbone: whether encoder and classifier are trained along.
        judged_at: noise levels that it is judged at; by default all.
    """

    name: str
    counts: Counts
    loss: str = "jensen_shannon"
    own_backbone: bool = False
    judged_at: Sequence[float] | None = None


def at(counts: Counts, sigmas: Sequence[float]) -> Counts:
    """The counts at some of the noise levels."""
    return chosen(counts, np.isin(counts.sigmas, sigmas))


def chosen(counts: Counts, rows: np.ndarray) -> Counts:
    """Some of the rows."""
    columns = ("indices", "sigmas", "counts", "labels", "predictions", "p_lower")
    return replace(counts, **{name: getattr(counts, name)[rows] for name in columns})


def first(counts: Counts, draws: int) -> Counts:
    """The counts of the first images, as many as so many draws at each noise level are enough for."""
    images = np.unique(counts.indices)[: draws // int(counts.counts[0].sum())]
    return chosen(counts, np.isin(counts.indices, images))


def arms(counts: Counts, same_cost: Sequence[Counts]) -> list[Arm]:
    """All of them."""
    levels = sorted(set(counts.sigmas.tolist()))
    found = [Arm(loss, counts, loss=loss) for loss in LOSSES]
    found += [
        Arm(f"own backbone, {loss}", counts, loss=loss, own_backbone=True)
        for loss in ("jensen_shannon", "logistic_normal")
    ]
    found += [Arm(f"for sigma {level:g} alone", at(counts, [level]), judged_at=[level]) for level in levels]
    if len(levels) > 2:
        found.append(Arm(f"without sigma {levels[1]:g}", at(counts, levels[::2]), judged_at=[levels[1]]))
        found.append(Arm(f"without sigma {levels[-1]:g}", at(counts, levels[:-1]), judged_at=[levels[-1]]))
    cost = min((len(set(one.indices.tolist())) * int(one.counts[0].sum()) for one in same_cost), default=0)
    found += [
        Arm(f"few draws in all, {loss}", one, loss=loss)
        for one in [first(run, cost) for run in (counts, *same_cost) if cost]
        for loss in ("jensen_shannon", "cross_entropy")
    ]
    return found


def judge(arm: Arm, measured: Counts, args: argparse.Namespace) -> dict[str, Any]:
    """Train an arm, and how far it is off on the images of the run."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingSettings(
            folder,
            max_train_steps=args.own_backbone_steps if arm.own_backbone else args.steps,
            per_device_train_batch_size=min(args.batch_size, len(np.unique(arm.counts.indices))),
            learning_rate=args.own_backbone_learning_rate if arm.own_backbone else args.learning_rate,
            checkpointing_steps="1000000",
            seed=args.seed,
        )
        torch.manual_seed(args.seed)
        model = build_count_model(args.model, arm.counts, arm.own_backbone)
        found = train_count_head(
            model,
            arm.counts,
            settings,
            settings.start(),
            base=args.model,
            loss=arm.loss,
            own_backbone=arm.own_backbone,
            eval_share=0.0,
        )
        predictor = CountPredictor.from_pretrained(folder, class_names=measured.settings["label_names"])
        judged = measured if arm.judged_at is None else at(measured, arm.judged_at)
        # beyond the trained range a head refuses: here it is to be seen why
        predictor.model.config.count_sigmas = sorted({*arm.counts.sigmas.tolist(), *judged.sigmas.tolist()})
        probabilities = predict_counts(predictor, judged, folder)
    rows = []
    for one in compare(judged, probabilities):
        found_here = errors(one, RADII)
        proved, estimated = (
            [share["share"] for share in found_here["accuracy"][which]] for which in ("monte_carlo", "estimate")
        )
        targets = torch.from_numpy(one.counts / one.n)
        logits = torch.from_numpy(np.log(np.maximum(one.probabilities, 1e-300)))
        rows.append(
            {
                "sigma": one.sigma,
                "jensen_shannon": float(OF_FREQUENCIES["jensen_shannon"](logits, targets)),
                "accuracy_gap": float(np.abs(np.subtract(proved, estimated)).max()),
                **{name: found_here[name] for name in ("disagreement", "overestimated", "mean_excess")},
            }
        )
    return {
        "arm": arm.name,
        "images": len(set(arm.counts.indices.tolist())),
        "draws_an_image": int(arm.counts.counts[0].sum()),
        "steps": found["steps"],
        "seconds": found["seconds"],
        "errors": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base classifier, a mixed-noise ViT")
    parser.add_argument("--counts", required=True, help="finished run of --method counts, on training images")
    parser.add_argument(
        "--same_cost",
        nargs="*",
        default=[],
        help="runs with more draws of fewer images: they and --counts are compared at the cost of the cheapest",
    )
    parser.add_argument("--run", required=True, help="finished run of --method fixed, on images that none has seen")
    parser.add_argument("--output_dir", required=True, help="where arms.json goes")
    parser.add_argument("--steps", type=int, default=1000, help="updates of each arm (default: 1000)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of each arm (default: 1e-3)")
    parser.add_argument("--own_backbone_steps", type=int, default=500, help="updates of an own one (default: 500)")
    parser.add_argument("--own_backbone_learning_rate", type=float, default=5e-4, help="of it (default: 5e-4)")
    parser.add_argument("--batch_size", type=int, default=128, help="images in a batch (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    args = parser.parse_args()
    path = Path(args.output_dir) / "arms.json"
    try:
        counts, measured = read_counts(Path(args.counts)), read_counts(Path(args.run))
        same_cost = [read_counts(Path(folder)) for folder in args.same_cost]
        for one in (counts, *same_cost):
            refuse_shared_images(one.settings, measured.settings)
        compared = arms(counts, same_cost)
        results: dict[str, Any] = {
            "command": command_line(),
            "radii": RADII,
            "settings": vars(args),
            "judged": {name: measured.settings[name] for name in ("dataset_name", "split", "every", "n", "alpha")},
            "runs": [
                {
                    name: one.settings[name]
                    for name in ("model_weights", "dataset_fingerprint", "every", "max_samples", "n", "seed")
                }
                for one in (counts, *same_cost, measured)
            ],
            "arms": [],
            "num_threads": torch.get_num_threads(),
            "versions": package_versions("accelerate"),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text()) if path.exists() else results
        if any(before.get(name) != results[name] for name in ("settings", "runs")):
            raise ValueError(f"{path} holds arms of other settings or runs: choose another folder.")
        results["arms"] = before["arms"]
        for number, arm in enumerate(compared):
            if number < len(results["arms"]):
                continue  # of a start before this one
            print(f"Arm {number + 1} of {len(compared)}: {arm.name}", flush=True)
            results["arms"].append(judge(arm, measured, args))
            write_json(results, path)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
