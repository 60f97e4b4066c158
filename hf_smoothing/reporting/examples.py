"""Certified images as pictures: reading the images of a result, and drawing them with prediction and radius."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.certificates import ABSTAIN, format_radius
from ..data.class_matching import match_classes
from ..data.labelled_images import LabelledImages
from .research_logs import Row
from .results import Result

COLUMNS = 10
"""Images side by side."""


def picture_of_certificates(
    picture: Callable[[int], Image.Image],
    rows: Sequence[Row],
    title: str,
    path: str | Path,
    at_most: int | None = None,
) -> None:
    """
    Draw images with prediction and radius, from the largest radius to the smallest. Needs matplotlib.

    A right prediction is green, a wrong one red, an abstention grey.

    Args:
        picture: the image of each row, by its position; called only for the images that are shown.
        rows: records of a run, without images that failed.
        title: one line above.
        path: where to write; the ending names the format (`.png`, `.svg`).
        at_most: show at most this many images, evenly spread from the largest radius to the smallest.
    """
    from matplotlib.figure import Figure

    order = sorted(range(len(rows)), key=lambda index: (-rows[index]["radius"], rows[index]["prediction"] == ABSTAIN))
    if at_most is not None and len(order) > at_most:
        order = [order[round(rank)] for rank in np.linspace(0, len(order) - 1, at_most)]
    lines = -(-len(order) // COLUMNS)
    figure = Figure(figsize=(1.15 * COLUMNS, 1.6 * lines + 0.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, COLUMNS)).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, index in zip(axes, order):
        row = rows[index]
        label, prediction = (row.get(f"{kind}_name") or row[kind] for kind in ("label", "prediction"))
        axis.imshow(picture(index))
        if row["prediction"] == ABSTAIN:
            text, color = f"{label}?\nabstains", "dimgrey"
        else:
            right = row["prediction"] == row["label"]
            text = f"{prediction}" if right else f"{prediction},\nnot {label}"
            text, color = f"{text}\nr = {format_radius(row['radius'])}", "darkgreen" if right else "firebrick"
        axis.set_title(text, fontsize=7.5, color=color, pad=2)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)


def picture_of_changes(picture: Image.Image, norms: Sequence[float], path: str | Path) -> None:
    """
    Draw a picture beside copies with a change of each l2 norm, in `[0, 1]` pixels. Needs matplotlib.

    In one row the changes are spread over the picture at random, in another they turn pixels of its middle black or white.

    Args:
        picture: RGB.
        norms: the sizes of the changes.
        path: where to write; the ending names the format (`.png`, `.svg`).
    """
    from matplotlib.figure import Figure

    pixels = np.asarray(picture, np.float64) / 255
    noise = np.random.default_rng(0).standard_normal(pixels.shape)
    figure = Figure(figsize=(1.5 * (1 + len(norms)), 3.4), layout="constrained")
    for number, row in enumerate(figure.subplots(2, 1 + len(norms))):
        for axis, norm in zip(row, [0.0, *norms]):
            change = noise if number == 0 else _change_middle(pixels, norm)
            axis.imshow(np.clip(pixels + norm * change / np.linalg.norm(change), 0, 1))
            axis.axis("off")
            axis.set_title("original" if norm == 0 else f"{('spread', 'middle')[number]}, r = {norm:g}", fontsize=8)
    figure.savefig(path, dpi=130)


def _change_middle(pixels: NDArray[np.float64], norm: float) -> NDArray[np.float64]:
    """A change towards black or white, whichever is farther, of the smallest middle square that can hold this norm."""
    change = np.zeros_like(pixels)
    farther = np.where(pixels > 0.5, -pixels, 1 - pixels)
    middle = np.array(pixels.shape[:2]) // 2
    for side in range(1, min(pixels.shape[:2]) + 1):
        top, left = middle - side // 2
        change[top : top + side, left : left + side] = farther[top : top + side, left : left + side]
        if np.linalg.norm(change) >= norm:
            break
    return change


def load_pictures(
    result: Result, dataset: str, split: str | None = None
) -> tuple[list[Row], Callable[[int], Image.Image]]:
    """
    The images of a result. An image is decoded only when it is asked for.

    Args:
        result: its image indices are positions in the split; images that failed are left out.
        dataset: a name or folder that `load_dataset` takes, or a Parquet file.
        split: of the dataset; by default the one that the run certified, or `test` where that is unknown.

    Returns:
        The rows of the images that did not fail, and a function from a position in these rows to the image.

    Raises:
        ValueError: for a dataset that cannot be loaded, has no clear columns, or is not the one that was certified.
    """
    images = _open(result.settings, dataset, split or result.settings.get("split", "test"))
    rows = [row for row in result.rows if row["prediction"] is not None]
    if rows and (last := max(row["index"] for row in rows)) >= len(images.source):
        raise ValueError(
            f"{dataset} has {len(images.source)} images; {result.title} has an image {last}: not the same data."
        )
    chosen = images.source.select([row["index"] for row in rows])
    # records name classes of the model; without a run.json that lists them, assume those of the dataset or of the records
    names = result.settings.get("label_names") or images.class_names or result.class_names()
    to_class = match_classes(images.class_names, names)
    for row, label in zip(rows, chosen[images.label_column]):
        if to_class(label) != row["label"]:
            raise ValueError(
                f"{dataset} has another label for image {row['index']} than {result.title}: not the images certified."
            )
    return rows, lambda position: images.picture(chosen[position])


def _open(settings: dict[str, Any], dataset: str, split: str) -> LabelledImages:
    kinds = {"config_name": "dataset_config_name", "image_column": "image_column", "label_column": "label_column"}
    columns: dict[str, Any] = {kind: settings.get(name) for kind, name in kinds.items()}
    if dataset == settings.get("dataset_name"):
        return LabelledImages(dataset, split=split, **columns)
    with suppress(ValueError):
        return LabelledImages(dataset, split=split, **columns)
    return LabelledImages(dataset, split=split)  # a copy may have other columns, with the usual names
