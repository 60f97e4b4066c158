"""What the page shows of finished runs: their images with the largest and smallest radii, and their curves."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.certificates import ABSTAIN
from ..data.demo_images import DEMO_IMAGES
from ..reporting.examples import load_pictures
from ..reporting.image_sets import group_by_images
from ..reporting.plots import draw_certified_accuracy
from ..reporting.rendering import render
from ..reporting.report import format_share, summarize
from ..reporting.research_logs import Row
from ..reporting.results import Result, name_of_figure, shared_guarantee_and_norm

EXAMPLE_RUN = Path(__file__).parent / "example_run"
"""A finished run on the images that ship with the package."""

PER_GROUP = 10
_TABLE_RADII = 5
"""About how many radii the table below the curves has."""
_COLORS = ("#0d9488", "#ea580c", "#7c3aed", "#db2777", "#2563eb", "#65a30d")
_THEMES = {"light": "#334155", "dark": "#cbd5e1"}
"""Colours of text and axes."""


@dataclass(frozen=True)
class ImageGroup:
    """Images of a run: a title, how many there are in all, and the rows and pictures of those that are shown."""

    title: str
    total: int
    rows: list[Row]
    pictures: list[Image.Image]


def group_images(result: Result) -> list[ImageGroup]:
    """
    The images of a run with the largest radii, with the smallest, and those on which it abstains.

    Raises:
        ValueError: where the images of the run cannot be loaded, or are not those that it certified.
    """
    dataset = str(result.settings.get("dataset_name", ""))
    if Path(dataset).name == DEMO_IMAGES.name:  # it ships with the package, wherever the run was made
        dataset = str(DEMO_IMAGES)
    rows, picture = load_pictures(result, dataset)
    certified = [at for at, row in enumerate(rows) if row["prediction"] != ABSTAIN]
    certified.sort(key=lambda at: -rows[at]["radius"])
    abstained = [at for at, row in enumerate(rows) if row["prediction"] == ABSTAIN]
    groups = (
        ("Largest radii", len(certified), certified[:PER_GROUP]),
        ("Smallest radii", len(certified), certified[::-1][:PER_GROUP]),
        ("Abstentions", len(abstained), abstained[:PER_GROUP]),
    )
    return [
        ImageGroup(title, total, [rows[at] for at in chosen], [picture(at) for at in chosen])
        for title, total, chosen in groups
    ]


@dataclass(frozen=True)
class Curves:
    """
    Certified accuracy of several results.

    Attributes:
        name: what the curves show.
        norm: of the radii.
        pictures: the same figure as SVG, for a light and a dark page.
        radii: of the table.
        shares: the title of each result, and its shares at these radii as text.
        note: says so where the results are not about the same images; otherwise empty.
    """

    name: str
    norm: str
    pictures: dict[str, str]
    radii: list[float]
    shares: list[tuple[str, list[str]]]
    note: str


def draw_curves(results: Sequence[Result]) -> Curves:
    """
    Draw curves of certified accuracy. Needs matplotlib.

    Raises:
        ValueError: for results that differ in guarantee, alpha or norm: they make no one figure.
    """
    guarantee, norm = shared_guarantee_and_norm(results)
    name, norm = name_of_figure(guarantee), norm or "norm unknown"
    decided = sorted({radius for result in results for radius in result.decided_radii})
    largest = max((row["radius"] or 0 for result in results for row in result.rows), default=0)
    step = max(0.05, round(largest / _TABLE_RADII / 0.05) * 0.05)
    radii = decided or [round(step * number, 2) for number in range(_TABLE_RADII + 1)]
    shares = []
    for result in results:
        (entry,) = summarize([result], radii)["results"]
        shares.append((result.title, [format_share(share) for share in entry["certified_accuracy"]]))
    pictures = {theme: _plot(results, name, norm, color) for theme, color in _THEMES.items()}
    note = render("image_sets", image_sets=group_by_images(results)).strip()
    return Curves(name, norm, pictures, radii, shares, note)


def _plot(results: Sequence[Result], name: str, norm: str, color: str) -> str:
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[str, Any] = {key: color for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")}
    style |= {"axes.edgecolor": color, "axes.prop_cycle": cycler(color=_COLORS), "lines.linewidth": 2}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "curves"}
    with rc_context(style):
        figure = Figure(figsize=(7.2, 4), layout="constrained")
        axes = figure.subplots()
        draw_certified_accuracy(axes, results)
        right = axes.get_xlim()[1]
        axes.set(xlim=(-0.01 * right, right), ylim=(0, 1), xlabel=f"radius ({norm}, [0, 1] pixels)", ylabel=name)
        axes.grid(alpha=0.2)
        axes.legend(fontsize=9, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
