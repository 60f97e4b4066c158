"""The transformers pipeline task `certified-image-classification`."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Image
from transformers import Pipeline

from .agreement import AGREEMENT, LEVELS, refuse_levels
from .certificates import Certificate
from .count_predictor import CountPredictor
from .denoisers import Denoiser
from .level_certificates import LevelCertificates, certify_levels
from .noise import GaussianNoise
from .preprocessing import NoiseResolution, to_pixels
from .sampler import in_order
from .smoothing import SmoothedClassifier
from .weights import check_is_classifier

CLASSIFIER_SETTINGS = ("sigma", "levels", "agreement", "count_head", "noise_resolution", "denoiser")
CERTIFY_SETTINGS = (
    "sigmas", "seed", "progress", "method", "alpha", "radius", "radii", "draws", "max_draws", "n0", "n", "delta",
)  # fmt: skip


class CertifiedImageClassificationPipeline(Pipeline):
    """
    Classify pictures with a certificate: no change smaller than `radius` changes the prediction.

    All settings can be given at construction and at each call; the call's take precedence:

    - `sigma`: standard deviation of the Gaussian noise, in `[0, 1]` pixels. There is no default. `"auto"`: one
      classifier of two noise levels, which backs off to the second where the noisy copies at the first do not agree. The
      certificate covers the choice: `level_choice` says how.
    - `levels` (0.5, 0.12), `agreement` (0.5): for `"auto"`, see [`SmoothedClassifier.with_fallback`].
    - `sigmas`: several noise levels instead, with alpha split over them. Each result has a certificate for each, `best_of`
      with the largest radius of each class, and a `statement` in words: it is about several classifiers, not about one.
    - `alpha` (0.001): probability that a certificate is wrong.
    - `radius` or `radii`: decide these radii and stop as soon as they are decided. Without them the radius is found.
      `"surrogate"` with `delta` claims the largest of them that it can.
    - `method`: `"two-stage"` finds radii, `"sequential"` decides them; `"fixed"`, the usual protocol, draws a fixed number;
      `"surrogate"` draws nothing and returns the count head's estimate.
    - `draws`: mean draws per image to find radii. `max_draws`: the most per image. `n0`, `n`, `delta`: see [`make_rule`].
    - `count_head`: a count head on the Hub or in a local folder. It guides the draws.
    - `noise_resolution` (`"input"`), `denoiser`, `batch_size` (128): see [`SmoothedClassifier`].
    - `seed`: by default one from the operating system, see [`SmoothedClassifier.certify`]. The same seed gives an image the
      same noise, and so the same certificate, whatever the batch size.
    - `progress` (`False`): show a progress bar.

    Takes a path, an `http(s)` address, a PIL image, or a list or `datasets` column of these. For any other iterable (a
    generator, a `KeyDataset`, a column of a streamed dataset) it returns an iterator. Results keep the order of the input.
    Each is a dict with `label` (`None` on abstention) and the fields of [`Certificate`].

    Example:
        >>> from transformers import pipeline
        >>> import hf_smoothing
        >>> certify = pipeline("certified-image-classification", model="user/repo", sigma=0.25)  # doctest: +SKIP
        >>> certify("frog.png", radius=0.5)  # doctest: +SKIP
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, batch_size: int = 128, **kwargs: Any):
        super().__init__(*args, batch_size=batch_size, **kwargs)
        check_is_classifier(self.model)
        self._count_heads: dict[str, CountPredictor] = {}
        self._classifiers: dict[tuple[Any, ...], SmoothedClassifier] = {}
        if (head := self._preprocess_params.get("count_head")) is not None:
            self._load_count_head(str(head))

    def _sanitize_parameters(self, **settings: Any) -> tuple[dict, dict, dict]:
        for name in settings:
            if name not in CLASSIFIER_SETTINGS + CERTIFY_SETTINGS:
                known = ", ".join((*CLASSIFIER_SETTINGS, *CERTIFY_SETTINGS, "batch_size"))
                raise TypeError(f"{name!r} is no setting of this pipeline; it takes {known}.")
        if settings.get("sigma", "auto") != "auto":  # an invalid sigma at construction is an error at construction
            GaussianNoise(settings["sigma"])
            refuse_levels(settings)  # of this call: those of the construction may be for its other calls
        of_classifier = {name: value for name, value in settings.items() if name in CLASSIFIER_SETTINGS}
        return of_classifier, {name: value for name, value in settings.items() if name in CERTIFY_SETTINGS}, {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, (str, Path, Image, np.ndarray, torch.Tensor)):
            return super().__call__([inputs], **kwargs)[0]
        if isinstance(inputs, Sequence):  # a column of a stored dataset is one
            # transformers looks at the first input, which an empty list lacks
            return super().__call__(list(inputs), **kwargs) if len(inputs) else []
        if isinstance(inputs, torch.utils.data.Dataset):
            return super().__call__(inputs, **kwargs)
        # by its attribute, since `datasets` need not be installed where this file is remote code
        if not isinstance(inputs, Iterable) or isinstance(inputs, dict) or hasattr(inputs, "column_names"):
            raise TypeError(f"A {type(inputs).__name__} is no image: pass a picture, a list or a column of a dataset.")
        return super().__call__((image for image in inputs), **kwargs)

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        """Replaces batches of images, as transformers makes them, by batches of draws of several images."""
        sigmas = forward_params.get("sigmas")
        smoothed = self._smooth(batch_size, **preprocess_params | ({"sigma": sigmas[0]} if sigmas else {}))
        images = (self.preprocess(image, smoothed=smoothed) for image in inputs)
        certificates = self.forward(images, inputs=inputs, smoothed=smoothed, **forward_params)
        return (self.postprocess(certificate, **postprocess_params) for certificate in certificates)

    def _smooth(
        self,
        batch_size: int,
        sigma: float | Literal["auto"] | None = None,
        levels: Sequence[float] = LEVELS,
        agreement: float = AGREEMENT,
        count_head: str | Path | None = None,
        noise_resolution: NoiseResolution = "input",
        denoiser: Denoiser | str | None = None,
    ) -> SmoothedClassifier:
        """The model under noise. Its weights and image processor are checked once for all calls and noise levels."""
        if sigma is None:
            raise ValueError("sigma is missing: pass the noise level in [0, 1] pixels, such as sigma=0.25.")
        noise = GaussianNoise(1.0 if sigma == "auto" else sigma)
        head = None if count_head is None else self._load_count_head(str(count_head))
        key = (batch_size, id(head), noise_resolution, denoiser if isinstance(denoiser, str) else id(denoiser))
        if key not in self._classifiers:
            self._classifiers[key] = SmoothedClassifier(
                self.model,
                noise,
                batch_size=batch_size,
                device=self.device,
                image_processor=self.image_processor,
                noise_resolution=noise_resolution,
                denoiser=denoiser,
                count_head=head,
            )
        if sigma == "auto":
            return self._classifiers[key].with_fallback(levels, agreement)
        return self._classifiers[key].with_noise(noise)

    def preprocess(self, input_: Any, smoothed: SmoothedClassifier) -> torch.Tensor:
        return to_pixels(input_, smoothed.preprocessing)

    def _forward(
        self,
        images: Iterable[torch.Tensor],
        inputs: Iterable[Any],
        smoothed: SmoothedClassifier,
        method: str | None = None,
        sigmas: Sequence[float] | None = None,
        seed: int | None = None,
        progress: bool = False,
        **rule_settings: Any,
    ) -> Iterator[Certificate | LevelCertificates]:
        if sigmas is not None:
            shared = {"seed": seed, "progress": progress, **rule_settings}
            return iter(certify_levels(smoothed, list(images), sigmas, method, **shared))
        rule = smoothed.make_rule(method, **rule_settings)
        smoothed.check_rule(rule)
        if isinstance(inputs, list):
            images = list(images)  # a broken picture at the end must not waste the work before it
        total = len(inputs) if isinstance(inputs, Sized) else None
        return in_order(smoothed.certify_stream(images, rule, seed=seed, progress=progress, total=total))

    def _load_count_head(self, name: str) -> CountPredictor:
        if name not in self._count_heads:
            names = [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]
            self._count_heads[name] = CountPredictor.from_pretrained(
                name, device=self.device, class_names=names, image_processor=self.image_processor
            )
        return self._count_heads[name]

    def postprocess(self, certificate: Certificate | LevelCertificates) -> dict[str, Any]:
        """The certificate as a dict, with the name of the class first."""
        if isinstance(certificate, LevelCertificates):
            best_of = {
                self.model.config.id2label[prediction]: {"radius": best.radius, "sigma": best.sigma}
                for prediction, best in certificate.best_of.items()
            }
            at_levels = [self.postprocess(one_level) for one_level in certificate.certificates]
            return {**certificate.to_dict(), "best_of": best_of, "certificates": at_levels}
        label = None if certificate.abstains else self.model.config.id2label[certificate.prediction]
        return {"label": label, **certificate.to_dict()}
