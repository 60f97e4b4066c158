"""Tables, pictures and text from certification results."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import stats

from .certificates import Certificate, format_radius

PACKAGES = ("torch", "transformers", "timm", "numpy", "scipy", "hf-smoothing")


def package_versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {name: version(name) for name in PACKAGES}


@dataclass(frozen=True)
class Proportion:
    """A share of images with its exact (Clopper-Pearson) 95 % confidence interval."""

    hits: int
    total: int

    @property
    def share(self) -> float:
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        found = stats.binomtest(self.hits, self.total).proportion_ci(0.95, method="exact")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} [{low:.1%}, {high:.1%}]"


def certified_accuracy(
    certificates: Sequence[Certificate], labels: Sequence[int], radii: Sequence[float]
) -> dict[float, Proportion]:
    """
    Share of *all* images whose prediction is right and certified at each radius or beyond; abstentions count as wrong.

    Args:
        certificates: one an image.
        labels: the true classes.
        radii: thresholds; radius 0 counts every right prediction that does not abstain.

    Raises:
        ValueError: for unequal numbers, no images, or certificates of different guarantees (they are never mixed).
    """
    if len(certificates) != len(labels) or not certificates:
        raise ValueError(
            f"{len(certificates)} certificates for {len(labels)} labels: give one for each, and at least one."
        )
    guarantees = sorted({certificate.guarantee for certificate in certificates})
    if len(guarantees) > 1:
        raise ValueError(f"Certificates of different guarantees ({', '.join(guarantees)}) do not make one figure.")
    right = np.array([not found.abstains and found.prediction == label for found, label in zip(certificates, labels)])
    found_radii = np.array([found.radius for found in certificates])
    return {radius: Proportion(int((right & (found_radii >= radius)).sum()), len(labels)) for radius in radii}


def require_matplotlib() -> None:
    """Raise an `ImportError` that says how to get matplotlib where it is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError("Pictures need matplotlib: pip install 'hf-smoothing[plot]'.")


def picture_of_certificates(
    images: Sequence[Image.Image],
    certificates: Sequence[Certificate],
    labels: Sequence[int],
    names: Sequence[str],
    path: str | Path,
    columns: int = 10,
    at_most: int | None = None,
) -> None:
    """
    The pictures themselves, with prediction and radius, from the largest radius to the smallest.

    A right prediction is green, a wrong one red, an abstention grey.

    Args:
        images: the pictures.
        certificates: one a picture.
        labels: the true classes.
        names: the classes' names.
        path: where to write; the ending says the format (`.png`, `.svg`).
        columns: pictures in a row.
        at_most: show no more than this many, evenly spread from the largest radius to the smallest.

    Raises:
        ImportError: without matplotlib, which the extra `plot` brings.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    order = sorted(range(len(images)), key=lambda index: (-certificates[index].radius, certificates[index].abstains))
    if at_most is not None and len(order) > at_most:
        order = [order[round(rank)] for rank in np.linspace(0, len(order) - 1, at_most)]
    rows = -(-len(order) // columns)
    figure = Figure(figsize=(1.15 * columns, 1.6 * rows + 0.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, index in zip(axes, order):
        found, label = certificates[index], labels[index]
        axis.imshow(images[index])
        if found.abstains:
            text, color = f"{names[label]}?\nabstains", "dimgrey"
        else:
            right = found.prediction == label
            text = names[found.prediction] if right else f"{names[found.prediction]},\nnot {names[label]}"
            text, color = f"{text}\nr = {format_radius(found.radius)}", "darkgreen" if right else "firebrick"
        axis.set_title(text, fontsize=7.5, color=color, pad=2)
    one = certificates[0]
    figure.suptitle(
        f"Certified at sigma = {one.sigma:g}, alpha = {one.alpha:g}: no change smaller than r ({one.norm}, [0, 1] pixels) "
        "changes the answer",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
