"""Logs of research scripts (the format of Cohen et al., arXiv 1902.02918)."""

import csv
import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..core.certificates import ABSTAIN

Row = dict[str, Any]

LOG_COLUMNS = ("idx", "label", "predict", "radius")

_SIGMA = re.compile(r"sigma[_=-]?(\d+(?:\.\d+)?)", re.IGNORECASE)


def read_log(source: Path, guarantee: str | None, alpha: float | None = None) -> list[Row]:
    """
    The certificates in a log: tab-separated, with the columns idx, label, predict, radius, and often correct and time.

    Args:
        source: the file.
        guarantee: what the certificates carry; a log does not say.
        alpha: largest probability that a certificate is wrong; a log does not say either.

    The noise level is not in a log, but often in its name: Cohen et al. call theirs `sigma_0.25`.

    Raises:
        ValueError: for missing columns, or a line that is not a certificate; the message names the line.
    """
    named = _SIGMA.findall(source.name)  # the last one: a run may be named for another model's level
    shared = {"guarantee": guarantee, "alpha": alpha, "sigma": float(named[-1]) if named else None}
    with source.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t")
        header = reader.fieldnames or []
        if missing := [column for column in LOG_COLUMNS if column not in header]:
            raise ValueError(f"{source} lacks the columns {missing}: a log has them tab-separated in its first line.")
        rows = []
        for row in reader:
            try:
                if None in row or None in row.values():  # how `csv` marks extra and missing cells
                    raise ValueError(f"it does not have the columns {', '.join(header)}")
                rows.append({**_certificate(row), **shared})
            except ValueError as error:
                raise ValueError(f"{source}, line {reader.line_num}, is not a certificate: {error}.") from None
    if not rows:
        raise ValueError(f"{source} has no certificates.")
    return rows


def write_log(rows: Iterable[Row], path: Path) -> None:
    """
    Write certificates as such a log, in the order of `rows`; [`read_log`] reads the same values. Guarantee, alpha and number
    of draws are lost. Images that failed become abstentions.

    Args:
        rows: records with `index`, `label`, `prediction` and `radius`, and `seconds` where known.
        path: of the log.

    Raises:
        ValueError: for radii of another norm than l2, which a log cannot tell.
    """
    lines = ["\t".join((*LOG_COLUMNS, "correct", "time"))]
    for row in rows:
        if row.get("norm") not in (None, "l2"):
            raise ValueError(f"Image {row['index']} has a radius in the norm {row['norm']!r}: logs hold l2 radii.")
        failed = row["prediction"] is None
        prediction, radius = (ABSTAIN, 0.0) if failed else (row["prediction"], float(row["radius"]))
        seconds = row.get("seconds")
        time = "" if seconds is None else timedelta(seconds=seconds)
        values = (row["index"], row["label"], prediction, radius, int(prediction == row["label"]), time)
        lines.append("\t".join(map(str, values)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _certificate(row: dict[str, str]) -> Row:
    label, prediction = int(row["label"]), int(row["predict"])
    correct = row.get("correct")
    if correct is not None and int(correct) != (label == prediction):
        raise ValueError(f"correct={correct} with label {label} and prediction {prediction}")
    return {
        "index": int(row["idx"]),
        "label": label,
        "prediction": prediction,
        "radius": float(row["radius"]),
        "norm": "l2",
        "seconds": _seconds(row["time"]) if row.get("time") else None,
    }


def _seconds(text: str) -> float:
    """Seconds in what `str(timedelta)` or a plain number says: `1 day, 0:00:17.3`, `0:00:17.3`, `17.3`."""
    days, clock = re.fullmatch(r"(?:(\d+) days?, )?(.*)", text).groups()  # type: ignore[union-attr]  # it always matches
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return 86400 * int(days or 0) + seconds
