"""What count heads learn from published counts at equal cost, such as one for all noise levels, or one for each.

Example:
    python scripts/studies/head_budgets.py --counts test.parquet --dataset_name uoft-cs/cifar10 \\
        --heads "one for all=all.parquet=runs/all" "one for each=each.parquet=runs/low,runs/high" --output_dir results

The predictions come from `predict_counts.py`. Writes OUTPUT_DIR/budgets.json: what the trainings cost, and the errors of the
estimates.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from cohen_counts_study import describe_errors
from rich.console import Console

from hf_smoothing.count_head.comparison import compare_with_certificates
from hf_smoothing.count_head.measured_counts import MeasuredCounts, read_count_table
from hf_smoothing.count_head.prediction_tables import read_predictions
from hf_smoothing.reporting.tables import print_table
from hf_smoothing.utils.errors import exit_on_error
from hf_smoothing.utils.files import write_json
from hf_smoothing.utils.provenance import command_line, package_versions

COSTS = ("steps", "images_seen", "seconds")
SAME = ("base", "loss", "per_device_train_batch_size", "learning_rate", "seed")


def describe_heads(heads: str, measured: MeasuredCounts) -> dict[str, Any]:
    """
    The cost of heads and the errors of their predictions.

    Args:
        heads: `NAME=PREDICTIONS=HEAD,HEAD`: a Parquet file, and the folders of the heads that predicted it together.
        measured: counts of the images.
    """
    name, predictions, folders = heads.split("=", 2)
    trainings = [json.loads((Path(folder) / "results" / "training.json").read_text()) for folder in folders.split(",")]
    levels = [
        describe_errors(comparison)
        for comparison in compare_with_certificates(measured, read_predictions(measured, Path(predictions)))
    ]
    return {
        "name": name,
        "heads": len(trainings),
        **{cost: sum(training[cost] for training in trainings) for cost in COSTS},
        **{setting: trainings[0]["settings"][setting] for setting in SAME},
        **{fact: trainings[0][fact] for fact in ("images_counted", "device", "num_threads")},
        "commands": [training["command"] for training in trainings],
        "levels": levels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", required=True, help="Parquet file with the counts of the test images")
    parser.add_argument("--dataset_name", required=True, help="dataset of the images")
    parser.add_argument("--split", default="test", help="its split (default: test)")
    parser.add_argument("--heads", nargs="+", required=True, help="NAME=PREDICTIONS=HEAD,HEAD")
    parser.add_argument("--output_dir", required=True, help="folder of budgets.json")
    args = parser.parse_args()
    with exit_on_error():
        measured = read_count_table(Path(args.counts), args.dataset_name, args.split)
        rows = [describe_heads(heads, measured) for heads in args.heads]
        results = {
            "command": command_line(),
            "settings": vars(args),
            "images": measured.describe_images(),
            "heads": rows,
            "versions": package_versions(),
        }
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(results, folder / "budgets.json")
        shown = [
            {
                "heads": row["name"],
                "seconds": f"{row['seconds']:.0f}",
                "sigma": f"{level['sigma']:g}",
                "another class": f"{level['disagreement']:.1%}",
                "off by": f"{100 * level['largest_deviation']:.1f}",
            }
            for row in rows
            for level in row["levels"]
        ]
        print_table(Console(width=140), "Heads at equal cost", shown)


if __name__ == "__main__":
    main()
