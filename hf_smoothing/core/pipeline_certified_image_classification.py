"""The transformers pipeline task `certified-image-classification`."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers import Pipeline

from .active_images import in_order
from .certificates import Certificate
from .count_predictor import CountPredictor
from .denoisers import Denoiser
from .noise import GaussianNoise
from .preprocessing import NoiseResolution, Preprocessing, to_pixels
from .smoothing import SmoothedClassifier

SETTINGS = (
    "sigma", "seed", "progress", "method", "alpha", "radius", "radii", "max_draws", "n0", "n", "tolerance", "delta",
    "count_head", "noise_resolution", "denoiser",
)  # fmt: skip


class CertifiedImageClassificationPipeline(Pipeline):
    """
    Classify pictures with a certificate: no change smaller than `radius` changes the answer.

    All settings are taken at construction and at each call, where the call's prevail:

    - `sigma`: standard deviation of the Gaussian noise, in `[0, 1]` pixels. There is no default.
    - `alpha` (0.001): probability that a certificate is wrong.
    - `radius` or `radii`: decide these radii and stop as soon as that is settled. Without them the radius is found.
      `"surrogate"` with `delta` claims the largest of them that it can.
    - `method` (`"sequential"`): or `"fixed"`, the usual protocol with a fixed number of draws; or `"surrogate"`, what the
      count head says without any draw, an estimate.
    - `count_head`: a count head on the Hub or in a local folder. With it, `sequential` draws less.
    - `noise_resolution` (`"input"`): where noise is added, and to whose pixels the radius belongs: the network's input, the
      picture at its `"native"` size, or at so many pixels a side.
    - `denoiser`: in front of the model and part of it: a callable, or `"wiener"`.
    - `delta`: for `"surrogate"`, the share of pictures that a calibrated count head may be wrong about.
    - `max_draws`: the most draws for one image.
    - `tolerance`, `n0`, `n`: see [`make_rule`].
    - `seed` (0): the same seed gives an image the same noise, and so the same certificate, whatever the batch size.
    - `batch_size` (128): draws in one forward pass; several images share it.
    - `progress` (`False`): show a progress bar.

    Takes a path, an `http(s)` address, a PIL image, a list or `datasets` column of these, or anything to iterate over (a
    generator, a `KeyDataset`, a column of a streamed dataset), which gives an iterator. Results keep the order of the input.
    Each is a dict with `label` (`None` where it abstains) and the fields of [`Certificate`].

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
        self._count_heads: dict[str, CountPredictor] = {}
        self._preparations: dict[NoiseResolution, Preprocessing] = {}
        if (head := self._forward_params.get("count_head")) is not None:
            self._load_count_head(str(head))

    def _sanitize_parameters(self, **settings: Any) -> tuple[dict, dict, dict]:
        for name in settings:
            if name not in SETTINGS:
                raise TypeError(
                    f"{name!r} is no setting of this pipeline; it takes {', '.join(SETTINGS)}, batch_size."
                )
        if "sigma" in settings:  # say at construction what is wrong at construction
            GaussianNoise(settings["sigma"])
        before = {name: settings[name] for name in ("noise_resolution",) if name in settings}
        return before, settings, {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, (str, Path, Image, np.ndarray, torch.Tensor)):
            return super().__call__([inputs], **kwargs)[0]
        if isinstance(inputs, Sequence):  # a column of a stored dataset is one
            # transformers looks at the first input, which an empty list does not have
            return super().__call__(list(inputs), **kwargs) if len(inputs) else []
        if isinstance(inputs, torch.utils.data.Dataset):
            return super().__call__(inputs, **kwargs)
        # by its attribute, since `datasets` need not be installed where this file is remote code
        if not isinstance(inputs, Iterable) or isinstance(inputs, dict) or hasattr(inputs, "column_names"):
            raise TypeError(
                f"A {type(inputs).__name__} is no image: pass a picture, a list of them or a column of a dataset."
            )
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
        """Where transformers batches images, batches hold draws of several images here: the engine makes them."""
        images = (self.preprocess(image, **preprocess_params) for image in inputs)
        certificates = self.forward(images, batch_size=batch_size, inputs=inputs, **forward_params)
        return (self.postprocess(certificate, **postprocess_params) for certificate in certificates)

    def preprocess(self, input_: Any, noise_resolution: NoiseResolution = "input") -> torch.Tensor:
        """A picture as pixels in `[0, 1]`, `(channels, height, width)`, at the size at which noise is added."""
        if noise_resolution not in self._preparations:
            self._preparations[noise_resolution] = Preprocessing.of(self.image_processor, noise_resolution)
        return to_pixels(input_, self._preparations[noise_resolution])

    def _forward(
        self,
        images: Iterable[torch.Tensor],
        batch_size: int,
        inputs: Iterable[Any],
        sigma: float | None = None,
        seed: int = 0,
        method: str = "sequential",
        progress: bool = False,
        count_head: str | Path | None = None,
        noise_resolution: NoiseResolution = "input",
        denoiser: Denoiser | str | None = None,
        **rule_settings: Any,
    ) -> Iterator[Certificate]:
        if sigma is None:
            raise ValueError("sigma is missing: pass the noise level in [0, 1] pixels, such as sigma=0.25.")
        head = None if count_head is None else self._load_count_head(str(count_head))
        smoothed = SmoothedClassifier(
            self.model,
            GaussianNoise(sigma),
            batch_size=batch_size,
            device=self.device,
            image_processor=self.image_processor,
            noise_resolution=noise_resolution,
            denoiser=denoiser,
            count_head=head,
        )
        rule = smoothed.make_rule(method, **rule_settings)
        rule.check(smoothed.noise)
        if isinstance(inputs, list):
            images = list(images)  # a broken picture at the end must not cost the work before it
        total = len(inputs) if isinstance(inputs, Sized) else None
        return in_order(smoothed.certify_stream(images, rule, seed=seed, progress=progress, total=total))

    def _load_count_head(self, name: str) -> CountPredictor:
        """The count head of that name, once for all calls."""
        if name not in self._count_heads:
            names = [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]
            self._count_heads = {
                name: CountPredictor.from_pretrained(
                    name, device=self.device, class_names=names, image_processor=self.image_processor
                )
            }
        return self._count_heads[name]

    def postprocess(self, certificate: Certificate) -> dict[str, Any]:
        """The certificate as a dict, with the class's name in front."""
        label = None if certificate.abstains else self.model.config.id2label[certificate.prediction]
        return {"label": label, **certificate.to_dict()}
