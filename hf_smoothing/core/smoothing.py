"""Smoothed classifiers: the public API to predict and certify."""

import copy
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from PIL.Image import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from .agreement import AGREEMENT, LEVELS, check_agreement, given_levels, refuse_levels
from .base_classifier import BaseClassifier, Classifier
from .calibration import Calibration
from .certificates import Certificate
from .count_predictor import CountPredictor
from .denoisers import Denoiser
from .lattice import choose_seed
from .level_certificates import LevelCertificates, certify_levels
from .noise import GaussianNoise, SmoothingNoise
from .preprocessing import NoiseResolution, Preprocessing, to_pixels
from .progress_bar import ProgressBar
from .rule_protocols import Rule
from .rules import make_rule
from .sampler import CountHead, FinishedImages, Sampler, in_order
from .sequential_rule import SequentialRule
from .surrogate_rule import SurrogateRule
from .validation import check_count
from .weights import read_config, weights_digest

if TYPE_CHECKING:
    from .fallback_classifier import FallbackClassifier

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
        image_processor: of transformers. It resizes pictures; its normalisation is applied after the noise. Without it,
            the base classifier gets RGB pictures of their own size.
        noise_resolution: where noise is added: at the network's `"input"`, at the `"native"` size of the picture, or at a
            number of pixels a side. A radius is about these pixels; resizing them to the input is part of the classifier.
        denoiser: a [`Denoiser`], or the name of one ([`load_denoiser`]), part of the base classifier. With it a model
            trained on clean pictures can be smoothed.
        class_names: names of the classes, in the order of the logits.
        autocast: run the forward passes in `torch.bfloat16` (or another type) where torch considers it safe; by default
            they run in the type of the weights.
        compile: run the base classifier through `torch.compile`.
        count_head: maps clean pixels and sigma to the class frequencies expected under noise, `(batch, classes)` of sum 1,
            such as a [`CountPredictor`]. It guides `two-stage` and `sequential`; `surrogate` does
            not draw at all.
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
        self.preprocessing: Preprocessing | None = None
        if image_processor is not None:
            self.preprocessing = Preprocessing.from_image_processor(image_processor, noise_resolution)
        elif noise_resolution != "input":
            raise ValueError(f"noise_resolution={noise_resolution!r} needs an image processor, which can resize.")
        self.base_classifier = BaseClassifier(base_classifier, self.preprocessing, denoiser, device, autocast, compile)
        self.device = self.base_classifier.device
        self.noise_resolution = str(noise_resolution)
        self.class_names = class_names

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | Path,
        noise: SmoothingNoise | Literal["auto"],
        *,
        device: torch.device | str | None = None,
        count_head: str | Path | None = None,
        levels: Sequence[float] | None = None,
        agreement: float | None = None,
        batch_size: int = 128,
        autocast: torch.dtype | None = None,
        compile: bool = False,
        noise_resolution: NoiseResolution = "input",
        denoiser: Denoiser | str | None = None,
        **model_kwargs: Any,
    ) -> "SmoothedClassifier":
        """
        Smooth any image classifier that `AutoModelForImageClassification` loads, from the Hub or a local folder.

        `count_head` too is a name or a folder. `levels` and `agreement` are for `noise="auto"`, one classifier of two noise
        levels, see [`with_fallback`]. `device` is the CPU by default. Other settings are those of [`SmoothedClassifier`];
        further ones (`model_kwargs`) go to transformers' `from_pretrained`, with a `dtype` of `torch.float32` by default.
        """
        model_kwargs.setdefault("dtype", torch.float32)
        hub_options = {"revision", "token", "trust_remote_code", "subfolder", "cache_dir", "local_files_only"}
        hub_kwargs = {name: model_kwargs[name] for name in hub_options & model_kwargs.keys()}
        config = read_config(model_name_or_path, **hub_kwargs)
        if "config" not in model_kwargs and hasattr(config, "model_args"):  # the rest is read with model_kwargs
            model_kwargs.setdefault("model_args", config.model_args)
        model = AutoModelForImageClassification.from_pretrained(model_name_or_path, **model_kwargs)
        processor = AutoImageProcessor.from_pretrained(model_name_or_path, **hub_kwargs)
        model = model if device is None else model.to(device)
        names = [name for _, name in sorted(model.config.id2label.items())]
        shared: dict[str, Any] = {"class_names": names, "image_processor": processor}
        head = None if count_head is None else CountPredictor.from_pretrained(count_head, device=device, **shared)
        shared |= {"batch_size": batch_size, "autocast": autocast, "compile": compile, "denoiser": denoiser}
        shared |= {"count_head": head, "noise_resolution": noise_resolution}
        given = given_levels(levels, agreement)
        if noise == "auto":
            return cls(model, GaussianNoise(1.0), **shared).with_fallback(**given)
        refuse_levels(given)
        return cls(model, noise, **shared)

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

    def with_fallback(self, levels: Sequence[float] = LEVELS, agreement: float = AGREEMENT) -> "FallbackClassifier":
        """
        One classifier of two noise levels (`sigma="auto"`): where more than a share of the noisy copies at the primary level
        agree, their answer, else the answer at the fallback level. Its own noise level does not matter.

        Args:
            levels: the primary and the fallback level, in `[0, 1]` pixels. Radii are at most those at the primary level, or
                those at the fallback level; a small fallback level is right more often where the other one does not agree.
            agreement: the share that must be exceeded, from 0.5 to below 1. A higher one uses the fallback level more often.

        Raises:
            ValueError: for equal levels, an agreement out of range, noise that is not Gaussian.
        """
        from .fallback_classifier import FallbackClassifier

        check_agreement(levels, agreement)
        primary, fallback = (self.with_noise(type(self.noise)(level)) for level in levels)
        return FallbackClassifier(primary, fallback, agreement)

    def _check_count_head(self, noise: SmoothingNoise) -> None:
        known = getattr(self.count_head, "noise", noise.name)
        if known != noise.name:
            raise ValueError(f"The count head knows {known} noise, not {noise.name}.")

    @overload
    def certify(
        self, images: Images, method: str | None = ..., *, sigmas: Sequence[float], **settings: Any
    ) -> list[LevelCertificates]: ...
    @overload
    def certify(self, images: Images, method: str | None = ..., **settings: Any) -> list[Certificate]: ...
    @overload
    def certify(self, images: Iterator[Any], method: str | None = ..., **settings: Any) -> Iterator[Certificate]: ...
    def certify(
        self,
        images: Images | Iterator[Any],
        method: str | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        seed: int | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> list[Certificate] | Iterator[Certificate] | list[LevelCertificates]:
        """
        Certify images; results in their order.

        Args:
            images: a batch tensor, a list or an iterator of images; each a tensor `(channels, height, width)`, float in
                `[0, 1]` or uint8, or, with an image processor, a path, an address or a PIL image. All of one shape.
            method: `"two-stage"` (how far does it hold? the default without radii), `"sequential"` (does it hold to these
                radii? the default with them), `"fixed"` (the usual protocol), or `"surrogate"` (only ask the count head: an
                estimate, or with its calibration a claim: with `delta` about most images, with `false_claims` such that most
                claims hold).
            sigmas: certify at these noise levels instead, with alpha split over them; returns [`LevelCertificates`], one per
                image, which are about several classifiers.
            seed: seed of the noise; by default one from the operating system. Alpha is a probability over a seed that is
                chosen after model and images: a seed that they could know of reproduces results, and promises nothing
                against whoever made them to fit it. The same seed gives an image the same noise, whatever other images
                there are. Trying k seeds until one certifies multiplies alpha by k.
            progress: show a progress bar.
            settings: of the method, such as `alpha` and `radius`, see [`make_rule`].

        Returns:
            One certificate per image: a list, or an iterator if `images` is one, which reads ahead no more than fills a
            batch.

        Raises:
            ValueError: for invalid settings or images that are not pixels, before the first draw; for logits that are not
                finite.
        """
        if sigmas is not None:
            return certify_levels(self, images, sigmas, method, seed=seed, progress=progress, **settings)
        return self._certify_in_order(images, self.make_rule(method, **settings), seed, progress)

    def make_rule(self, method: str | None = None, **settings: Any) -> Rule:
        """Make a rule by name, as [`rules.make_rule`], with the calibration of the count head where it is needed."""
        if method == "surrogate":
            if self.count_head is None:
                raise ValueError("method='surrogate' takes a count head: pass count_head.")
            settings["calibration"] = self.calibration
            if settings.get("delta") is not None or settings.get("false_claims") is not None:
                self.check_calibration()
        return make_rule(method, **settings)

    def check_calibration(self) -> None:
        """Raise a `ValueError` if the count head was calibrated with other weights, noise or preprocessing."""
        if self.calibration is None:
            return
        classifier, head = self.base_classifier.classifier, getattr(self.count_head, "model", None)
        modules = {"model_weights": classifier, "head_weights": head}
        digests = {name: weights_digest(module) for name, module in modules.items() if isinstance(module, nn.Module)}
        smoothing = {
            "noise": self.noise.name,
            "noise_resolution": self.noise_resolution,
            "denoiser": self.base_classifier.denoiser_name,
            "dtype": self.base_classifier.precision,
        }
        self.calibration.check(digests | smoothing)

    @overload
    def predict(
        self, images: Images, alpha: float = ..., max_draws: int = ..., *, seed: int | None = ..., progress: bool = ...
    ) -> list[int]: ...
    @overload
    def predict(
        self,
        images: Iterator[Any],
        alpha: float = ...,
        max_draws: int = ...,
        *,
        seed: int | None = ...,
        progress: bool = ...,
    ) -> Iterator[int]: ...
    def predict(
        self,
        images: Images | Iterator[Any],
        alpha: float = 0.001,
        max_draws: int = 1000,
        *,
        seed: int | None = None,
        progress: bool = False,
    ) -> list[int] | Iterator[int]:
        """
        The smoothed classifier's answers without a radius, as class indices: each is wrong with probability at most `alpha`.
        `ABSTAIN` (-1) where `max_draws` leave doubt. Takes few draws, see [`SequentialRule`]; `"auto"` takes more.

        Takes images and returns a list or an iterator as [`certify`] does.
        """
        certificates = self._certify_in_order(images, self._rule_to_predict(alpha, max_draws), seed, progress)
        predictions = (certificate.prediction for certificate in certificates)
        return list(predictions) if isinstance(certificates, list) else predictions

    def check_rule(self, rule: Rule) -> None:
        """Raise a `ValueError` if the rule can never claim what it is asked to, or is none for this classifier."""
        rule.check(self.noise)

    def _rule_to_predict(self, alpha: float, max_draws: int) -> Rule:
        return SequentialRule((0.0,), alpha, max_draws)

    def _certify_in_order(
        self, images: Images | Iterator[Any], rule: Rule, seed: int | None, progress: bool
    ) -> list[Certificate] | Iterator[Certificate]:
        self.check_rule(rule)
        if isinstance(images, str | Path | Image):
            raise TypeError(f"images={str(images)!r} is one image: pass a list.")
        if hasattr(images, "column_names"):  # `datasets` need not be installed where this file is remote code
            raise TypeError(
                f"A {type(images).__name__} is no list of images: pass its column, such as dataset['image']."
            )
        pixels = (to_pixels(image, self.preprocessing) for image in images)
        selection = rule if isinstance(rule, SurrogateRule) and rule.false_claims is not None else None
        if isinstance(images, Iterator):
            if selection is not None:
                raise ValueError("false_claims depends on all images: pass them as one list, not as an iterator.")
            return in_order(self.certify_stream(pixels, rule, seed=seed, progress=progress))
        # Convert all before the first draw: a broken image at the end must not waste the work before it
        certificates = list(in_order(self.certify_stream(list(pixels), rule, seed=seed, progress=progress)))
        if selection is None:
            return certificates
        claims = selection.select(self.noise, [(estimate.prediction, estimate.p_lower) for estimate in certificates])
        return [replace(estimate, **claim) for estimate, claim in zip(certificates, claims)]

    def certify_stream(
        self,
        images: Iterable[torch.Tensor],
        rule: Rule,
        *,
        seed: int | None = None,
        progress: bool = False,
        total: int | None = None,
    ) -> Iterator[tuple[int, Certificate]]:
        """
        Certify images as they come and yield `(position, certificate)` as they finish, in any order. Holds only as many
        images at a time as fill a batch.

        Args:
            images: an iterable, finite or not, of pixels as [`to_pixels`] returns them.
            rule: the sampling rule, such as `SequentialRule(radii=(0.5,))`.
            seed: seed of the noise, as in [`certify`].
            progress: show a progress bar.
            total: the number of images, for the bar, where `images` has no length.

        Raises:
            ValueError: as [`certify`]; those about settings before the first image is read.
            TypeError: for images that are not float32 tensors.
        """
        self.check_rule(rule)
        seed = choose_seed() if seed is None else seed
        if total is None and isinstance(images, Sized):
            total = len(images)
        bar = ProgressBar(total) if progress else None
        try:
            yield from self._certify(images, rule, seed, bar)
        finally:
            if bar is not None:
                bar.close()

    def _certify(
        self, images: Iterable[torch.Tensor], rule: Rule, seed: int, bar: ProgressBar | None
    ) -> Iterator[tuple[int, Certificate]]:
        sampler = Sampler(self.base_classifier, self.noise, rule, seed, self.batch_size, self.count_head, bar)
        for finished in sampler.sample(images):
            yield from zip(finished.positions, self._certificates(finished, rule, seed))

    def _certificates(self, finished: FinishedImages, rule: Rule, seed: int) -> Iterator[Certificate]:
        shared: dict[str, Any] = {
            "guarantee": rule.guarantee,
            "method": rule.method,
            "noise": self.noise.name,
            "norm": self.noise.norm,
            "sampling": "lattice",
            "noise_resolution": self.noise_resolution,
            "denoiser": self.base_classifier.denoiser_name,
            "sigma": self.noise.sigma,
            "alpha": rule.alpha,
            "seed": seed,
            "dtype": self.base_classifier.precision,
            "compiled": self.base_classifier.compiled,
            "delta": finished.outcomes.delta,
            "calibration": finished.outcomes.calibration,
        }
        outcomes = finished.outcomes
        columns = (
            outcomes.predictions.tolist(),
            outcomes.radii.tolist(),
            outcomes.p_lower.tolist(),
            outcomes.p_upper.tolist(),
            map(tuple, finished.counts.tolist()),
            finished.num_samples.tolist(),
            finished.dimensions,
        )
        for prediction, radius, p_lower, p_upper, counts, num_samples, dimensions in zip(*columns):
            yield Certificate(
                prediction=prediction,
                radius=radius,
                p_lower=p_lower,
                p_upper=p_upper,
                counts=counts,
                num_samples=num_samples,
                dimensions=dimensions,
                **shared,
            )
