"""Save the predictions of count heads for the images of a table of counts: each head predicts the noise levels it learned.

Example:
    python scripts/studies/predict_counts.py --count_head my-counts --counts test.parquet --dataset_name uoft-cs/cifar10 \\
        --split test --output my-counts/predictions.parquet
"""

import argparse
from pathlib import Path

import numpy as np

from hf_smoothing.core.count_predictor import CountPredictor
from hf_smoothing.count_head.comparison import predict_counts
from hf_smoothing.count_head.measured_counts import MeasuredCounts, read_count_table
from hf_smoothing.count_head.prediction_tables import write_predictions
from hf_smoothing.utils.errors import exit_on_error


def predict(measured: MeasuredCounts, count_heads: list[str], device: str) -> tuple[MeasuredCounts, np.ndarray]:
    """The counts at the noise levels of the heads, and what the heads predict for them, `(rows, classes)`."""
    predicted = np.full(measured.counts.shape, np.nan)
    for name in count_heads:
        predictor = CountPredictor.from_pretrained(name, device=device)
        rows = np.isin(measured.sigmas, predictor.model.config.count_sigmas)
        if not np.isnan(predicted[rows]).all():
            raise ValueError(
                f"{name} and a head before it learned the same noise level: give one head for each level."
            )
        own = measured.select_sigmas(np.unique(measured.sigmas[rows]).tolist())
        predicted[rows] = predict_counts(predictor, own, name)
    known = ~np.isnan(predicted).any(1)
    return measured.select_sigmas(np.unique(measured.sigmas[known]).tolist()), predicted[known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count_head", nargs="+", required=True, help="one count head, or one for each noise level")
    for flag, text in {
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
        write_predictions(*predict(measured, args.count_head, args.device), Path(args.output))


if __name__ == "__main__":
    main()
