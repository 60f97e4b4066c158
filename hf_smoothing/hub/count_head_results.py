"""What the pages on a count head show besides the figures of its study: rows of accuracies and of claims."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ..metrics.certified_accuracy import exact_interval

Json = dict[str, Any]

KINDS = ("own radius", "radii together", "each radius alone")
"""What a calibrated head claims: each image's own radius, the largest of several given radii, or one given radius."""


def count_head_summary(study: Json) -> Json:
    """
    What the card of a count head shows of a study.

    Returns:
        `rows`: one dict per radius, at the noise level where Monte-Carlo proves most, with the accuracy of Monte-Carlo, of
        the estimate and of the head's own calibration (`calibrated`, None without one); `delta` of that calibration;
        `saved`, see [`saved_draws`].
    """
    delta = min((claim["delta"] for claim in study["calibrated"]), default=None)
    rows = []
    for number, radius in enumerate(_radii(study)):
        row = max(study["errors"], key=lambda row: row["accuracy"]["monte_carlo"][number]["share"])
        accuracies = dict(row["accuracy"])
        for claim in study["calibrated"]:
            if (claim["sigma"], claim["delta"], claim["decided"]) == (row["sigma"], delta, None):
                accuracies["calibrated"] = claim["accuracy"]
        cells: Json = dict.fromkeys(("monte_carlo", "estimate", "calibrated"))
        for kind, accuracy in accuracies.items():
            share = accuracy[number]["share"]
            interval = exact_interval(round(share * row["images"]), row["images"])
            cells[kind] = {"share": share, "interval_95": interval}
        rows.append({"radius": radius, "sigma": row["sigma"], **cells})
    return {"rows": rows, "delta": delta, "saved": saved_draws(study)}


def saved_draws(study: Json) -> list[float]:
    """The share of the sequential rule's draws that the head saves, for each noise level and radius."""
    return [1 - row["draws"]["with"] / row["draws"]["without"] for row in study["draws_to_decide"]]


def count_head_data(study: Json) -> Json:
    """
    What the page of a study shows besides the study itself.

    Returns:
        `radii`; `accuracy`: rows of shares at each radius; `claims`: each claim by random halves, with that of the head's
        `own` calibration; `saved`, see [`saved_draws`]; `unclear`: the rows of draws where with and without the head differ
        by less than two standard errors; `above_delta`: the number of claims of the own calibration that miss more often
        than delta.
    """
    own = {(claim["sigma"], claim["delta"], str(claim["decided"])): claim for claim in study["calibrated"]}
    return {
        "radii": _radii(study),
        "accuracy": [row for errors in study["errors"] for row in _accuracy_rows(study, errors)],
        "claims": [
            {**claim, "kind": _kind(claim), "own": own.get((claim["sigma"], claim["delta"], str(claim["decided"])))}
            for claim in study["conformal"]
        ],
        "saved": saved_draws(study),
        "unclear": [
            row
            for row in study["draws_to_decide"]
            if abs(row["draws"]["with"] - row["draws"]["without"])
            < 2 * math.hypot(row["errors"]["with"], row["errors"]["without"])
        ],
        "above_delta": sum(claim["miss_rate"] > claim["delta"] for claim in study["calibrated"]),
    }


def _radii(study: Json) -> list[float]:
    return [row["radius"] for row in study["errors"][0]["accuracy"]["monte_carlo"]]


def _accuracy_rows(study: Json, errors: Json) -> list[Json]:
    """Rows of one noise level: what the radii are from, and a share for each radius, None where nothing is claimed."""
    sigma, radii = errors["sigma"], _radii(study)
    rows = [{"kind": kind, "n": errors["n"], "shares": _shares(errors["accuracy"][kind])} for kind in _MEASURED]
    rows += [
        {"kind": f"expected_{kind}", "n": expected["n"], "shares": _shares(expected[kind])}
        for expected in study["expected"]
        if expected["sigma"] == sigma
        for kind in _MEASURED
    ]
    for source, measures in _CLAIMED.items():
        at_sigma = sorted((claim for claim in study[source] if claim["sigma"] == sigma), key=_rank)
        for (_, number), group in groupby(at_sigma, key=_rank):
            claims = list(group)
            common = {"kind": source, "delta": claims[0]["delta"], "claims": KINDS[number]}
            rows += [
                {**common, "counted": counted, "shares": _claimed(claims, radii, counted)} for counted in measures
            ]
    rows += [
        {**run, "kind": "sequential", "shares": _shares(run["accuracy"])}
        for run in study["sequential"]
        if run["sigma"] == sigma
    ]
    return [{**row, "sigma": sigma} for row in rows]


_MEASURED = ("monte_carlo", "estimate")
_CLAIMED = {"conformal": ("accuracy", "proved_accuracy"), "calibrated": ("accuracy",)}
"""The claims by random halves and by the own calibration: all that are accurate, and those that Monte-Carlo proves too."""


def _shares(accuracy: Sequence[Json]) -> list[float]:
    return [row["share"] for row in accuracy]


def _kind(claim: Json) -> str:
    return KINDS[_rank(claim)[1]]


def _rank(claim: Json) -> tuple[float, int]:
    """The order of claims in a table: by delta, and by the position of their kind in `KINDS`."""
    decided = claim["decided"]
    return -claim["delta"], 0 if decided is None else 1 if len(decided) > 1 else 2


def _claimed(claims: Sequence[Json], radii: Sequence[float], counted: str) -> list[float | None]:
    """The accuracy of claims at each radius, None where none of them says anything of it."""
    shares = {
        row["radius"]: row["share"] for claim in claims for row in claim[counted] if _known(claim, row["radius"])
    }
    return [shares.get(radius) for radius in radii]


def _known(claim: Json, radius: float) -> bool:
    """Below the smallest decided radius nothing is claimed, and a radius decided alone says nothing about others."""
    decided = claim["decided"]
    return decided is None or radius in decided or (len(decided) > 1 and radius > decided[0])
