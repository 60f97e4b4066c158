"""Smoothed classifiers: the public API to predict and certify."""

import copy
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from .base_classifier import BaseClassifier, Classifier
from .calibration import Calibration
from .certificates import ABSTAIN, Certificate
from .count_predictor import CountPredictor
from .denoisers import Denoiser
from .loading import weights_digest
from .noise import SmoothingNoise
from .predict_rule import PredictRule
from .preprocessing import NoiseResolution, Preprocessing, to_pixels
from .progress_bar import ProgressBar
from .rules import make_rule
from .sampler import ActiveImage, CountHead, Sampler, in_order
from .sampling_rule import Rule
from .validation import check_count

Images = Sequence[Any] | torch.Tensor


class SmoothedClassifier:
    """
    A classifier under noise: predicts the class that noisy copies of an image get most often, and certifies its radius.

    Args:
        base_classifier: maps pixels `(batch, channels, height, width)` in `[0, 1]` (noise included) to logits
            `(batch, classes)`, or to an output with `logits`. Each row of the output may depend on its own row of the
            input only. A `torch.nn.Module` is put into evaluation mode.
        noise: the smoothing distribution, such as `GaussianNoise(0.25)`.
        batch_size: draws per forward pass, of one image or of several.
        device: where draws are made and classified; by default where the module is, else the CPU.
        image_processor: an image processor of transformers. With it, paths, addresses and PIL images are accepted besides
            tensors. Its normalisation is applied after the noise.
        noise_resolution: where noise is added: at the network's `"input"`, at the `"native"` size of the picture, or at a
            number of pixels a side. The step that resizes pictures to the input is then part of the base classifier, and a
            radius is about the pixels to which noise was added.
        denoiser: maps noisy pixels `(batch, channels, height, width)` and sigma to pixels of the same shape, each image on
            its own; part of the base classifier (arXiv 2003.01908). With it a model trained on clean pictures can be
            smoothed.
        class_names: names of the classes, in the order of the logits.
        autocast: run the forward passes in `torch.bfloat16` (or another type) where torch considers it safe; by default
            they run in the type of the weights. Certificates record it.
        compile: run the base classifier through `torch.compile`. Certificates record it.
        count_head: maps clean pixels and sigma to the class frequencies expected under noise, `(batch, classes)` of sum 1,
            such as a [`CountPredictor`]. `sequential` saves draws with it, `surrogate` does not draw at all.
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
        self.preprocessing = (
            None if image_processor is None else Preprocessing.from_image_processor(image_processor, noise_resolution)
        )
        self.base_classifier = BaseClassifier(base_classifier, self.preprocessing, denoiser, device, autocast, compile)
        self.device = self.base_classifier.device
        if self.preprocessing is None and noise_resolution != "input":
            raise ValueError(
                f"noise_resolution={noise_resolution!r} needs an image processor, which knows how to resize."
            )
        self.noise_resolution = str(noise_resolution)
        self.class_names = class_names

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
            batch_size: draws per forward pass.
            device: where to put the model; by default the CPU.
            autocast: type of the forward passes, see the class.
            compile: use `torch.compile`, see the class.
            count_head: a count head on the Hub or in a local folder; its calibration comes with it.
            noise_resolution: where noise is added, see the class.
            denoiser: part of the base classifier, see the class.
            model_kwargs: passed on to `from_pretrained`. `dtype` is `torch.float32` by default. Certificates record it.
        """
        model_kwargs.setdefault("dtype", torch.float32)
        model = AutoModelForImageClassification.from_pretrained(model_name_or_path, **model_kwargs)
        hub_options = ("revision", "token", "trust_remote_code", "subfolder", "cache_dir", "local_files_only")
        processor = AutoImageProcessor.from_pretrained(
            model_name_or_path, **{name: model_kwargs[name] for name in hub_options if name in model_kwargs}
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
                (only ask the count head: an estimate, or with `delta` and its calibration a claim about most images).
            seed: seed of the noise. The same seed gives an image the same noise, whatever other images there are.
            progress: show a progress bar.
            settings: of the method, see [`make_rule`]: `alpha`, `radius`, `radii`, `max_draws`, `tolerance`, `n0`, `n`,
                `delta`.

        Returns:
            One certificate per image: a list, or an iterator if `images` is one. The iterator yields each certificate once
            it and those before it are finished, and reads ahead no more than fills a batch. ([`certify_stream`] does not
            wait for those before.)

        Raises:
            ValueError: for invalid settings or images that are not pixels, before the first draw; for logits that are not
                finite.
        """
        return self._certify_in_order(images, self.make_rule(method, **settings), seed, progress)

    def make_rule(self, method: str, **settings: Any) -> Rule:
        """Make a rule by name, as [`rules.make_rule`], with the calibration of the count head where it is needed."""
        if method == "surrogate":
            if self.count_head is None:
                raise ValueError("method='surrogate' takes a count head: pass count_head.")
            settings["calibration"] = self.calibration
            if settings.get("delta") is not None:
                self.check_calibration()
        return make_rule(method, **settings)

    def check_calibration(self) -> None:
        """Raise a `ValueError` if the count head was calibrated with other weights, noise or preprocessing."""
        if self.calibration is None:
            return
        modules = {
            "model_weights": self.base_classifier.classifier,
            "head_weights": getattr(self.count_head, "model", None),
        }
        self.calibration.check(
            {
                **{name: weights_digest(module) for name, module in modules.items() if isinstance(module, nn.Module)},
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
        Predictions without a radius: class indices, or `ABSTAIN` (-1) where `n` draws leave doubt.

        Args:
            images: as for [`certify`].
            n: draws per image.
            alpha: probability of a prediction other than the smoothed classifier's.
            seed: seed of the noise.
            progress: show a progress bar.

        Source: Cohen et al. 2019 (arXiv 1902.02918), algorithm PREDICT.
        """
        certificates = self._certify_in_order(images, PredictRule(n, alpha), seed, progress)
        predictions = (certificate.prediction for certificate in certificates)
        return list(predictions) if isinstance(certificates, list) else predictions

    def _certify_in_order(
        self, images: Images | Iterator[Any], rule: Rule, seed: int, progress: bool
    ) -> list[Certificate] | Iterator[Certificate]:
        rule.check(self.noise)
        if isinstance(images, str | Path):
            raise TypeError(f"images={str(images)!r} is one image: pass a list.")
        pixels = (to_pixels(image, self.preprocessing) for image in images)
        if isinstance(images, Iterator):
            return in_order(self.certify_stream(pixels, rule, seed=seed, progress=progress))
        # Convert all before the first draw: a broken image at the end must not waste the work before it
        return list(in_order(self.certify_stream(list(pixels), rule, seed=seed, progress=progress)))

    def certify_stream(
        self,
        images: Iterable[torch.Tensor],
        rule: Rule,
        *,
        seed: int = 0,
        progress: bool = False,
        total: int | None = None,
    ) -> Iterator[tuple[int, Certificate]]:
        """
        Certify images as they come and yield `(position, certificate)` as they finish, in any order.

        Holds only as many images at a time as fill a batch.

        Args:
            images: an iterable, finite or not, of pixels as [`to_pixels`] returns them: each a float32 tensor
                `(channels, height, width)` in `[0, 1]`.
            rule: the sampling rule, such as `SequentialRule(radii=(0.5,))`.
            seed: seed of the noise.
            progress: show a progress bar.
            total: the number of images, for the bar, where `images` has no length.

        Raises:
            ValueError: as [`certify`]; those about settings before the first image is read.
            TypeError: for images that are not float32 tensors.
        """
        rule.check(self.noise)
        if total is None and isinstance(images, Sized):
            total = len(images)
        bar = ProgressBar(total, rule.budget) if progress else None
        sampler = Sampler(
            self.base_classifier,
            self.noise,
            rule,
            seed=seed,
            batch_size=self.batch_size,
            count_head=self.count_head,
            progress=bar,
        )
        try:
            for image in sampler.sample(images):
                yield image.position, self._certificate(image, rule, seed)
        finally:
            if bar is not None:
                bar.close()

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
