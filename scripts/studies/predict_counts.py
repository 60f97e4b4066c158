"""Save a count head's predictions for the images of a table of counts.

Example:
    python scripts/studies/predict_counts.py --count_head my-counts --counts test.parquet --dataset_name uoft-cs/cifar10 \\
        --split test --output my-counts/predictions.parquet
"""

import argparse
from pathlib import Path

from hf_smoothing.core.count_predictor import CountPredictor
from hf_smoothing.count_head.comparison import predict_counts
from hf_smoothing.count_head.measured_counts import read_count_table
from hf_smoothing.count_head.prediction_tables import write_predictions
from hf_smoothing.utils.errors import exit_on_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, text in {
        "--count_head": "count head",
        "--counts": "Parquet file with counts",
        "--dataset_name": "dataset of the images that were counted",
        "--output": "Parquet file to write",
    }.items():
        parser.add_argument(flag, required=True, help=text)
    parser.add_argument("--split", default="test", help="split of the images that were counted (default: test)")
    parser.add_argument("--device", default="cpu", help="device to compute on (default: cpu)")
    args = parser.parse_args()
    with exit_on_error():
        measured = read_count_table(Path(args.counts), args.dataset_name, args.split)
        predictor = CountPredictor.from_pretrained(args.count_head, device=args.device)
        levels = predictor.model.config.count_sigmas or []
        measured = measured.select_sigmas([sigma for sigma in measured.settings["sigmas"] if sigma in levels])
        write_predictions(measured, predict_counts(predictor, measured, args.count_head), Path(args.output))


if __name__ == "__main__":
    main()
