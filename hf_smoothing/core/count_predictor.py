"""A count head ready for the sampler: from clean pixels and a noise level to expected class frequencies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.utils import cached_file

from .calibration import CALIBRATION_FILE, Calibration
from .modeling_count_prediction import MixedNoiseViTForCountPrediction
from .noise import GaussianNoise
from .preprocessing import make_same_pixels
from .weights import check_loaded_weights, loading


class CountPredictor:
    """
    A trained count head and its calibration, if it has one.

    It computes in float64 where the device has that, so that predictions do not depend on the batch size: in float32 the
    last bits would, and sometimes a number of draws with them.

    Args:
        model: the count head.
        calibration: made by `hf-smoothing calibrate`.
        device: where to put it; by default where it is.
    """

    noise = GaussianNoise.name  # of its counts

    def __init__(
        self,
        model: MixedNoiseViTForCountPrediction,
        calibration: Calibration | None = None,
        device: torch.device | str | None = None,
    ):
        self.device = torch.device(device or model.device)
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.model = model.to(self.device, self.dtype).eval()  # type: ignore[arg-type]
        self.calibration = calibration
        self.class_names = [model.config.id2label[index] for index in range(model.config.num_labels)]

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | Path,
        *,
        device: torch.device | str | None = None,
        class_names: Sequence[str] | None = None,
        image_processor: Any = None,
        calibrated: bool = True,
        **model_kwargs: Any,
    ) -> "CountPredictor":
        """
        Load a count head from the Hub or a local folder, with its calibration if there is one.

        Args:
            model_name_or_path: the output of `scripts/train_count_head.py`.
            device: where to put it; by default the CPU.
            class_names: of the base classifier, to be checked.
            image_processor: of the base classifier, to be checked: both must see the same pixels.
            calibrated: whether to load its calibration; `False` to make a new one.
            model_kwargs: passed on to `from_pretrained`, such as `revision`.

        Raises:
            ValueError: for a model that cannot be loaded or has no count head, other classes, or another image processor.
        """
        name = str(model_name_or_path)
        with loading(name):
            config, _ = PreTrainedConfig.get_config_dict(name, **model_kwargs)  # a model of any class
            if config.get("count_sigmas") is None:
                raise ValueError(f"{name!r} has no count head: scripts/train_count_head.py trains one.")
            model, info = MixedNoiseViTForCountPrediction.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **model_kwargs
            )
        check_loaded_weights(name, info, ())
        predictor = cls(model, read_calibration(name, **model_kwargs) if calibrated else None, device)
        if class_names is not None and list(class_names) != predictor.class_names:
            raise ValueError(f"Count head {name!r} has the classes {predictor.class_names}, not {list(class_names)}.")
        if image_processor is not None:
            with loading(name):
                own = AutoImageProcessor.from_pretrained(name, **model_kwargs)
            if not make_same_pixels(own, image_processor):
                raise ValueError(
                    f"The count head {name!r} was trained with other preprocessing (size, crop or interpolation) than the "
                    "classifier's: train it with the classifier's image processor."
                )
        return predictor

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """
        Expected class frequencies under noise, `(batch, classes)` of sum 1, of clean images `(batch, channels, height,
        width)` in `[0, 1]`; with several noise levels per image, `(batch, levels)`, `(batch, levels, classes)`. Raises a
        `ValueError` for a noise level that the head was not trained for.
        """
        return self.model(pixels.to(self.device, self.dtype), sigma=sigma).probabilities


def read_calibration(model_name_or_path: str, **hub_kwargs: Any) -> Calibration | None:
    """The calibration of a count head on the Hub or in a local folder, if it has one. `hub_kwargs` as `revision`."""
    path = cached_file(
        model_name_or_path,
        CALIBRATION_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_kwargs,
    )
    return None if path is None else Calibration.load(Path(path))
