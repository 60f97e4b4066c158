"""Write published class counts as logs of certificates: `hf-smoothing report` lays them beside runs.

Example:
    python scripts/studies/counts_to_logs.py --counts cohen-counts/test.parquet --dataset_name uoft-cs/cifar10 \\
        --every 20 --output_dir logs

Each noise level becomes a file OUTPUT_DIR/NAME-sigma_0.25.log in the format of Cohen et al. (arXiv 1902.02918). Prediction
and radius follow from all counted draws, with the one-sided Clopper-Pearson bound at alpha = 0.001.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from hf_smoothing import GaussianNoise
from hf_smoothing.count_head.measured_counts import read_count_table
from hf_smoothing.reporting.research_logs import write_log
from hf_smoothing.utils.errors import exit_on_error

LARGEST_SHARE = 1 - 1e-12
"""A bound of 1 would be an infinite radius; no number of draws proves it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", required=True, help="Parquet file with index, original_index, sigma, counts")
    parser.add_argument("--dataset_name", required=True, help="dataset that was counted")
    parser.add_argument("--split", default="test", help="its split (default: test)")
    parser.add_argument(
        "--every", type=int, default=1, help="only images whose original_index is a multiple (default: 1)"
    )
    parser.add_argument(
        "--name", default="cohen-resnet110", help="first part of the files' names (default: cohen-resnet110)"
    )
    parser.add_argument("--output_dir", required=True, help="folder of the logs")
    args = parser.parse_args()
    with exit_on_error():
        counts = read_count_table(Path(args.counts), args.dataset_name, args.split)
        columns = pq.read_table(args.counts, columns=["index", "original_index"]).to_pydict()
        original = dict(zip(columns["index"], columns["original_index"]))
        positions = np.array([original[index] for index in counts.indices.tolist()])
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        for sigma in np.unique(counts.sigmas):
            noise = GaussianNoise(float(sigma))
            rows = np.flatnonzero((counts.sigmas == sigma) & (positions % args.every == 0))
            certificates = []
            for row in rows[np.argsort(positions[rows])]:
                label, prediction = int(counts.labels[row]), int(counts.predictions[row])
                radius = noise.radius(min(float(counts.p_lower[row]), LARGEST_SHARE)) if prediction >= 0 else 0.0
                certificate = {"index": int(positions[row]), "label": label, "prediction": prediction}
                certificates.append({**certificate, "radius": radius})
            path = Path(args.output_dir) / f"{args.name}-sigma_{sigma:g}.log"
            write_log(certificates, path)
            print(f"{path}: {len(rows)} images")


if __name__ == "__main__":
    main()
