"""The sampling engine: fills forward passes with noisy draws of several images and hands their counts to the rules.

It knows a callable that maps a batch of pixels to logits, a noise distribution and a rule, and nothing else.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import count as count_from
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from .active_images import ActiveImage, ProgressBar, in_order
from .base_classifier import BaseClassifier, Classifier
from .calibration import Calibration
from .certificates import ABSTAIN, Certificate
from .count_predictor import CountPredictor
from .denoisers import Denoiser
from .loading import weights_digest
from .noise import SmoothingNoise, image_key
from .predict_rule import PredictRule
from .preprocessing import NoiseResolution, Preprocessing, to_pixels
from .rules import make_rule
from .sampling_rule import CleanPass, Rule
from .validation import check_count

_FIRST_DRAWS = 8
"""About what an image wants right after its clean pass."""

CountHead = Callable[[torch.Tensor, float], torch.Tensor]
Images = Sequence[Any] | torch.Tensor


class SmoothedClassifier:
    """
    A base classifier under noise, which predicts its most likely answer, and can prove how far that holds.

    Args:
        base_classifier: maps pixels `(batch, channels, height, width)` in `[0, 1]` (noise included) to logits
            `(batch, classes)`, or to an output with `logits`. Each row of the output may depend on its own row of the
            input only. A `torch.nn.Module` is put into evaluation mode.
        noise: the smoothing distribution, such as `GaussianNoise(0.25)`.
        batch_size: draws in one forward pass, of one image or of several.
        device: where draws are made and classified; by default where the module is, else the CPU.
        image_processor: an image processor of transformers, with which paths, addresses and PIL images are accepted
            besides tensors. Its normalisation is applied behind the noise.
        noise_resolution: where noise is added: at the network's `"input"`, at the `"native"` size of the picture, or at so
            many pixels a side. What resizes pictures to the input is then part of the base classifier, and a radius is
            about the pixels to which noise was added.
        denoiser: maps noisy pixels `(batch, channels, height, width)` and sigma to pixels of the same shape, each image for
            itself; part of the base classifier (arXiv 2003.01908). It lets a model be smoothed that was trained on clean
            pictures.
        class_names: names of the classes, in the order of the logits.
        autocast: run the forward passes in `torch.bfloat16` (or another type) where torch deems it safe; by default they run
            in the type of the weights. Certificates record either.
        compile: run the base classifier through `torch.compile`. Certificates record it.
        count_head: maps clean pixels and sigma to the class frequencies expected under noise, `(batch, classes)` of sum 1,
            such as a [`CountPredictor`]. `sequential` looks where it says first, `surrogate` does not draw at all.
        calibration: of the count head, for `surrogate` with `delta`; by default the one that it brings.

    Raises:
        ValueError: for a batch size below 1, a module with weights that are not finite, a count head for another noise.

    Source: Cohen et al. 2019 (arXiv 1902.02918).
    """

    def __init__(
        self,
        base_classifier: Classifier,
        noise: SmoothingNoise,
        *,
        batch_size: int = 128,
        device: torch.device | str | None = None,
        image_processor: Any = None,
        noise_resolution: NoiseResolution = "input",
        denoiser: Denoiser | str | None = None,
        class_names: Sequence[str] | None = None,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        count_head: CountHead | None = None,
        calibration: Calibration | None = None,
    ):
        check_count("batch_size", batch_size)
        self.count_head = count_head
        self._check_count_head(noise)
        self.calibration = calibration or getattr(count_head, "calibration", None)
        self.noise = noise
        self.batch_size = batch_size
        self.image_processor = image_processor
        self.preprocessing = None if image_processor is None else Preprocessing.of(image_processor, noise_resolution)
        self.base_classifier = BaseClassifier(base_classifier, self.preprocessing, denoiser, device, autocast, compile)
        self.device = self.base_classifier.device
        if self.preprocessing is None and noise_resolution != "input":
            raise ValueError(
                f"noise_resolution={noise_resolution!r} takes an image processor, which says how to resize."
            )
        self.noise_resolution = str(noise_resolution)
        self.class_names = class_names
        self._num_classes: int | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | Path,
        noise: SmoothingNoise,
        *,
        batch_size: int = 128,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        count_head: str | Path | None = None,
        noise_resolution: NoiseResolution = "input",
        denoiser: Denoiser | str | None = None,
        **model_kwargs: Any,
    ) -> "SmoothedClassifier":
        """
        Smooth any image classifier that `AutoModelForImageClassification` loads.

        Args:
            model_name_or_path: a model on the Hub or a local folder, with an image processor.
            noise: the smoothing distribution.
            batch_size: draws in one forward pass.
            device: where to put the model; by default the CPU.
            autocast: type of the forward passes, see the class.
            compile: use `torch.compile`, see the class.
            count_head: a count head on the Hub or in a local folder; its calibration comes with it.
            noise_resolution: where noise is added, see the class.
            denoiser: part of the base classifier, see the class.
            model_kwargs: passed on to `from_pretrained`. `dtype` is `torch.float32` unless given: certificates record it.
        """
        model_kwargs.setdefault("dtype", torch.float32)
        model = AutoModelForImageClassification.from_pretrained(model_name_or_path, **model_kwargs)
        where = ("revision", "token", "trust_remote_code", "subfolder", "cache_dir", "local_files_only")
        processor = AutoImageProcessor.from_pretrained(
            model_name_or_path, **{name: model_kwargs[name] for name in where if name in model_kwargs}
        )
        if device is not None:
            model = model.to(device)
        names = [name for _, name in sorted(model.config.id2label.items())]
        head = None
        if count_head is not None:
            head = CountPredictor.from_pretrained(
                count_head, device=device, class_names=names, image_processor=processor
            )
        return cls(
            model,
            noise,
            batch_size=batch_size,
            image_processor=processor,
            noise_resolution=noise_resolution,
            denoiser=denoiser,
            class_names=names,
            autocast=autocast,
            compile=compile,
            count_head=head,
        )

    def with_noise(self, noise: SmoothingNoise) -> "SmoothedClassifier":
        """
        The same classifier under another noise. It shares the base classifier, the preprocessing and the count head.

        Raises:
            ValueError: where the count head was trained for another kind of noise.
        """
        self._check_count_head(noise)
        smoothed = copy.copy(self)
        smoothed.noise = noise
        return smoothed

    def _check_count_head(self, noise: SmoothingNoise) -> None:
        known = getattr(self.count_head, "noise", noise.name)
        if known != noise.name:
            raise ValueError(f"The count head knows {known} noise, not {noise.name}.")

    @overload
    def certify(
        self, images: Images, method: str = ..., *, seed: int = ..., progress: bool = ..., **settings: Any
    ) -> list[Certificate]: ...

    @overload
    def certify(
        self, images: Iterator[Any], method: str = ..., *, seed: int = ..., progress: bool = ..., **settings: Any
    ) -> Iterator[Certificate]: ...

    def certify(
        self,
        images: Images | Iterator[Any],
        method: str = "sequential",
        *,
        seed: int = 0,
        progress: bool = False,
        **settings: Any,
    ) -> list[Certificate] | Iterator[Certificate]:
        """
        Certify images; results in their order.

        Args:
            images: a batch tensor, a list or an iterator of images; each a tensor `(channels, height, width)`, float in
                `[0, 1]` or uint8, or, with an image processor, a path, an address or a PIL image. All of one shape.
            method: `"sequential"` (draw until the question is settled), `"fixed"` (the usual protocol), or `"surrogate"`
                (ask the count head: an estimate, or with `delta` and its calibration a claim about most images).
            seed: seed of the noise. The same seed gives an image the same noise, whatever else is in the call.
            progress: show a progress bar.
            settings: of the method, see [`make_rule`]: `alpha`, `radius`, `radii`, `max_draws`, `tolerance`, `n0`, `n`,
                `delta`.

        Returns:
            One certificate an image: a list; for an iterator an iterator, which gives each as soon as it and those before it
            are finished, and reads ahead no more than fills a batch. ([`certify_stream`] does not wait for those before.)

        Raises:
            ValueError: for settings that make no sense or images that are not pixels, before the first draw; for logits that
                are not finite.
        """
        return self._ordered(images, self.make_rule(method, **settings), seed, progress)

    def make_rule(self, method: str, **settings: Any) -> Rule:
        """A rule by name, as [`rules.make_rule`], with the calibration of the count head where that matters."""
        if method == "surrogate":
            if self.count_head is None:
                raise ValueError("method='surrogate' takes a count head: pass count_head.")
            settings["calibration"] = self.calibration
            if settings.get("delta") is not None:
                self.check_calibration()
        return make_rule(method, **settings)

    def check_calibration(self) -> None:
        """Raise a `ValueError` where the count head was calibrated with other weights, noise or steps than are here."""
        if self.calibration is None:
            return
        modules = {
            "model_weights": self.base_classifier.classifier,
            "head_weights": getattr(self.count_head, "model", None),
        }
        self.calibration.check(
            {
                **{name: weights_digest(one) for name, one in modules.items() if isinstance(one, nn.Module)},
                "noise": self.noise.name,
                "noise_resolution": self.noise_resolution,
                "denoiser": self.base_classifier.denoiser_name,
                "dtype": self.base_classifier.precision,
            }
        )

    @overload
    def predict(
        self, images: Images, n: int = ..., alpha: float = ..., *, seed: int = ..., progress: bool = ...
    ) -> list[int]: ...

    @overload
    def predict(
        self, images: Iterator[Any], n: int = ..., alpha: float = ..., *, seed: int = ..., progress: bool = ...
    ) -> Iterator[int]: ...

    def predict(
        self,
        images: Images | Iterator[Any],
        n: int = 100,
        alpha: float = 0.001,
        *,
        seed: int = 0,
        progress: bool = False,
    ) -> list[int] | Iterator[int]:
        """
        The smoothed classifier's answers, without a radius: class indices, or `ABSTAIN` (-1) where `n` draws leave doubt.

        Args:
            images: as for [`certify`].
            n: draws an image.
            alpha: probability of answering other than the smoothed classifier does.
            seed: seed of the noise.
            progress: show a progress bar.

        Source: Cohen et al. 2019 (arXiv 1902.02918), algorithm PREDICT.
        """
        found = self._ordered(images, PredictRule(n, alpha), seed, progress)
        predictions = (certificate.prediction for certificate in found)
        return list(predictions) if isinstance(found, list) else predictions

    def _ordered(
        self, images: Images | Iterator[Any], rule: Rule, seed: int, progress: bool
    ) -> list[Certificate] | Iterator[Certificate]:
        rule.check(self.noise)
        if isinstance(images, str | Path):
            raise TypeError(f"images={str(images)!r} is one image: pass a list.")
        if isinstance(images, Iterator):
            return in_order(self.certify_stream(images, rule, seed=seed, progress=progress))
        # All of them before the first draw: a broken image at the end must not cost the work before it
        pixels = [to_pixels(image, self.preprocessing) for image in images]
        return list(in_order(self.certify_stream(pixels, rule, seed=seed, progress=progress)))

    @torch.inference_mode()
    def certify_stream(
        self, images: Iterable[Any], rule: Rule, *, seed: int = 0, progress: bool = False, total: int | None = None
    ) -> Iterator[tuple[int, Certificate]]:
        """
        Certify images as they come and yield `(position, certificate)` as they finish, in any order.

        Holds only as many images at a time as it takes to fill a batch.

        Args:
            images: an iterable, finite or not; elements as for [`certify`].
            rule: the sampling rule, such as `SequentialRule(radii=(0.5,))`.
            seed: seed of the noise.
            progress: show a progress bar.
            total: the number of images, for the bar, where `images` has no length.

        Raises:
            ValueError: as [`certify`]; those about settings before the first image is read.
        """
        rule.check(self.noise)
        positions = count_from()
        waiting = iter(images)
        active: list[ActiveImage] = []
        shape: torch.Size | None = None
        if total is None and isinstance(images, Sized):
            total = len(images)
        bar = ProgressBar(total, rule.budget) if progress else None
        exhausted = started = False
        try:
            while True:
                # A first batch of nothing but clean passes would take a batch full of images away from other processes
                while (
                    not exhausted
                    and sum(image.wanted if started or image.run else _FIRST_DRAWS for image in active)
                    < self.batch_size
                ):
                    try:
                        pixels = to_pixels(next(waiting), self.preprocessing)
                    except StopIteration:
                        exhausted = True
                        break
                    position = next(positions)
                    shape = shape or pixels.shape
                    resized = self.preprocessing is not None and self.preprocessing.resize is not None
                    if pixels.shape != shape and not resized:
                        raise ValueError(
                            f"Image {position} has shape {tuple(pixels.shape)}, the first one {tuple(shape)}: "
                            "resize them alike."
                        )
                    active.append(self._admit(position, pixels, rule, seed))
                if not active:
                    return
                if self.count_head is not None and rule.uses_clean_pass:
                    self._ask_head(active, rule)
                if not all(image.finished for image in active):
                    self._run_batch([image for image in active if not image.finished], rule)
                started = True
                for image in [image for image in active if image.finished]:
                    yield image.position, self._certificate(image, rule, seed)
                if bar:
                    bar.update(active)
                active = [image for image in active if not image.finished]
        finally:
            if bar:
                bar.close()

    def _admit(self, position: int, pixels: torch.Tensor, rule: Rule, seed: int) -> ActiveImage:
        key = image_key(pixels, seed)
        pixels = pixels.to(self.device)
        noisy = self.noise.around(pixels, key)
        if position == 0:
            rule.check(noisy)  # once more: what the sampler is off by grows with the size of the images
        if rule.uses_clean_pass:
            return ActiveImage(position, noisy, None)
        if self._num_classes is None:
            self._num_classes = self.base_classifier([pixels[None]], 0.0).shape[1]
        return ActiveImage(position, noisy, rule.start(noisy, CleanPass(np.zeros(self._num_classes))))

    def _ask_head(self, active: list[ActiveImage], rule: Rule) -> None:
        """Begin the images that wait for their clean pass with what the count head says of them."""
        assert self.count_head is not None
        waiting = [image for image in active if image.run is None]
        if not waiting:
            return
        clean = torch.cat([self.base_classifier.at_input(image.noisy.image[None], 0.0) for image in waiting])
        frequencies = self.count_head(clean, self.noise.sigma)
        found = frequencies.double().cpu().numpy()
        if found.shape[:1] != (len(waiting),) or not (np.abs(found.sum(1) - 1) < 1e-3).all() or not (found >= 0).all():
            raise ValueError(
                "The count head returned something else than class frequencies: shares of sum 1 an image."
            )
        for image, shares in zip(waiting, found):
            image.num_samples += 1
            image.begin(rule.start(image.noisy, CleanPass(shares, frequencies=True)))

    def _run_batch(self, active: list[ActiveImage], rule: Rule) -> None:
        """One forward pass of at most `batch_size` draws, oldest images first; updates the images it served."""
        rows: list[torch.Tensor] = []
        served: list[tuple[ActiveImage, int]] = []
        room = self.batch_size
        for image in active:
            if room == 0:
                break
            take = min(image.wanted, room)
            rows.append(image.rows(take))
            served.append((image, take))
            room -= take
        logits = self.base_classifier(rows, self.noise.sigma)
        num_classes = logits.shape[1]
        takes = torch.tensor([take for _, take in served], device=logits.device)
        owners = torch.repeat_interleave(torch.arange(len(served), device=logits.device), takes)
        votes = owners * num_classes + logits.argmax(1)
        counts = torch.bincount(votes, minlength=len(served) * num_classes).view(-1, num_classes).cpu().numpy()
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                "The base classifier returned logits that are not finite: its certificates would mean nothing."
            )
        first_row = 0
        for (image, take), image_counts in zip(served, counts):
            image.num_samples += take
            if image.run is None:
                image.begin(rule.start(image.noisy, CleanPass(logits[first_row].double().cpu().numpy())))
            else:
                image.take(image_counts, take)
            first_row += take

    def _certificate(self, image: ActiveImage, rule: Rule, seed: int) -> Certificate:
        assert image.run is not None
        outcome = image.run.outcome()
        return Certificate(
            prediction=outcome.prediction,
            radius=0.0 if outcome.prediction == ABSTAIN else image.noisy.radius(outcome.p_lower, outcome.p_upper),
            guarantee=rule.guarantee,
            method=rule.method,
            noise=self.noise.name,
            norm=self.noise.norm,
            sampling=image.noisy.sampling,
            noise_resolution=self.noise_resolution,
            denoiser=self.base_classifier.denoiser_name,
            sigma=self.noise.sigma,
            alpha=rule.alpha,
            p_lower=outcome.p_lower,
            p_upper=outcome.p_upper,
            counts=tuple(image.run.counts.tolist()),
            num_samples=image.num_samples,
            seed=seed,
            dtype=self.base_classifier.precision,
            compiled=self.base_classifier.compiled,
            delta=outcome.delta,
            calibration=outcome.calibration,
        )
