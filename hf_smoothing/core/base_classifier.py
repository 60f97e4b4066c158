"""The base classifier: pixels with noise in, logits out, and every step after the noise in between."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .denoisers import Denoiser, load_denoiser
from .preprocessing import Preprocessing
from .row_independence import check_rows
from .weights import check_is_classifier, check_weights, weights_digest

Classifier = Callable[[torch.Tensor], Any]


class BaseClassifier:
    """
    Denoises, resizes, normalises and classifies.

    The arguments are those of [`SmoothedClassifier`]. The denoiser is put onto the device; `prepare` starts a run.

    Raises:
        ValueError: for a module with weights that are not finite, an unknown denoiser.
    """

    def __init__(
        self,
        classifier: Classifier,
        preprocessing: Preprocessing | None = None,
        denoiser: Denoiser | str | None = None,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        compile: bool = False,
    ):
        self.dtype = torch.float32
        if isinstance(classifier, nn.Module):
            classifier.eval()
            check_is_classifier(classifier)
            check_weights(classifier)
            parameter = next((weights for weights in classifier.parameters() if weights.is_floating_point()), None)
            if parameter is not None:
                self.dtype = parameter.dtype
                device = device or parameter.device
        # dynamic: the last batches of a run are smaller than the others
        self.classifier = torch.compile(classifier, dynamic=True) if compile else classifier
        self.compiled = compile
        self.autocast = autocast
        self.preprocessing = preprocessing
        self.resize = None if preprocessing is None else preprocessing.resize
        self.denoiser = load_denoiser(denoiser) if isinstance(denoiser, str) else denoiser
        self._num_classes: int | None = None
        self.device = torch.device(device or "cpu")
        if isinstance(self.denoiser, nn.Module):
            self.denoiser.eval().to(self.device)
            check_weights(self.denoiser)

    @cached_property
    def denoiser_name(self) -> str | None:
        """The name of the denoiser in certificates; for a module, with a digest of its weights."""
        if self.denoiser is None:
            return None
        name = getattr(self.denoiser, "__name__", type(self.denoiser).__name__)
        return f"{name} {weights_digest(self.denoiser)}" if isinstance(self.denoiser, nn.Module) else name

    @property
    def precision(self) -> str:
        """The type of the forward passes, as certificates record it."""
        dtype = str(self.autocast or self.dtype).removeprefix("torch.")
        return dtype if self.autocast is None else f"{dtype} autocast"

    def prepare(self, pixels: torch.Tensor, sigma: float) -> None:
        """
        Prepare a run: put modules into evaluation mode, and check that the rows of a batch do not depend on each other.

        A user may have changed the modules since the last run: `model.train()` lets rows depend on each other.

        Args:
            pixels: the first image `(channels, height, width)`, on the device.
            sigma: the noise level.

        Raises:
            ValueError: where rows depend on each other, see [`check_rows`]; for an output that is no logits.
        """
        for module in self._modules().values():
            module.eval()  # its layers too, which `__call__` does not look at
        logits = check_rows(lambda rows: self([rows], sigma), self._modules(), pixels, sigma)
        self._num_classes = logits.shape[1]

    def _modules(self) -> dict[str, nn.Module]:
        """The modules, by a prefix for the names of their layers."""
        parts = {"": getattr(self.classifier, "_orig_mod", self.classifier), "denoiser": self.denoiser}
        return {prefix: part for prefix, part in parts.items() if isinstance(part, nn.Module)}

    def num_classes(self, pixels: torch.Tensor) -> int:
        """The number of classes, from one forward pass over `pixels` `(channels, height, width)` at the first call."""
        if self._num_classes is None:
            self._num_classes = self([pixels[None]], 0.0).shape[1]
        return self._num_classes

    def __call__(self, groups: Sequence[torch.Tensor], sigma: float) -> torch.Tensor:
        """
        Logits `(batch, classes)` of one batch; a `ValueError` for an output of another shape.

        Args:
            groups: pixels with noise, each group `(draws, channels, height, width)`. Sizes may differ between groups.
            sigma: the noise level, for the denoiser; at 0 it is skipped.
        """
        for module in self._modules().values():
            if module.training:  # `model.train()` between two batches, such as in a generator of images
                module.eval()
        # entering a context that changes nothing takes longer than a small model
        with nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast):
            resized = [self.denoise_and_resize(group, sigma) for group in groups]
            pixels = resized[0] if len(resized) == 1 else torch.cat(resized)
            if self.preprocessing is not None:
                pixels = self.preprocessing.normalize(pixels)
            output = self.classifier(pixels.to(self.dtype))
        logits = output if isinstance(output, torch.Tensor) else output.logits
        if logits.ndim != 2 or len(logits) != len(pixels):
            raise ValueError(f"The base classifier returned shape {tuple(logits.shape)} for {len(pixels)} images.")
        return logits

    def denoise_and_resize(self, pixels: torch.Tensor, sigma: float) -> torch.Tensor:
        """Denoised pixels at the input size of the network, not normalised."""
        if self.denoiser is not None and sigma > 0:
            shape = pixels.shape
            pixels = self.denoiser(pixels, sigma)
            if pixels.shape != shape:
                raise ValueError(f"The denoiser made {tuple(pixels.shape)} of pixels of shape {tuple(shape)}.")
        return pixels if self.resize is None else self.resize(pixels)
