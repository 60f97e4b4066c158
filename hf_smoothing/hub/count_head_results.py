"""What a page on a count head shows besides the figures of its study: rows of claims, and differences to Monte-Carlo."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from ..metrics.certified_accuracy import exact_interval

Json = dict[str, Any]
Claims = Literal["own radius", "radii together", "each radius alone"]
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
    radii = [share["radius"] for share in study["errors"][0]["accuracy"]["monte_carlo"]]
    rows = []
    for number, radius in enumerate(radii):
        row = max(study["errors"], key=lambda row: row["accuracy"]["monte_carlo"][number]["share"])
        calibrated = [
            claim["accuracy"][number]
            for claim in study["calibrated"]
            if (claim["sigma"], claim["delta"], claim["decided"]) == (row["sigma"], delta, None)
        ]
        shares = {
            "monte_carlo": row["accuracy"]["monte_carlo"][number],
            "estimate": row["accuracy"]["estimate"][number],
            "calibrated": calibrated[0] if calibrated else None,
        }
        cells = {
            kind: share
            and {**share, "interval_95": exact_interval(round(share["share"] * row["images"]), row["images"])}
            for kind, share in shares.items()
        }
        rows.append({"radius": radius, "sigma": row["sigma"], **cells})
    return {"rows": rows, "delta": delta, "saved": saved_draws(study)}


def saved_draws(study: Json) -> list[float]:
    """The share of the sequential rule's draws that the head saves, for each noise level and radius."""
    return [1 - row["draws"]["with"] / row["draws"]["without"] for row in study["draws_to_decide"]]


def count_head_data(study: Json) -> Json:
    """
    What the page of a study shows besides the study itself.

    Returns:
        `radii`; `accuracy`: rows of shares at each radius; `differences`: the same minus Monte-Carlo's; `claims`: each claim
        by random halves, with that of the head's `own` calibration; `saved`, see [`saved_draws`]; `unclear`: the rows of
        draws where with and without the head differ by less than two standard errors; `above_delta`: the number of claims
        of the own calibration that miss more often than delta.
    """
    own = {(claim["sigma"], claim["delta"], str(claim["decided"])): claim for claim in study["calibrated"]}
    return {
        "radii": [share["radius"] for share in study["errors"][0]["accuracy"]["monte_carlo"]],
        "accuracy": [row for errors in study["errors"] for row in _accuracy_rows(study, errors)],
        "differences": [row for errors in study["errors"] for row in _difference_rows(study, errors)],
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


def _accuracy_rows(study: Json, errors: Json) -> list[Json]:
    """Rows of one noise level: what the radii are from, and a share for each radius, None where nothing is claimed."""
    sigma, n = errors["sigma"], errors["n"]
    rows = [
        {"sigma": sigma, "kind": kind, "n": n, "shares": _shares(errors["accuracy"][kind])}
        for kind in ("monte_carlo", "estimate")
    ]
    rows += [
        {"sigma": sigma, "kind": f"expected_{kind}", "n": expected["n"], "shares": _shares(expected[kind])}
        for expected in study["expected"]
        if expected["sigma"] == sigma
        for kind in ("monte_carlo", "estimate")
    ]
    radii = [share["radius"] for share in errors["accuracy"]["monte_carlo"]]
    for source in ("conformal", "calibrated"):
        for delta, kind, claims in _grouped(study[source], sigma):
            shares = _claimed(claims, radii, "accuracy")
            rows.append({"sigma": sigma, "kind": source, "delta": delta, "claims": kind, "shares": shares})
    return rows + [
        {**run, "kind": "sequential", "shares": _shares(run["accuracy"])}
        for run in study["sequential"]
        if run["sigma"] == sigma
    ]


def _difference_rows(study: Json, errors: Json) -> list[Json]:
    """Rows of one noise level: shares less those that Monte-Carlo proves, None where that proves nothing."""
    sigma, proved = errors["sigma"], errors["accuracy"]["monte_carlo"]
    rows = [{"kind": "estimate", "n": errors["n"], "shares": _shares(errors["accuracy"]["estimate"]), "of": proved}]
    rows += [
        {"kind": "estimate", "n": row["n"], "shares": _shares(row["estimate"]), "of": row["monte_carlo"]}
        for row in study["expected"]
        if row["sigma"] == sigma
    ]
    radii = [share["radius"] for share in proved]
    smallest = min(claim["delta"] for claim in study["conformal"])
    for delta, kind, claims in _grouped(study["conformal"], sigma):
        if delta == smallest:
            rows += [
                {
                    "kind": counted,
                    "claims": kind,
                    "delta": delta,
                    "shares": _claimed(claims, radii, counted),
                    "of": proved,
                }
                for counted in ("accuracy", "proved_accuracy")
            ]
    for row in rows:
        row["sigma"] = sigma
        row["differences"] = [
            None if share is None or not of["share"] else share - of["share"]
            for share, of in zip(row["shares"], row.pop("of"))
        ]
    return rows


def _shares(accuracy: Sequence[Json]) -> list[float | None]:
    return [row["share"] for row in accuracy]


def _grouped(claims: Sequence[Json], sigma: float) -> list[tuple[float, Claims, list[Json]]]:
    """The claims at a noise level, by delta and kind."""
    groups: dict[tuple[float, Claims], list[Json]] = {}
    for claim in claims:
        if claim["sigma"] == sigma:
            groups.setdefault((claim["delta"], _kind(claim)), []).append(claim)
    order: tuple[Claims, ...] = ("own radius", "radii together", "each radius alone")
    ordered = sorted(groups, key=lambda group: (-group[0], order.index(group[1])))
    return [(delta, kind, groups[delta, kind]) for delta, kind in ordered]


def _kind(claim: Json) -> Claims:
    if claim["decided"] is None:
        return "own radius"
    return "radii together" if len(claim["decided"]) > 1 else "each radius alone"


def _claimed(claims: Sequence[Json], radii: Sequence[float], counted: str) -> list[float | None]:
    """The accuracy of claims at each radius, None where none of them says anything of it."""
    shares: dict[float, float] = {}
    for claim in claims:
        for row in claim[counted]:
            if _known(claim, row["radius"]):
                shares.setdefault(row["radius"], row["share"])
    return [shares.get(radius) for radius in radii]


def _known(claim: Json, radius: float) -> bool:
    """Below the smallest decided radius nothing is claimed, and a radius decided alone says nothing about others."""
    decided = claim["decided"]
    return decided is None or radius in decided or (len(decided) > 1 and radius > decided[0])
