"""A report on finished runs: a summary ready for JSON, and from it alone the tables, the notes and the Markdown page."""

import math
import re
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from ..core.certificates import format_radius
from ..metrics.certified_accuracy import DEFAULT_THRESHOLDS, certified_accuracy, mark_out_of_reach
from ..runs.settings import AUTO
from ..utils.files import write_json
from ..utils.provenance import command_line, package_versions
from .estimates import complete
from .examples import load_pictures, picture_of_certificates
from .image_sets import group_by_images, have_same_images
from .plots import plot_certified_accuracy, plot_draws, plot_true_class_frequency, require_matplotlib
from .rendering import format_number, render
from .research_logs import write_log
from .results import Result, name_of_figure, read_results, shared_guarantee_and_norm
from .tables import print_table

Json = dict[str, Any]

SHOWN_PICTURES = 60
"""Example images of one run and noise level."""


def write_report(
    runs: Sequence[Path],
    output_dir: Path | None = None,
    *,
    radii: Sequence[float] | None = None,
    envelope: bool = False,
    images: str | None = None,
    split: str | None = None,
    log_guarantee: str | None = None,
    log_alpha: float | None = None,
    log_n: Sequence[int] = (),
    estimates: Path | None = None,
    write_logs: bool = False,
) -> tuple[Json, Path]:
    """
    Write `report.json`, `report.md` and pictures on finished runs; return the report and the folder with its files.

    [`read_results`] takes `runs`, `log_guarantee`, `log_alpha` and `log_n`; [`complete`] takes `estimates`, a run with
    estimates for all images; [`summarize`] takes `radii` and `envelope`; [`load_pictures`] takes `images`, the dataset of
    example pictures, and `split`. With `write_logs`, [`write_log`] also writes each run as logs of certificates. The folder
    is `output_dir`; by default the run folder if there is one run, else `report`.

    Raises:
        ImportError: without matplotlib.
        OSError: for a run that does not exist, or a folder that cannot be written to.
        ValueError: for runs that cannot be read or do not belong in one figure, and for images of another dataset.
    """
    require_matplotlib()
    results = read_results(runs, log_guarantee, log_alpha, log_n)
    if estimates is not None:
        results = complete(results, estimates)
    report = summarize(results, radii, envelope)
    folder = output_dir or (runs[0] if len(runs) == 1 and runs[0].is_dir() else Path("report"))
    folder.mkdir(parents=True, exist_ok=True)
    report["pictures"] = _draw_curves(results, report, folder)
    if images is not None:
        report["pictures"] += _draw_examples(results, folder, images, split)
    report["logs"] = _write_logs(results, folder) if write_logs else []
    report["command"] = command_line()
    write_json(report, folder / "report.json")
    (folder / "report.md").write_text(render_report(report), encoding="utf-8")
    return report, folder


def _draw_curves(results: Sequence[Result], report: Json, folder: Path) -> list[dict[str, str]]:
    """Draw what the results have data for; the kind, title and file of each picture."""
    label = report["envelope"]["label"] if report["envelope"] else None
    plot_certified_accuracy(results, folder / "certified-accuracy", label)
    pictures = [{"kind": "certified_accuracy", "title": "Curves", "file": "certified-accuracy.png"}]
    if plot_true_class_frequency(results, folder / "p-a"):
        title = "How often the base classifier is right under noise (p_A)"
        pictures.append({"kind": "true_class_frequency", "title": title, "file": "p-a.png"})
    if plot_draws(results, folder / "draws"):
        pictures.append({"kind": "draws", "title": "Forward passes per image", "file": "draws.png"})
    return pictures


def _draw_examples(results: Sequence[Result], folder: Path, dataset: str, split: str | None) -> list[dict[str, str]]:
    pictures = []
    for number, result in enumerate(results):
        rows, picture = load_pictures(result, dataset, split)
        if rows:  # not every image failed
            file = f"examples-{number}.png"
            picture_of_certificates(picture, rows, result.title, folder / file, at_most=SHOWN_PICTURES)
            title = f"Examples from largest to smallest radius: {result.title}"
            pictures.append({"kind": "examples", "title": title, "file": file})
    return pictures


def _write_logs(results: Sequence[Result], folder: Path) -> list[str]:
    """Write each result of a run as a log; the names of the files. Logs are not written again."""
    files = []
    for result in results:
        if not result.is_log:
            level = "" if result.sigma is None else f"-sigma_{format_number(result.sigma)}"
            files.append(re.sub(r"[^\w.-]+", "-", result.name).strip("-") + f"{level}.log")
            write_log(result.rows, folder / files[-1])
    return files


def print_report(report: Json, console: Console) -> None:
    """Print the tables and notes of a report."""
    print_table(console, name_of_figure(report["guarantee"]), share_rows(report), keys=2)
    print_table(console, "Abstentions, radii, cost", other_rows(report), keys=2)
    console.print(render_notes(report), markup=False, highlight=False)


def summarize(results: Sequence[Result], radii: Sequence[float] | None = None, envelope: bool = False) -> Json:
    """
    What a report says, as a dict ready for JSON; tables and text are made from it alone.

    Args:
        results: of one guarantee, alpha and norm.
        radii: where to count; by default those asked of the runs, or else 0, 0.25, ... 1.
        envelope: add the best share over all results at single levels, at each radius that is more than a floor for one of
            them. It is the figure of no single model and sigma.

    Raises:
        ValueError: for mixed guarantees, alphas or norms, bad values, an envelope over one result or over different images.
    """
    guarantee, norm = shared_guarantee_and_norm(results)
    radii = radii or sorted({radius for result in results for radius in result.asked_radii}) or DEFAULT_THRESHOLDS
    entries = [_summarize_result(result, radii, len(results)) for result in results]
    best = _summarize_envelope(results, entries) if envelope else None
    report = {"guarantee": guarantee, "norm": norm, "results": entries, "envelope": best}
    return report | {"image_sets": group_by_images(results), "versions": package_versions()}


def _summarize_result(result: Result, radii: Sequence[float], num_results: int) -> Json:
    seconds = [value for value in result.column("seconds") if value is not None]
    counted = [sum(counts) for counts in result.column("counts") if counts and sum(counts)]
    try:
        figures = certified_accuracy(**result.metric_columns(), thresholds=radii, num_results=num_results)
    except ValueError as error:
        raise ValueError(f"{result.title}: {error}") from None
    figures["certified_accuracy"] = [_with_standing(share, result) for share in figures["certified_accuracy"]]
    return {
        "run": result.name,
        "title": result.title,
        "is_log": result.is_log,
        "log_n": result.settings.get("n") if result.is_log else None,
        "model": result.settings.get("model_name_or_path"),
        "sigma": result.sigma,
        "sampling": result.sampling,
        "delta": result.delta,
        "false_claims": result.false_claims,
        "calibration": sorted({calibration for calibration in result.column("calibration") if calibration}),
        "noise_resolution": result.noise_resolution,
        "dimensions": result.dimensions,
        "denoiser": result.denoiser,
        "decided_radii": result.decided_radii,
        "radii_out_of_reach": result.radii_out_of_reach,
        "largest_radius": result.largest_radius,
        "unanimous_radii": _summarize_radii(result.unanimous_radii),
        **figures,
        "alpha": result.alpha,  # of failed images too
        "median_counted_draws": median(counted) if counted else None,
        "mean_seconds": sum(seconds) / len(seconds) if seconds else None,
        "fallback": _summarize_fallback(result),
        "made_by": {}
        if result.is_log
        else {name: result.run[name] for name in ("command", "settings", "versions") if name in result.run},
    }


def _with_standing(share: Json, result: Result) -> Json:
    """A row of `certified_accuracy` with its standing: that of the draws of its images, or else that of the run."""
    standing = result.standing(share["radius"])
    if share["out_of_reach"] or standing == "out of reach":
        return {**mark_out_of_reach(share), "standing": "out of reach"}
    return {**share, "standing": "floor" if share["is_floor"] else standing}


def _summarize_radii(radii: Sequence[float]) -> Json | None:
    return {"number": len(radii), "smallest": min(radii), "largest": max(radii)} if radii else None


def _summarize_fallback(result: Result) -> Json | None:
    """The share of certificates at the fallback level, and all passes over those at the level of each certificate."""
    rows = [row for row in result.rows if row.get("level_choice") is not None and row.get("error") is None]
    if not rows:
        return None
    primary, fallback = levels = rows[0]["level_choice"]["levels"]
    at_level = [row["level_choice"]["num_samples"][levels.index(row["sigma"])] for row in rows]
    return {
        "primary": primary,
        "fallback": fallback,
        "agreement": rows[0]["level_choice"]["agreement"],
        "fallback_share": sum(row["sigma"] == fallback for row in rows) / len(rows),
        "draws_over_level": sum(row["num_samples"] for row in rows) / sum(at_level),
    }


def _summarize_envelope(all_results: Sequence[Result], all_entries: Sequence[Json]) -> Json:
    # the classifier of two levels is one, which is compared with the envelope
    results = [result for result in all_results if result.sigma != AUTO]
    entries = [entry for entry in all_entries if entry["sigma"] != AUTO]
    if len(results) < 2:
        raise ValueError("An envelope takes two results or more; there is one.")
    for result in results:
        if not have_same_images(results[0], result):
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
    rows = [
        {
            "radius": best["radius"],
            "share": best["share"],
            "standing": "floor" if best["any_floor"] else "counted",
            "net_of_alpha": best["net_of_alpha"],
            "from": best["entry"]["title"],
        }
        for best in best_by_radius(entries)
    ]
    return {"label": f"best of {kind}", "num_images": len(results[0].rows), "certified_accuracy": rows}


def best_by_radius(entries: Sequence[Json]) -> list[Json]:
    """
    The largest share at each radius that any of a report's results counted, or would have counted with more draws, with the
    `entry` that it is from, its `sigma`, and whether the share of any result is a floor only (`any_floor`).

    Raises:
        ValueError: for results of different alphas.
    """
    certified = [entry for entry in entries if entry["num_failed"] < entry["num_images"]]
    if len({entry["alpha"] for entry in certified}) > 1:
        alphas = "; ".join(f"{entry['title']}: {format_number(entry['alpha'])}" for entry in certified)
        raise ValueError(f"Results of different alphas have no best one. {alphas}.")
    best = []
    for shares in zip(*(entry["certified_accuracy"] for entry in entries)):
        standings = {share["standing"] for share in shares}
        if "counted" in standings or any(share.get("is_floor") for share in shares):
            measured = [pair for pair in zip(shares, entries) if pair[0]["standing"] != "out of reach"]
            share, entry = max(measured, key=lambda pair: pair[0]["share"])
            best.append({**share, "entry": entry, "sigma": entry["sigma"], "any_floor": "floor" in standings})
    return best


def share_rows(report: Json) -> list[dict[str, str]]:
    """
    Certified accuracy as a table of text: one row per run and noise level, the interval below each share. A floor is marked
    (`>=`), and has no interval. A radius that the draws cannot prove is `out of reach`.
    """
    rows = []
    for entry in report["results"]:
        row = {"run": entry["run"], "sigma": format_number(entry["sigma"])}
        for share in entry["certified_accuracy"]:
            interval = ""
            if share["standing"] == "counted":
                low, high = share["interval_95"]
                interval = f"\n{100 * low:.1f}-{100 * high:.1f}"
            row[f"r = {share['radius']:g}"] = format_share(share) + interval
        rows.append(row)
    if envelope := report["envelope"]:
        best = {f"r = {share['radius']:g}": format_share(share) for share in envelope["certified_accuracy"]}
        rows.append(dict.fromkeys(rows[0], "") | {"run": envelope["label"]} | best)  # it may lack some radii
    return rows


def format_share(share: Json) -> str:
    """A share of a report as text: a percentage, marked where it is a lower bound, or `out of reach`."""
    if share["standing"] == "out of reach":
        return "out of reach"
    return f"{'>= ' if share['standing'] == 'floor' else ''}{share['share']:.1%}"


def other_rows(report: Json) -> list[dict[str, str]]:
    """What else a report says of each run and noise level, as a table of text in the order of [`share_rows`]."""
    rows = []
    for entry in report["results"]:
        decided = entry["decided_radii"]
        row = {"run": entry["run"], "sigma": format_number(entry["sigma"])}
        row |= {"images": str(entry.get("num_sampled", entry["num_images"])), "failed": str(entry["num_failed"])}
        row["abstains"] = f"{'<= ' if decided and 0 not in decided else ''}{entry['abstention_rate']:.1%}"
        row["mean\nradius †"] = f"{'>= ' if decided else ''}{format_radius(entry['mean_certified_radius'])}"
        row["median\npasses"] = format_number(entry["median_num_samples"], ",.0f")
        row["mean\nseconds"] = format_number(entry["mean_seconds"], ".3g")
        rows.append(row)
    return rows


def render_notes(report: Json) -> str:
    """What a reader of the tables must know, one paragraph per note."""
    figure, stops = name_of_figure(report["guarantee"]), _early_stops(report["results"])
    wrong = wrong_certificates(report["results"])
    completed = [entry for entry in report["results"] if is_completed(entry)]
    notes = {"figure": figure, "stops": stops, "wrong": wrong, "completed": completed}
    notes["unanimous"] = [entry for entry in report["results"] if _has_too_few_draws(entry)]
    notes["ceilings"] = _ceilings(report["results"])
    return render("report_notes", report=report, **notes).strip()


def is_completed(entry: Json) -> bool:
    """Whether estimates for all images complete the certificates of a sample."""
    return bool(entry.get("num_sampled", entry["num_images"]) < entry["num_images"])


def wrong_certificates(entries: Sequence[Json]) -> list[Json]:
    """The results with a bound of wrong certificates: one dict for all with the same numbers of images and failures."""
    groups: dict[str, Json] = {}
    for entry in entries:
        if entry.get("most_wrong") is not None and not is_completed(entry):
            certificates = entry["num_images"] - entry["num_failed"]
            group = {name: entry[name] for name in ("expected_wrong", "most_wrong", "num_images")}
            group |= {"certificates": certificates, "titles": []}
            groups.setdefault(str(group), group)["titles"].append(entry["title"])
    return list(groups.values())


def _early_stops(entries: Sequence[Json]) -> list[Json]:
    """The results that decided radii: one dict for all at which the same radii were decided."""
    stops: dict[str, Json] = {}
    for entry in entries:
        if decided := entry["decided_radii"]:
            out_of_reach, calibrated = entry["radii_out_of_reach"], entry["guarantee"] in ("marginal", "selected")
            stop = {"decided": decided, "out_of_reach": out_of_reach, "calibrated": calibrated, "titles": []}
            stops.setdefault(str(stop), stop)["titles"].append(entry["title"])
    return list(stops.values())


def _has_too_few_draws(entry: Json) -> bool:
    """Whether a table goes beyond the radii of images whose draws all agree: as many draws as allowed could prove more."""
    radii = entry.get("unanimous_radii")
    ceiling = entry.get("largest_radius") or math.inf
    return radii is not None and any(
        radii["smallest"] < share["radius"] <= ceiling for share in entry["certified_accuracy"]
    )


def _ceilings(entries: Sequence[Json]) -> list[Json]:
    """The largest radii that draws can prove, where a table goes beyond: one dict for all results with the same one."""
    titles: dict[float, list[str]] = {}
    for entry in entries:
        beyond = [share for share in entry["certified_accuracy"] if share["standing"] == "out of reach"]
        known = entry.get("largest_radius") is not None
        if beyond and known and not entry["decided_radii"] and not _has_too_few_draws(entry):
            titles.setdefault(entry["largest_radius"], []).append(entry["title"])
    return [{"radius": radius, "titles": names} for radius, names in titles.items()]


def render_report(report: Json) -> str:
    """A report as Markdown: the table, its notes, the pictures beside `report.json`, and how the runs were made."""
    blank: dict[str, str] = {}  # the envelope has no other figures
    rows = [shares | other for shares, other in zip_longest(share_rows(report), other_rows(report), fillvalue=blank)]
    figure, notes = name_of_figure(report["guarantee"]), render_notes(report)
    made_by = {entry["run"]: entry["made_by"] for entry in report["results"] if entry["made_by"]}
    return render("report", report=report, figure=figure, rows=rows, notes=notes, made_by=made_by)
