"""Predicted class frequencies as a Parquet file: a study can compare predictors that it need not load."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..core.bounds import FloatArray
from .measured_counts import MeasuredCounts


def write_predictions(measured: MeasuredCounts, probabilities: FloatArray, path: Path) -> None:
    """Write predictions `(rows, classes)` for counts: the columns `index`, `sigma` and `probabilities`."""
    columns = {"index": measured.indices, "sigma": measured.sigmas, "probabilities": list(probabilities)}
    pq.write_table(pa.table(columns), path)


def read_predictions(measured: MeasuredCounts, path: Path) -> FloatArray:
    """
    Read predictions for counts, by image and noise level.

    Returns:
        Predicted class frequencies `(rows, classes)`, in the order of the counts.

    Raises:
        ValueError: for a table that lacks a prediction for an image and noise level that was counted.
    """
    table = pq.read_table(path)
    order = {key: row for row, key in enumerate(zip(table["index"].to_pylist(), table["sigma"].to_pylist()))}
    rows = [order.get(key, -1) for key in zip(measured.indices.tolist(), measured.sigmas.tolist())]
    if -1 in rows:
        missing = rows.index(-1)
        raise ValueError(
            f"{path} lacks a prediction for image {measured.indices[missing]} at sigma = {measured.sigmas[missing]:g}."
        )
    probabilities = table["probabilities"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return np.asarray(probabilities, np.float64)[rows]
