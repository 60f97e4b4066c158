"""Certified images as pictures: reading the images of a result, and drawing them with prediction and radius."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..core.certificates import ABSTAIN, format_radius
from ..data.class_matching import match_classes
from ..data.labelled_images import LabelledImages
from .logs import Row
from .plots import require_matplotlib
from .results import Result


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
    Draw images with prediction and radius, from the largest radius to the smallest.

    A right prediction is green, a wrong one red, an abstention grey.

    Args:
        picture: the image of each certificate, by its position; called only for the images that are shown.
        predictions: class indices, -1 for an abstention.
        radii: the certified radii.
        labels: the true classes.
        names: the names of the classes.
        title: one line above.
        path: where to write; the ending names the format (`.png`, `.svg`).
        columns: images per row.
        at_most: show at most this many images, evenly spread from the largest radius to the smallest.

    Raises:
        ImportError: without matplotlib, which the extra `plot` installs.
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
    images = _open(result, dataset, split or result.settings.get("split", "test"))
    rows = [row for row in result.rows if row["prediction"] is not None]
    if rows and (last := max(row["index"] for row in rows)) >= len(images.source):
        raise ValueError(
            f"{dataset} has {len(images.source)} images; {result.title} has an image {last}: not the same data."
        )
    chosen = images.source.select([row["index"] for row in rows])
    # records name classes of the model; without a run.json that lists them, assume those of the dataset or of the records
    to_class = match_classes(
        images.class_names,
        result.settings.get("label_names") or images.class_names or _names_by_index(result.names()),
    )
    for row, label in zip(rows, chosen[images.label_column]):
        if to_class(label) != row["label"]:
            raise ValueError(
                f"{dataset} has another label for image {row['index']} than {result.title}: not the images certified."
            )
    return rows, lambda position: images.picture(chosen[position])


def _open(result: Result, dataset: str, split: str) -> LabelledImages:
    settings = result.settings
    columns: dict[str, Any] = {
        "config_name": settings.get("dataset_config_name"),
        "image_column": settings.get("image_column"),
        "label_column": settings.get("label_column"),
    }
    if dataset == settings.get("dataset_name"):
        return LabelledImages(dataset, split=split, **columns)
    with suppress(ValueError):
        return LabelledImages(dataset, split=split, **columns)
    return LabelledImages(dataset, split=split)  # a copy may have other columns, with the usual names


def _names_by_index(names: dict[int, str]) -> list[str]:
    return [names.get(index, str(index)) for index in range(max(names, default=-1) + 1)]
