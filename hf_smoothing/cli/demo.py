"""The demo: a dataset run on the images that ship with the package, and its certificates as a table and as pictures."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig

from ..core.certificates import format_radius
from ..data.demo_images import DEMO_IMAGES, load_demo_images
from ..metrics.certified_accuracy import certified_accuracy
from ..reporting.examples import picture_of_certificates, picture_of_changes
from ..reporting.plots import require_matplotlib
from ..reporting.rendering import format_interval, format_percent
from ..reporting.tables import print_table
from ..runs.dataset_run import certify_dataset
from ..runs.records import Record
from ..runs.run_folder import RunFolder
from ..runs.settings import RunSettings
from ..utils.files import write_json
from ..utils.processes import start_processes

DEMO_RADII = [0.0, 0.25, 0.5]

DEMO_PICTURE, SHOWN_CHANGES = 6, [0.25, 0.5, 1.0, 2.0]
"""The picture that shows what radii mean, and its changes."""

SHOWN_ROWS = 40  # of the printed table


def find_demo_images() -> str:
    """The Parquet file of the demo, relative to the current folder if it lies below: records should not depend on it."""
    here = Path.cwd()
    return str(DEMO_IMAGES.relative_to(here) if DEMO_IMAGES.is_relative_to(here) else DEMO_IMAGES)


def find_head_beside(model: str, sigma: float) -> str | None:
    """The count head in the folder `MODEL-counts`; `None` where there is none for this noise level."""
    beside = f"{model}-counts"
    if not Path(beside).is_dir():
        return None
    levels = AutoConfig.from_pretrained(beside).count_sigmas
    if min(levels) <= sigma <= max(levels):
        return beside
    print(f"{beside} knows noise levels from {min(levels):g} to {max(levels):g}: certifying without it.")
    return None


def run_demo(settings: RunSettings, output_dir: Path, batch_size: int) -> None:
    """
    Certify the shipped images at one noise level; write the run, its figures (`demo.json`) and pictures; print a table.

    Raises what [`certify_dataset`] raises, and an `ImportError` without matplotlib.
    """
    started = time.monotonic()
    require_matplotlib()  # before the work
    summary = certify_dataset(settings, output_dir, accelerator=start_processes(), batch_size=batch_size)
    assert summary is not None  # there is one process
    folder = RunFolder(output_dir)
    run, rows = folder.read_run(), folder.read_records()
    predictions, radii, labels, guarantees, alphas = (
        [row[name] for row in rows] for name in ("prediction", "radius", "label", "guarantee", "alpha")
    )
    title = (
        f"Certified at sigma = {settings.sigmas[0]:g}, alpha = {settings.alpha:g}: no change smaller than r "
        f"({rows[0]['norm']}, [0, 1] pixels) changes the answer"
    )
    pictures = load_demo_images()
    for file, at_most in (("certificates.png", None), ("certificates-few.png", 30)):
        picture_of_certificates(lambda index: pictures[index]["image"], rows, title, output_dir / file, at_most)
    picture_of_changes(pictures[DEMO_PICTURE]["image"], SHOWN_CHANGES, output_dir / "changes.png")
    _, decided = settings.rule(settings.sigmas[0])
    reach = max(decided or DEMO_RADII)
    figures = certified_accuracy(
        predictions, labels, radii, DEMO_RADII, guarantees=guarantees, alphas=alphas, reach=reach
    )
    results = {
        **{name: run[name] for name in ("settings", "command", "versions", "sessions", "num_records")},
        **{name: figures[name] for name in ("guarantee", "certified_accuracy", "expected_wrong", "most_wrong")},
        "mean_draws": sum(row["num_samples"] for row in rows) / len(rows),
        # with loading the model and drawing the pictures; unknown where a part was certified before
        "seconds": time.monotonic() - started if summary.num_new == len(rows) else None,
    }
    write_json(results, output_dir / "demo.json")
    _print_demo(results, rows, output_dir)


def _print_demo(results: dict[str, Any], rows: list[Record], output_dir: Path) -> None:
    console = Console()
    table = [
        {
            "image": row["index"],
            "label": row["label_name"],
            "prediction": row["prediction_name"] or "(abstains)",
            "radius": format_radius(row["radius"]),
            "passes": row["num_samples"],
            "guarantee": row["guarantee"],
        }
        for row in rows[:SHOWN_ROWS]
    ]
    (sigma,), alpha = results["settings"]["sigmas"], results["settings"]["alpha"]
    title = f"The first {len(table)} of {len(rows)} pictures (sigma = {sigma:g}, alpha = {alpha:g})"
    print_table(console, title, table)
    console.print(f"Certified accuracy over all {len(rows)} pictures, abstentions counted as wrong [95 % interval]:")
    for row in results["certified_accuracy"]:
        share = "out of reach: the draws cannot prove it"
        if not row["out_of_reach"]:
            share = f"{format_percent(row['share'])} [{format_interval(row['interval_95'])}]"
        console.print(f"  r = {row['radius']:<5g} {share}", markup=False, highlight=False)
    steered = "" if results["settings"]["count_head"] is None else " with the help of a count head"
    seconds = "" if results["seconds"] is None else f", {results['seconds']:.0f} s in all"
    console.print(
        f"{results['mean_draws']:.0f} forward passes per picture on average{steered} (the usual protocol takes 100,100)"
        f"{seconds}."
    )
    written = f"Wrote {output_dir / 'certificates.parquet'} and {output_dir / 'certificates.png'}."
    console.print(written, markup=False, soft_wrap=True)
