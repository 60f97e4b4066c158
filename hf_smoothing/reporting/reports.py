"""Tables and text from certification results."""

from collections.abc import Sequence
from itertools import zip_longest
from statistics import median
from typing import Any

from ..core.certificates import format_radius
from ..metrics.certified_accuracy import DEFAULT_THRESHOLDS, certified_accuracy
from ..utils.provenance import package_versions
from .results import Result, name_of_figure, shared_guarantee_and_norm


def percent(row: dict[str, Any]) -> str:
    """A row of certified accuracy as text: the share and its exact 95 % interval."""
    low, high = row["interval_95"]
    return f"{row['share']:.1%} [{low:.1%}, {high:.1%}]"


def summarize(
    results: Sequence[Result], radii: Sequence[float] | None = None, envelope: bool = False
) -> dict[str, Any]:
    """
    What a report says, as a dict ready for JSON; tables and text are made from it alone.

    Args:
        results: of one guarantee and one norm.
        radii: where to count; by default those asked of the runs, or else 0, 0.25, ... 1.
        envelope: add the best share over all results, which is the figure of no single model and sigma, at each radius that
            is more than a floor for one of them.

    Raises:
        ValueError: for mixed guarantees or norms, bad values, or an envelope over one result or over different images.
    """
    guarantee, norm = shared_guarantee_and_norm(results)
    if radii is None:
        radii = sorted({radius for result in results for radius in result.asked_radii}) or DEFAULT_THRESHOLDS
    entries = [_entry(result, radii) for result in results]
    return {
        "guarantee": guarantee,
        "norm": norm,
        "results": entries,
        "envelope": _envelope(results, entries) if envelope else None,
        "versions": package_versions(),
    }


def _entry(result: Result, radii: Sequence[float]) -> dict[str, Any]:
    optional = {"p_lower": "p_lower", "num_samples": "num_samples", "guarantees": "guarantee"}
    seconds = [value for value in result.column("seconds") if value is not None]
    counted = [sum(counts) for counts in result.column("counts") if counts and sum(counts)]
    try:
        figures = certified_accuracy(
            result.column("prediction"),
            result.column("label"),
            result.column("radius"),
            thresholds=radii,
            **{name: result.column(column) for name, column in optional.items() if result.has(column)},
        )
    except ValueError as error:
        raise ValueError(f"{result.title}: {error}") from None
    for share in figures["certified_accuracy"]:
        share["standing"] = result.standing(share["radius"])
    return {
        "run": result.name,
        "title": result.title,
        "is_log": result.is_log,
        "model": result.settings.get("model_name_or_path"),
        "sigma": result.sigma,
        "alpha": result.alpha,
        "delta": result.delta,
        "calibration": sorted({one for one in result.column("calibration") if one}),
        "noise_resolution": result.noise_resolution,
        "denoiser": result.denoiser,
        "decided_radii": result.decided_radii,
        "radii_out_of_reach": result.radii_out_of_reach,
        **figures,
        "median_counted_draws": median(counted) if counted else None,
        "mean_seconds": sum(seconds) / len(seconds) if seconds else None,
        "made_by": {name: result.run[name] for name in ("command", "settings", "versions") if name in result.run},
    }


def _envelope(results: Sequence[Result], entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if len(results) < 2:
        raise ValueError("An envelope takes two results or more; there is one.")
    images = [{(row["index"], row["label"]) for row in result.rows} for result in results]
    for result, found in zip(results, images):
        if found != images[0]:
            raise ValueError(
                f"An envelope takes results for the same images; {result.title} has others than {results[0].title}."
            )
    models, sigmas = {result.model for result in results}, {result.sigma for result in results}
    if None in models:
        kind = "several results, whose models are not all known"
    elif len(models) > 1:
        kind = "several models" if len(sigmas) == 1 else "several models and sigmas"
    else:
        kind = "several sigmas of one model" if len(sigmas) > 1 else "several runs of one model"
    rows = []
    for at in zip(*(entry["certified_accuracy"] for entry in entries)):
        standings = {share["standing"] for share in at}
        if "counted" not in standings:
            continue
        best = max(range(len(at)), key=lambda which: at[which]["share"])
        rows.append(
            {
                "radius": at[best]["radius"],
                "share": at[best]["share"],
                "standing": "floor" if "floor" in standings else "counted",
                "from": entries[best]["title"],
            }
        )
    return {"label": f"best of {kind}", "num_images": len(results[0].rows), "certified_accuracy": rows}


def share_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """
    Certified accuracy as a table of text, from [`summarize`]: one row a run and noise level, intervals below. What is no
    more than a floor is marked (`>=`), and has no interval.
    """
    rows = []
    for entry in report["results"]:
        row = {"run": entry["run"], "sigma": _known(entry["sigma"])}
        for share in entry["certified_accuracy"]:
            low, high = share["interval_95"]
            interval = f"\n{100 * low:.1f}-{100 * high:.1f}" if share["standing"] == "counted" else ""
            row[f"r = {share['radius']:g}"] = _share(share) + interval
        rows.append(row)
    if envelope := report["envelope"]:
        row = {name: "" for name in rows[0]}  # it may lack some radii
        row |= {"run": envelope["label"]} | {
            f"r = {share['radius']:g}": _share(share) for share in envelope["certified_accuracy"]
        }
        rows.append(row)
    return rows


def _share(row: dict[str, Any]) -> str:
    return f"{'>= ' if row['standing'] == 'floor' else ''}{row['share']:.1%}"


def other_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """What else a report says of each run and noise level, as a table of text in the order of [`share_rows`]."""
    rows = []
    for entry in report["results"]:
        decided = entry["decided_radii"]
        rows.append(
            {
                "run": entry["run"],
                "sigma": _known(entry["sigma"]),
                "images": str(entry["num_images"]),
                "failed": str(entry["num_failed"]),
                "abstains": f"{'<= ' if decided and 0 not in decided else ''}{entry['abstention_rate']:.1%}",
                "mean\nradius (*)": f"{'>= ' if decided else ''}{format_radius(entry['mean_certified_radius'])}",
                "median\ndraws": _known(entry["median_num_samples"], ",.0f"),
                "mean\nseconds": _known(entry["mean_seconds"], ".3g"),
            }
        )
    return rows


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    entries = report["results"]
    alphas = ", ".join(sorted({_known(entry["alpha"]) for entry in entries}))
    said = [
        f"{name_of_figure(report['guarantee'])} at each radius r ({report['norm'] or 'norm unknown'}, [0, 1] pixels): the "
        "share of all images whose prediction is right and whose radius is r or more. Abstentions and failed images count "
        "as wrong. Below it the exact 95 % interval, each for itself. "
        f"Guarantee: {report['guarantee'] or 'unknown'}; alpha: {alphas}.",
        "(*) Wrong images count 0; rounded down. A weak measure: a useless classifier can make it as large as it likes, and "
        "it rewards easy images (arXiv 2410.06895). Compare the shares and the distribution of p_A instead.",
    ]
    for entry in entries:
        if entry.get("delta") is not None:
            said.append(
                f"{entry['title']}: true of most images only. For at most a share delta = {entry['delta']:g} of images like "
                f"those calibrated on ({'; '.join(entry['calibration'])}) the radius exceeds what Monte-Carlo proves; the "
                "shares here may exceed Monte-Carlo's by as much."
            )
    if (resolution := entries[0].get("noise_resolution", "input")) != "input":
        said.append(f"Noise was added at resolution {resolution}, to whose pixels the radii belong.")
    for entry in entries:
        if (denoiser := entry.get("denoiser")) is not None:
            said.append(
                f"{entry['title']}: the denoiser {denoiser} is in front of the model, and part of what is certified."
            )
    said += _early_stops(entries)
    if logs := [entry["run"] for entry in entries if entry["is_log"]]:
        said.append(
            f"{', '.join(logs)}: a log, which says nothing of sigma, alpha and draws. Its radii are taken as l2 of [0, 1] "
            "pixels; the usual scripts print them to three digits, rounded to the nearest, so that some fall short of what "
            f"is printed. Its guarantee is {'what --log-guarantee states' if report['guarantee'] else 'unknown'}."
        )
    if envelope := report["envelope"]:
        chosen = "; ".join(
            f"r = {row['radius']:g}: {row['from']}" for row in envelope["certified_accuracy"] if row["share"]
        )
        said.append(
            f"The last row ({envelope['label']}) is no classifier of its own: at each radius it takes the best, chosen in "
            f"sight of these images, so it has no interval. {chosen}."
        )
    return said


def _early_stops(entries: Sequence[dict[str, Any]]) -> list[str]:
    """One note for all runs and noise levels at which the same radii were decided: what of their figures is a bound only."""
    alike: dict[tuple[tuple[float, ...], tuple[float, ...], bool], list[str]] = {}
    for entry in entries:
        if entry["decided_radii"]:
            calibrated = entry.get("delta") is not None
            radii = (tuple(entry["decided_radii"]), tuple(entry["radii_out_of_reach"]), calibrated)
            alike.setdefault(radii, []).append(entry["title"])
    said = []
    for (decided, beyond, calibrated), titles in alike.items():
        out_of_reach = f" Out of reach of its budget, and so 0: {_listed(beyond)}." if beyond else ""
        if calibrated:
            said.append(
                f"{'; '.join(titles)}: of each image the largest of the radii {_listed(decided)} is claimed that can be, or "
                f"none; at other radii the shares count these claims.{out_of_reach}"
            )
            continue
        start = (
            f"{'; '.join(titles)}: sampling stopped once the radii {_listed(decided)} were settled. Everywhere but at "
        )
        bounds = "the figures are bounds only: shares and mean radius from below (>=)"
        if 0 in decided:
            text = f"these radii {bounds}"
        else:
            text = f"these radii, radius 0 and the abstention rate included, {bounds}, abstentions from above (<=)"
        said.append(f"{start}{text}. The draws are those that settling these radii took.{out_of_reach}")
    return said


def how_drawn(report: dict[str, Any]) -> str:
    """What a reader of the curves must know; empty where each is exact at every radius."""
    if not any(entry["decided_radii"] for entry in report["results"]):
        return ""
    return (
        "Points are shares at decided radii, with their exact 95 % intervals; the dashed lines between them are no "
        "measurement."
    )


def counted_draws(report: dict[str, Any]) -> str:
    """What a reader of the histogram of p_A must know: how many draws each share is made of."""
    draws = "; ".join(
        f"{entry['title']}: {_known(entry['median_counted_draws'], ',.0f')}"
        for entry in report["results"]
        if entry["median_counted_draws"] is not None
    )
    return (
        f"Median number of counted draws an image: {draws}. Each share is known no finer than so many draws tell: where "
        "sampling stopped early the histogram is coarse, and the share a little off."
    )


def markdown(report: dict[str, Any], figures: Sequence[tuple[str, str, str]]) -> str:
    """
    A report as Markdown.

    Args:
        report: from [`summarize`].
        figures: the pictures, in order: what each shows, its file name relative to the text, and a note below it, if any.
    """
    text = [f"# {name_of_figure(report['guarantee'])}", markdown_table(report)]
    text += [f"## {what}\n\n![{what}]({file})" + (f"\n\n{note}" if note else "") for what, file, note in figures]
    made = {entry["run"]: entry["made_by"] for entry in report["results"] if entry["made_by"]}
    if made:
        text.append("## How the runs were made")
    for run, by in made.items():
        versions = ", ".join(f"{name} {value}" for name, value in by.get("versions", {}).items())
        command = f"\n\n```bash\n{by['command']}\n```" if "command" in by else ""
        text.append(f"{run}: {versions}; all settings are in `report.json`.{command}")
    return "\n\n".join(text) + "\n"


def markdown_table(report: dict[str, Any]) -> str:
    """The table of a report and its notes, as Markdown."""
    blank: dict[str, str] = {}  # beside the envelope
    rows = [share | other for share, other in zip_longest(share_rows(report), other_rows(report), fillvalue=blank)]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([row.get(name, "") for name in rows[0]] for row in rows)]
    # file names may hold what Markdown reads as the end of a cell
    cells = [
        [cell.replace("|", "\\|").replace("(*)", "(\\*)").replace("\n", "<br>") for cell in line] for line in lines
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return "\n\n".join([table, *(note.replace("(*)", "(\\*)") for note in notes(report))])


def _listed(radii: Sequence[float]) -> str:
    return ", ".join(f"{radius:g}" for radius in radii)


def _known(value: float | None, form: str = "g") -> str:
    return "unknown" if value is None else format(value, form)
