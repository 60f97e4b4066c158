"""A test that a base classifier looks at each row of a batch alone: otherwise draws are not independent."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

Classify = Callable[[torch.Tensor], torch.Tensor]
"""Maps pixels with noise `(rows, channels, height, width)` to logits `(rows, classes)`."""

_PLACES = {1: 1, 0: 2}
"""Where rows of the first batch are in the second one: row 1 keeps its place, row 0 moves."""

_SAME_PLACES = {row: row for row in range(4)}

_SAME_PLACE_TOLERANCE = 1e-4
"""
As a part of the spread of the values. A row at the same place of a batch of the same size goes through the same additions
in the same order, in every floating-point type. So the values are equal to the last bit, unless a GPU adds in random order.
"""

_MOVED_TOLERANCE = 0.1
"""
As a part of the largest absolute value. At another place, a row may be added up in another order, and low precision
(bfloat16, TF32) makes the difference visible.
"""


class DependentRowsError(ValueError):
    """The rows of a batch depend on each other."""


class RandomLogitsError(ValueError):
    """The same batch gets other logits at each pass."""


def check_rows(
    classify: Classify, modules: Mapping[str, nn.Module], pixels: torch.Tensor, sigma: float
) -> torch.Tensor:
    """
    Check that rows do not depend on each other: the same noisy rows, with other companions and in another order, must get
    the same logits. Takes two forward passes over four rows each.

    Args:
        classify: the base classifier.
        modules: its modules, by a prefix for the names of their layers.
        pixels: an image `(channels, height, width)`, to which the test adds noise from its own generator.
        sigma: scale of the noise.

    Returns:
        Logits `(4, classes)` of noisy copies of the image.

    Raises:
        DependentRowsError: where rows depend on each other.
        RandomLogitsError: where one batch gets different logits at each pass. The messages name the first layer that is
            responsible, where they can.
        ValueError: for logits that are not finite.
    """
    first, second = _make_batches(pixels, sigma)
    logits = classify(first)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("The base classifier returned logits that are not finite: it cannot be certified.")
    if _agree(logits, classify(second), _PLACES):
        return logits
    if not _agree(logits, classify(first), _SAME_PLACES):
        layer = _find_layer(classify, modules, first, first, _SAME_PLACES)
        raise RandomLogitsError(
            f"The base classifier{_blame(layer)} gives the same batch other logits at each pass: no seed could reproduce a "
            "certificate. Switch its randomness off (such as dropout outside evaluation mode), or fix its seed."
        )
    layer = _find_layer(classify, modules, first, second, _PLACES)
    fix = "Compute each row from its own image alone"
    if layer is not None and _has_no_statistics(layer[1]):
        fix = "Train it with running statistics (track_running_stats=True), or use LayerNorm or GroupNorm instead"
    raise DependentRowsError(
        f"The base classifier{_blame(layer)} gives an image other logits in another batch: its rows depend on each other, "
        f"so draws are not independent, and no certificate would hold. {fix}."
    )


def _make_batches(pixels: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Four noisy copies of an image; two of them again, between noisy copies of its negative."""
    generator = torch.Generator().manual_seed(0)  # not the image's: draws of a certificate are used once
    noise = sigma * torch.randn((6, *pixels.shape), generator=generator)
    rows = pixels.cpu() + noise[:4]
    others = 1 - pixels.cpu() + noise[4:]
    second = torch.stack([others[0], rows[1], rows[0], others[1]])
    return rows.to(pixels.device), second.to(pixels.device)


def _agree(first: torch.Tensor, second: torch.Tensor, places: Mapping[int, int]) -> bool:
    """Whether rows of the first batch have the values of the second batch's rows at `places`."""
    first, second = (values.detach().float().flatten(1).nan_to_num() for values in (first, second))
    spread, largest = first.max() - first.min(), first.abs().max()
    for place, other in places.items():
        tolerance = _SAME_PLACE_TOLERANCE * spread if place == other else _MOVED_TOLERANCE * largest
        if bool((first[place] - second[other]).abs().max() > tolerance):
            return False
    return True


Layer = tuple[str, nn.Module]
Call = tuple[Layer, list[torch.Tensor], list[torch.Tensor]]
"""A layer, what it got and what it returned, as tensors with four rows."""


def _find_layer(
    classify: Classify,
    modules: Mapping[str, nn.Module],
    first: torch.Tensor,
    second: torch.Tensor,
    places: Mapping[int, int],
) -> Layer | None:
    """The first layer whose inputs agree in two batches, and whose outputs do not."""
    with _record_calls(modules) as calls:
        classify(first)
        first_calls = calls.copy()
        calls.clear()
        classify(second)
    for (layer, *before), (_, *after) in zip(first_calls, calls):
        inputs_agree, outputs_agree = (
            all(_agree(values, others, places) for values, others in zip(*pair)) for pair in zip(before, after)
        )
        if inputs_agree and not outputs_agree:
            return layer
    return None


@contextmanager
def _record_calls(modules: Mapping[str, nn.Module]) -> Iterator[list[Call]]:
    """Record the calls of all layers, in the order in which they return."""
    calls: list[Call] = []

    def hook_for(layer: Layer) -> Callable[..., None]:
        def record(_: nn.Module, arguments: Any, options: Any, output: Any) -> None:
            calls.append((layer, _tensors_with_rows((arguments, options)), _tensors_with_rows(output)))

        return record

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code calls no new hooks
        for prefix, root in modules.items():
            for name, module in root.named_modules(prefix=prefix):
                handle = module.register_forward_hook(hook_for((name, module)), with_kwargs=True)
                stack.callback(handle.remove)
        yield calls


def _tensors_with_rows(values: Any) -> list[torch.Tensor]:
    """Copies, since later layers may change tensors in place. `(4 * k, ...)`, such as windows, become `(4, ...)`."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.numel()]
    return [value.clone().reshape(4, -1) for value in tensors if value.ndim and len(value) % 4 == 0]


def _blame(layer: Layer | None) -> str:
    if layer is None:
        return ""
    name, module = layer
    without = " without running statistics" if _has_no_statistics(module) else ""
    return f"'s layer {name!r} ({type(module).__name__}{without})" if name else f" ({type(module).__name__})"


def _has_no_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
