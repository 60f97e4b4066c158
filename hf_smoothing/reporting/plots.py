"""Plots of results: curves of certified accuracy, histograms. Needs matplotlib."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.certificates import format_radius
from ..metrics.certified_accuracy import certified_accuracy, certified_accuracy_curve
from ..runs.settings import AUTO
from .results import Result, name_of_figure, shared_guarantee_and_norm


def require_matplotlib() -> None:
    """Raise an `ImportError` that says how to install matplotlib where it is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError("Pictures need matplotlib: pip install 'hf-smoothing[plot]'.")


def plot_certified_accuracy(results: Sequence[Result], stem: Path, envelope: str | None = None) -> None:
    """
    Plot certified accuracy against radius with [`draw_certified_accuracy`], as `.png` and `.svg`.

    Args:
        results: of one guarantee, alpha and norm.
        stem: path without an ending.
        envelope: the label of the best of all results, which is drawn too; None to leave it out.

    Raises:
        ValueError: for mixed guarantees, alphas or norms.
    """
    guarantee, norm = shared_guarantee_and_norm(results)
    xlabel = f"radius ({norm or 'norm unknown'}, [0, 1] pixels)"
    ylabel = f"{name_of_figure(guarantee)}, all images".replace(" (", "\n(")  # in one line it is longer than the axis
    with _figure(stem, xlabel, ylabel) as axes:
        draw_certified_accuracy(axes, results, envelope)
        right = axes.get_xlim()[1]
        axes.set(xlim=(-0.02 * right, right), ylim=(0, 1), title=f"guarantee: {guarantee or 'unknown'}")
        # below the curves: above them it would hide the notes at the largest radii that draws can prove
        axes.figure.legend(fontsize=8, ncols=2, loc="outside lower center")


def draw_certified_accuracy(axes: Any, results: Sequence[Result], envelope: str | None = None) -> None:
    """
    Draw certified accuracy against radius on the axes of a figure.

    A result with each image's radius is an exact step curve, dashed where it is a lower bound only: beyond the radius of an
    image whose draws all agree, for which more draws would prove a larger one. A result that decided some radii is known at
    these only: it is drawn as points with exact 95 % intervals, and a thin dashed line to guide the eye.

    Args:
        axes: matplotlib's.
        results: of one guarantee, alpha and norm.
        envelope: the label of the best of all results, which is drawn too: at every radius, or, where any result decided
            radii, at those radii at which no result is a floor. None leaves it out.
    """
    for result in results:
        if radii := result.decided_radii:
            shares, intervals = _points(radii, result)
            reach = np.abs(intervals.T - shares)
            axes.errorbar(radii, shares, reach, fmt="o--", lw=0.7, elinewidth=1, capsize=2, ms=4, label=result.title)
        else:
            _draw_curve(axes, result)
    if envelope is not None:
        _draw_envelope(axes, results, envelope)


def _draw_curve(axes: Any, result: Result) -> None:
    """The curve of a result with each image's radius. Where images come near the largest radius that their draws can prove,
    it is marked: the curve falls there for no other reason."""
    radii, shares = _down_to_0(*_curve(result))
    unanimous = result.unanimous_radii
    counted = bisect_right(radii, min(unanimous, default=math.inf))
    (line,) = axes.step(radii[:counted], shares[:counted], where="pre", label=result.title)
    color = line.get_color()
    if counted < len(radii):
        axes.step(radii[counted - 1 :], shares[counted - 1 :], where="pre", color=color, ls="--")
    largest = radii[-1]
    ceiling = max(unanimous, default=result.largest_radius)
    if ceiling is not None and largest > 0.9 * ceiling:
        axes.axvline(ceiling, color=color, lw=0.8, ls=":")
        label = f"draws prove at most {format_radius(ceiling, 2)}"
        if label not in {text.get_text() for text in axes.texts}:  # two at one place cannot be read
            place = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "va": "top"}
            axes.annotate(label, (ceiling, 0.98), fontsize=7, **place)


def _draw_envelope(axes: Any, all_results: Sequence[Result], label: str) -> None:
    results = [result for result in all_results if result.sigma != AUTO]
    curves = [_curve(result) for result in results]
    decided = sorted({radius for result in results for radius in result.decided_radii})
    if decided:
        at = np.array([radius for radius in decided if all(result.standing(radius) != "floor" for result in results)])
    else:
        at = np.unique(np.concatenate([radii for radii, _ in curves]))
    best = np.max([np.append(shares, 0.0)[np.searchsorted(radii, at)] for radii, shares in curves], axis=0)
    style = {"label": label, "color": "black", "ls": ":"}
    if not decided:
        axes.step(*_down_to_0(at, best), where="pre", lw=1.8, **style)
    elif len(at):
        axes.plot(at, best, marker="o", mfc="none", ms=9, lw=0.9, **style)


def _curve(result: Result) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return certified_accuracy_curve(result.column("prediction"), result.column("label"), result.column("radius"))


def _points(radii: Sequence[float], result: Result) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The shares at some radii, and the ends of their intervals: `(radii,)` and `(radii, 2)`."""
    predictions, labels, certified = (result.column(name) for name in ("prediction", "label", "radius"))
    rows = certified_accuracy(predictions, labels, certified, radii)["certified_accuracy"]
    return np.array([row["share"] for row in rows]), np.array([row["interval_95"] for row in rows])


def _down_to_0(radii: NDArray[np.float64], shares: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """A curve that ends at 0 after its last radius."""
    return [*radii, radii[-1]], [*shares, 0]


def plot_true_class_frequency(results: Sequence[Result], stem: Path) -> bool:
    """
    Plot a histogram of p_A: how often the base classifier predicts the true class of each image under noise.

    arXiv 2410.06895 recommends this distribution instead of the mean radius. The share of the counted draws estimates the
    probability; it is slightly biased where sampling stopped early.

    Returns:
        Whether any result has counts. Without any, nothing is written.
    """
    shares = {result.title: frequency for result in results if len(frequency := true_class_frequency(result))}
    if shares:
        with _figure(stem, "share of the noisy draws with the true class (p_A)", "share of images") as axes:
            _draw_histograms(axes, shares, np.linspace(0, 1, 26))
            axes.set(xlim=(0, 1))
    return bool(shares)


def true_class_frequency(result: Result) -> NDArray[np.float64]:
    """Share of the counted draws with the true class, for each image with draws."""
    pairs = zip(result.column("counts"), result.column("label"))
    return np.array([counts[label] / sum(counts) for counts, label in pairs if counts and sum(counts)])


def plot_draws(results: Sequence[Result], stem: Path) -> bool:
    """
    Plot a histogram of the forward passes per image, on a logarithmic axis.

    Returns:
        Whether any result records them. Without any, nothing is written.
    """
    draws = {
        result.title: np.array([number for number in result.column("num_samples") if number]) for result in results
    }
    draws = {title: numbers for title, numbers in draws.items() if len(numbers)}
    if draws:
        together = np.concatenate([*draws.values()])
        low, high = together.min(), together.max() + 1
        if high < 2 * low:  # the same number for nearly all images: keep it in the middle of an axis that is no point
            low, high = max(1, low / np.sqrt(2)), high * np.sqrt(2)
        with _figure(stem, "forward passes per image", "share of images") as axes:
            from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

            _draw_histograms(axes, draws, np.geomspace(low, high, 31))
            axes.set(xscale="log")
            # on an axis shorter than a decade matplotlib writes 4 x 10^1, and between integers the same integer twice
            locator = (
                MaxNLocator(6, steps=(1, 2, 5, 10), integer=True) if high < 10 * low else LogLocator(subs=(1, 2, 5))
            )
            axes.xaxis.set_major_locator(LogLocator() if high >= 100 * low else locator)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    return bool(draws)


def _draw_histograms(axes: Any, values: dict[str, NDArray[Any]], edges: NDArray[np.float64]) -> None:
    """The share of the values between each two edges, for each label."""
    for label, numbers in values.items():
        axes.stairs(np.histogram(numbers, edges)[0] / len(numbers), edges, label=label, lw=1.4)
    axes.set(ylim=(0, None))
    axes.legend(fontsize=8)


@contextmanager
def _figure(stem: Path, xlabel: str, ylabel: str) -> Iterator[Any]:
    """Axes to draw on; the figure is then written in every format. The same drawing gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    yield axes
    with rc_context({"svg.hashsalt": stem.name}):
        for ending in (".png", ".svg"):
            figure.savefig(stem.with_suffix(ending), dpi=150, metadata={"Date": None} if ending == ".svg" else None)
