"""Pictures of results: example images with their radii, curves of certified accuracy, histograms. Needs matplotlib."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.certificates import ABSTAIN, format_radius
from ..metrics.certified_accuracy import certified_accuracy, certified_accuracy_curve
from .results import Result, name_of_figure, shared_guarantee_and_norm

FORMATS = (".png", ".svg")


def require_matplotlib() -> None:
    """Raise an `ImportError` that says how to get matplotlib where it is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError("Pictures need matplotlib: pip install 'hf-smoothing[plot]'.")


def picture_of_certificates(
    picture: Callable[[int], Image.Image],
    predictions: Sequence[int],
    radii: Sequence[float],
    labels: Sequence[int],
    names: Sequence[str] | Mapping[int, str],
    title: str,
    path: str | Path,
    columns: int = 10,
    at_most: int | None = None,
) -> None:
    """
    The pictures themselves, with prediction and radius, from the largest radius to the smallest.

    A right prediction is green, a wrong one red, an abstention grey.

    Args:
        picture: the picture of each certificate, by its position; only those shown are asked for.
        predictions: class indices, -1 for an abstention.
        radii: the certified radii.
        labels: the true classes.
        names: the classes' names.
        title: one line above.
        path: where to write; the ending says the format (`.png`, `.svg`).
        columns: pictures in a row.
        at_most: show no more than this many, evenly spread from the largest radius to the smallest.

    Raises:
        ImportError: without matplotlib, which the extra `plot` brings.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    order = sorted(range(len(radii)), key=lambda index: (-radii[index], predictions[index] == ABSTAIN))
    if at_most is not None and len(order) > at_most:
        order = [order[round(rank)] for rank in np.linspace(0, len(order) - 1, at_most)]
    rows = -(-len(order) // columns)
    figure = Figure(figsize=(1.15 * columns, 1.6 * rows + 0.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, index in zip(axes, order):
        label, prediction = labels[index], predictions[index]
        axis.imshow(picture(index))
        if prediction == ABSTAIN:
            text, color = f"{names[label]}?\nabstains", "dimgrey"
        else:
            right = prediction == label
            text = names[prediction] if right else f"{names[prediction]},\nnot {names[label]}"
            text, color = f"{text}\nr = {format_radius(radii[index])}", "darkgreen" if right else "firebrick"
        axis.set_title(text, fontsize=7.5, color=color, pad=2)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)


def plot_certified_accuracy(results: Sequence[Result], stem: Path, envelope: str | None = None) -> None:
    """
    Certified accuracy against radius, as [`draw_certified_accuracy`] draws it; written to `stem` with each ending of
    `FORMATS`.

    Args:
        results: of one guarantee and one norm.
        stem: path without an ending.
        envelope: draw the best of all results too, under this label.

    Raises:
        ValueError: where guarantees or norms are mixed.
    """
    guarantee, norm = shared_guarantee_and_norm(results)
    with _figure(
        stem, f"radius ({norm or 'norm unknown'}, [0, 1] pixels)", f"{name_of_figure(guarantee)}, all images"
    ) as axes:
        draw_certified_accuracy(axes, results, envelope)
        right = axes.get_xlim()[1]
        axes.set(xlim=(-0.02 * right, right), ylim=(0, 1), title=f"guarantee: {guarantee or 'unknown'}")
        axes.legend(fontsize=8)


def draw_certified_accuracy(axes: Any, results: Sequence[Result], envelope: str | None = None) -> None:
    """
    Certified accuracy against radius on the axes of a figure.

    A result that found each image's radius is an exact step curve. One that decided some radii is known at these alone:
    there it has points with their exact 95 % intervals, and a thin dashed line to guide the eye.

    Args:
        axes: matplotlib's.
        results: of one guarantee and one norm.
        envelope: draw the best of all results too, under this label: at every radius, or, where any result decided some, at
            those of them at which no result is but a floor.
    """
    for result in results:
        if radii := result.decided_radii:
            shares, intervals = _points(radii, result)
            reach = np.abs(intervals.T - shares)
            axes.errorbar(radii, shares, reach, fmt="o--", lw=0.7, elinewidth=1, capsize=2, ms=4, label=result.title)
        else:
            axes.step(*_down_to_0(*_curve(result)), where="pre", label=result.title)
    if envelope is None:
        return
    curves = [_curve(result) for result in results]
    decided = sorted({radius for result in results for radius in result.decided_radii})
    if decided:
        at = np.array([one for one in decided if all(result.standing(one) != "floor" for result in results)])
    else:
        at = np.unique(np.concatenate([radii for radii, _ in curves]))
    best = np.max([_share_at(at, *curve) for curve in curves], axis=0)
    style = {"label": envelope, "color": "black", "ls": ":"}
    if not decided:
        axes.step(*_down_to_0(at, best), where="pre", lw=1.8, **style)
    elif len(at):
        axes.plot(at, best, marker="o", mfc="none", ms=9, lw=0.9, **style)


def _curve(result: Result) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return certified_accuracy_curve(result.column("prediction"), result.column("label"), result.column("radius"))


def _points(radii: Sequence[float], result: Result) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The shares at some radii, and the ends of their intervals: `(radii,)` and `(radii, 2)`."""
    predictions, labels, found = (result.column(name) for name in ("prediction", "label", "radius"))
    rows = certified_accuracy(predictions, labels, found, radii)["certified_accuracy"]
    return np.array([row["share"] for row in rows]), np.array([row["interval_95"] for row in rows])


def _share_at(at: NDArray[np.float64], radii: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.append(shares, 0.0)[np.searchsorted(radii, at, side="left")]


def _down_to_0(radii: NDArray[np.float64], shares: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """A curve that ends at 0 after its last radius."""
    return [*radii, radii[-1]], [*shares, 0]


def plot_true_class_frequency(results: Sequence[Result], stem: Path) -> list[Result]:
    """
    Histogram of p_A: how often the base classifier finds the true class of each image under noise.

    arXiv 2410.06895 recommends this distribution in place of the mean radius. The share of the counted draws stands for the
    probability; where sampling stopped early it is a little off.

    Returns:
        The results that it could be drawn for, those with counts; nothing is written where there are none.
    """
    shared_guarantee_and_norm(results)
    counted = [result for result in results if len(true_class_frequency(result))]
    if not counted:
        return []
    with _figure(stem, "share of the noisy draws that hit the true class (p_A)", "share of images") as axes:
        for result in counted:
            shares = true_class_frequency(result)
            heights, edges = np.histogram(shares, np.linspace(0, 1, 26))
            axes.stairs(heights / len(shares), edges, label=result.title, lw=1.4)
        axes.set(xlim=(0, 1), ylim=(0, None))
        axes.legend(fontsize=8)
    return counted


def true_class_frequency(result: Result) -> NDArray[np.float64]:
    """Share of the counted draws that hit the true class, for each image with draws."""
    pairs = zip(result.column("counts"), result.column("label"))
    return np.array([counts[label] / sum(counts) for counts, label in pairs if counts and sum(counts)])


def plot_draws(results: Sequence[Result], stem: Path) -> list[Result]:
    """
    Histogram of the forward passes spent on an image, on a logarithmic axis.

    Returns:
        The results that it could be drawn for; nothing is written where there are none.
    """
    known = [result for result in results if any(result.column("num_samples"))]
    if not known:
        return []
    require_matplotlib()
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    draws = [np.array([value for value in result.column("num_samples") if value]) for result in known]
    edges = np.geomspace(min(values.min() for values in draws), max(values.max() for values in draws) + 1, 31)
    with _figure(stem, "forward passes an image", "share of images") as axes:
        for result, values in zip(known, draws):
            axes.stairs(np.histogram(values, edges)[0] / len(values), edges, label=result.title, lw=1.4)
        axes.set(xscale="log", ylim=(0, None))
        # matplotlib writes 4 x 10^1 where there is less than a decade to show
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] < 100 * edges[0] else (1,)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8)
    return known


@contextmanager
def _figure(stem: Path, xlabel: str, ylabel: str) -> Iterator[Any]:
    """Axes to draw on, written in every format afterwards; the same drawing gives the same bytes."""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    yield axes
    with rc_context({"svg.hashsalt": stem.name}):
        for ending in FORMATS:
            figure.savefig(stem.with_suffix(ending), dpi=150, metadata={"Date": None} if ending == ".svg" else None)
