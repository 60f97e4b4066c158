"""Records of certified images: one flushed JSON line per image during a run, one Parquet file at its end."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ..core.certificates import Certificate
from ..core.fallback_classifier import FallbackClassifier
from ..core.rule_protocols import Rule
from ..core.smoothing import SmoothedClassifier
from ..utils.files import put_in_place
from .settings import AUTO, NoiseLevel

Record = dict[str, Any]

SCHEMA = pa.schema(
    {
        "index": pa.int64(),  # of the image in its split
        "label": pa.int64(),  # the true class, as an index of the model's classes
        "label_name": pa.string(),
        "prediction": pa.int64(),  # -1 where it abstains
        "prediction_name": pa.string(),
        "radius": pa.float64(),
        "guarantee": pa.string(),
        "method": pa.string(),
        "sigma": pa.float64(),
        "alpha": pa.float64(),
        "counts": pa.list_(pa.int64()),
        "p_lower": pa.float64(),
        "p_upper": pa.float64(),
        "num_samples": pa.int64(),
        "seed": pa.int64(),
        "noise": pa.string(),
        "norm": pa.string(),
        "sampling": pa.string(),
        "dtype": pa.string(),
        "compiled": pa.bool_(),
        "noise_resolution": pa.string(),
        "dimensions": pa.int64(),
        "denoiser": pa.string(),
        "delta": pa.float64(),
        "calibration": pa.string(),
        "false_claims": pa.float64(),
        "level_choice": pa.struct(  # only with sigma `auto`: see `LevelChoice`
            {
                "levels": pa.list_(pa.float64()),
                "agreement": pa.float64(),
                "p_lower": pa.float64(),
                "p_upper": pa.float64(),
                "radius": pa.float64(),
                "predictions": pa.list_(pa.int64()),
                "radii": pa.list_(pa.float64()),
                "alphas": pa.list_(pa.float64()),
                "num_samples": pa.list_(pa.int64()),
            }
        ),
        "seconds": pa.float64(),  # of its process since the record before; images share batches: sums and means count
        "error": pa.string(),
    }
)
"""Columns of `certificates.parquet`, and keys of the JSON lines. [`record`] and [`error_record`] say what is null when."""


def record(index: int, label: int, names: Sequence[str], certificate: Certificate) -> Record:
    """The record of a certified image, without the seconds; where it abstains, `prediction_name` is null."""
    prediction_name = None if certificate.abstains else names[certificate.prediction]
    return {**_image_record(index, label, names), **certificate.to_dict(), "prediction_name": prediction_name}


def level_of(row: Record) -> NoiseLevel:
    """The noise level that was asked for, which may be `"auto"`; that of the record is the one in use."""
    return row.get("sigma") if row.get("level_choice") is None else AUTO


def in_order_of_levels(row: Record) -> tuple[bool, float, int]:
    """The place of a record in a table: by the level asked for, `"auto"` last, then by index."""
    level = level_of(row)
    return level == AUTO, 0.0 if level in (None, AUTO) else level, row["index"]


def error_record(
    index: int, label: int, names: Sequence[str], smoothed: SmoothedClassifier, rule: Rule, seed: int, error: str
) -> Record:
    """
    The record of an image that could not be certified, and counts as wrong. It has no draws (`num_samples` is 0), and null
    for everything that draws would tell, which is the noise level too with sigma `auto`.
    """
    level_choice = {"levels": list(smoothed.levels)} if isinstance(smoothed, FallbackClassifier) else None
    return {
        **_image_record(index, label, names),
        "method": rule.method,
        "sigma": smoothed.noise.sigma if level_choice is None else None,
        "level_choice": level_choice,
        "alpha": rule.alpha,
        "num_samples": 0,
        "seed": seed,
        "noise": smoothed.noise.name,
        "norm": smoothed.noise.norm,
        "dtype": smoothed.base_classifier.precision,
        "compiled": smoothed.base_classifier.compiled,
        "noise_resolution": smoothed.noise_resolution,
        "denoiser": smoothed.base_classifier.denoiser_name,
        "error": error,
    }


def _image_record(index: int, label: int, names: Sequence[str]) -> Record:
    return {**dict.fromkeys(SCHEMA.names), "index": index, "label": label, "label_name": names[label]}


class ShardWriter:
    """
    Appends records to a shard, one JSON line each. A killed process loses no record that `write` has returned from; a power
    cut loses about the last second.

    Raises:
        ValueError: where another process is writing to the shard.
        OSError: for a folder that cannot be written to, a full disk; a line cut off by it is dropped at the next start.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lock = _lock(path)
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.synced = time.monotonic()

    def write(self, row: Record) -> None:
        """Append a record."""
        left = memoryview((json.dumps(row) + "\n").encode())
        try:
            while left:
                left = left[os.write(self.file, left) :]
        except OSError as error:
            what = f"{error.strerror} (the records written before are kept: once this is fixed, run the same command again)"
            raise OSError(error.errno, what, str(self.path)) from error
        if time.monotonic() - self.synced > 1:  # against power cuts; a killed process loses nothing without
            os.fsync(self.file)
            self.synced = time.monotonic()

    def close(self) -> None:
        os.close(self.file)
        self.lock.release()


def _lock(path: Path) -> FileLock:
    lock = FileLock(f"{path}.lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{path} is being written by another process: wait for it or end it before you resume this run."
        ) from None
    return lock


def shards_in(folder: Path) -> list[Path]:
    """The shards of a run, in a fixed order."""
    return sorted(folder.glob("*.jsonl"))


def repair(shard: Path) -> None:
    """Drop last lines that a killed process, a full disk or a power cut left incomplete. Errors: see [`ShardWriter`]."""
    lock = _lock(shard)
    try:
        lines = shard.read_bytes().splitlines(keepends=True)
        while lines and _parse(lines[-1]) is None:
            lines.pop()
        os.truncate(shard, sum(map(len, lines)))  # atomic
    finally:
        lock.release()


def _parse(line: bytes) -> Record | None:
    """The record in a line; `None` where the line is incomplete."""
    with suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and line.endswith(b"\n"):
            return row
    return None


def read_shards(folder: Path) -> Iterator[Record]:
    """The records of all shards. Raises a `ValueError` for a line that is not a record."""
    for shard in shards_in(folder):
        with shard.open("rb") as file:
            for number, line in enumerate(file, 1):
                if (row := _parse(line)) is None:
                    raise ValueError(
                        f"{shard}, line {number}, is not a record: delete the line to certify its image again."
                    )
                yield row


def is_right(row: Record, radius: float) -> bool:
    """Whether the prediction of a record is right and certified at `radius`."""
    return row["error"] is None and row["prediction"] == row["label"] and row["radius"] >= radius


def write_parquet(records: Iterable[Record], path: Path) -> None:
    """Write records, by level and index, to a file that is either complete or not there."""
    rows = sorted(records, key=in_order_of_levels)
    part = path.with_name(f".{path.name}.part")
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), part)
    put_in_place(part, path)
