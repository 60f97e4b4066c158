"""Which results are about the same images: shares of different images do not compare models."""

from collections.abc import Sequence
from typing import Any

from .results import Result


def group_by_images(results: Sequence[Result]) -> list[dict[str, Any]]:
    """
    Group results by the images that they are about, in order.

    Runs on the same dataset (by its fingerprint) have the same images where they have the same indices. Copies of a dataset
    differ in fingerprint and may number images anew, and a log has indices only: there, the classes in order of the indices
    decide, unless they are sorted, which those of other images may be too; then the indices must be the same as well.

    Returns:
        A dict per group, ready for JSON: `titles` of the results, `num_images`, and `in_common`, the number of images of the
        first group that are in this one too, by index and class; None where images of one index have different classes.
    """
    groups: list[list[Result]] = []
    for result in results:
        group = next((group for group in groups if have_same_images(group[0], result)), None)
        if group is None:
            groups.append([result])
        else:
            group.append(result)
    return [
        {
            "titles": [result.title for result in group],
            "num_images": len(group[0].labels),
            "in_common": _count_common(groups[0][0], group[0]),
        }
        for group in groups
    ]


def have_same_images(first: Result, second: Result) -> bool:
    """Whether two results are about the same images, see [`group_by_images`]."""
    same_indices = first.labels.keys() == second.labels.keys()
    if _is_one_dataset(first, second):
        return same_indices
    classes, others = (_number_classes(result.labels, sorted(result.labels)) for result in (first, second))
    return classes == others and (same_indices or classes != sorted(classes))


def _is_one_dataset(first: Result, second: Result) -> bool:
    fingerprint = first.settings.get("dataset_fingerprint")
    return fingerprint is not None and fingerprint == second.settings.get("dataset_fingerprint")


def _count_common(first: Result, second: Result) -> int | None:
    shared = sorted(first.labels.keys() & second.labels.keys())
    same = _is_one_dataset(first, second) or (
        _number_classes(first.labels, shared) == _number_classes(second.labels, shared)
    )
    return len(shared) if same else None


def _number_classes(labels: dict[int, int], indices: Sequence[int]) -> list[int]:
    """The classes of images by order of appearance: models and logs may number the same classes differently."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(labels[index], len(numbers)) for index in indices]
