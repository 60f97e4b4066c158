"""Which class of a model a label of a dataset means."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def match_classes(dataset_names: Sequence[str] | None, model_names: Sequence[str]) -> Callable[[Any], int]:
    """
    A function from the labels of a dataset to class indices of a model, matched by the names of the classes.

    Case, spaces, underscores and hyphens make no difference. A dataset may have fewer classes than the model. Where either
    has no names (transformers then calls them `LABEL_0`, ...), integer labels are class indices.

    Args:
        dataset_names: names of the dataset's classes in the order of its labels; `None` where it has none.
        model_names: names of the model's classes in the order of its logits.

    Raises:
        ValueError: where the dataset has a class that the model lacks (the message shows both lists); the function raises
            it for a label out of range.
    """
    model_keys = [_normalize(name) for name in model_names]
    by_name = {key: index for index, key in enumerate(model_keys) if model_keys.count(key) == 1}
    indices = list(range(len(model_keys)))
    names = model_names if dataset_names is None else dataset_names
    dataset_keys = [_normalize(name) for name in names]
    model_has_no_names = all(key == f"label{index}" for index, key in enumerate(model_keys))
    # equal lists may hold a name twice, as ImageNet's do
    if dataset_keys != model_keys and not (model_has_no_names and len(dataset_keys) == len(model_keys)):
        unmatched = [name for name, key in zip(names, dataset_keys) if key not in by_name]
        if unmatched or len(set(dataset_keys)) < len(dataset_keys):
            raise ValueError(
                f"The classes of dataset and model do not match{': ' if unmatched else ''}{', '.join(unmatched)}. "
                f"The dataset has {list(names)}; the model has {list(model_names)}."
            )
        indices = [by_name[key] for key in dataset_keys]

    def to_class(label: Any) -> int:
        if isinstance(label, str) and dataset_names is None and _normalize(label) in by_name:
            return by_name[_normalize(label)]
        if isinstance(label, (int, np.integer)) and 0 <= label < len(indices):
            return indices[label]
        raise ValueError(
            f"label {label!r} is none of the model's {len(model_names)} classes ({', '.join(model_names)}). A split without "
            "labels cannot be scored; a dataset with other classes needs another model."
        )

    return to_class


def _normalize(name: str) -> str:
    return "".join(name.casefold().replace("_", " ").replace("-", " ").split())
