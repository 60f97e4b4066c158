"""A count head as the engine asks it: from clean pixels and a noise level to the class frequencies that it expects."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor
from transformers.utils import cached_file

from .bounds import FloatArray
from .calibration import CALIBRATION_FILE, Calibration, conformal_scores
from .loading import loading
from .measured_counts import Counts, read_counts
from .modeling_count_prediction import MixedNoiseViTForCountPrediction
from .preparation import Preparation


class CountPredictor:
    """
    A trained count head and, where it has one, its calibration.

    It computes in float64 where the device knows that, so that what it says does not depend on the batch size: in float32
    the last bits do, and with them, now and then, a count.

    Args:
        model: the count head.
        calibration: made with it, by `hf-smoothing calibrate`.
        device: where to put it; by default where it is.
    """

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
        **model_kwargs: Any,
    ) -> "CountPredictor":
        """
        Load a count head from the Hub or a local folder, with its calibration if there is one.

        Args:
            model_name_or_path: what `scripts/train_count_head.py` wrote.
            device: where to put it; by default the CPU.
            class_names: those of the base classifier.
            model_kwargs: passed on to `from_pretrained`, such as `revision`.

        Raises:
            ValueError: for a model that cannot be loaded, that has no count head, or other classes.
        """
        name = str(model_name_or_path)
        with loading(name):
            config = AutoConfig.from_pretrained(name, **model_kwargs)
            if getattr(config, "count_sigmas", None) is None:
                raise ValueError(f"{name!r} has no count head: scripts/train_count_head.py trains one.")
            model = MixedNoiseViTForCountPrediction.from_pretrained(name, dtype=torch.float32, **model_kwargs)
        predictor = cls(model, read_calibration(name, **model_kwargs), device)
        if class_names is not None and list(class_names) != predictor.class_names:
            raise ValueError(
                f"The count head {name!r} has the classes {predictor.class_names}, the classifier {list(class_names)}."
            )
        return predictor

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor, sigma: float) -> torch.Tensor:
        """
        Args:
            pixels: clean images `(batch, channels, height, width)` in `[0, 1]`.
            sigma: noise level, in `[0, 1]` pixels.

        Returns:
            Expected class frequencies `(batch, classes)`, of sum 1.

        Raises:
            ValueError: for a noise level that the head was not trained for.
        """
        return self.model(pixels.to(self.device, self.dtype), sigma=sigma).probabilities


def read_calibration(model_name_or_path: str, **hub_kwargs: Any) -> Calibration | None:
    """
    The calibration of a count head, if there is one.

    Args:
        model_name_or_path: a count head on the Hub or in a local folder.
        hub_kwargs: such as `revision`.

    Raises:
        ValueError: for a file that holds something else.
    """
    found = cached_file(
        model_name_or_path,
        CALIBRATION_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_kwargs,
    )
    return None if found is None else Calibration.load(Path(found))


def calibrate_count_head(count_head: str | Path, run_dir: str | Path) -> Calibration:
    """
    Compare a count head's estimates with Monte-Carlo certificates, and save what comes of it in the head's folder.

    Args:
        count_head: folder of a count head.
        run_dir: a finished run of method `fixed`, on images that neither head nor classifier was trained on.

    Raises:
        ValueError: for a head or run that cannot be read, a run of another method or other classes, images that the head was
            trained on or that are no longer those certified.
        OSError: where the folder cannot be written to.
    """
    run = Path(run_dir)
    measured = read_counts(run)
    settings = measured.settings
    if settings["method"] != "fixed":
        raise ValueError(
            f"{run} is of method {settings['method']!r}: a calibration takes certificates of method 'fixed'."
        )
    folder = Path(count_head)
    if not folder.is_dir():
        raise ValueError(f"{str(count_head)!r} is no folder: the calibration is written beside the count head.")
    predictor = CountPredictor.from_pretrained(folder, class_names=settings["label_names"])
    _refuse_training_images(folder, settings)
    probabilities = predict_counts(predictor, measured, folder)
    n = int(measured.counts[0].sum())
    scores = conformal_scores(probabilities, measured.predictions, measured.p_lower, n, settings["alpha"])
    images = len(np.unique(measured.indices))
    calibration = Calibration(
        {float(sigma): tuple(scores[measured.sigmas == sigma].tolist()) for sigma in np.unique(measured.sigmas)},
        n=n,
        alpha=settings["alpha"],
        dataset=f"{settings['dataset_name']}, split {settings['split']}: {images} images, index "
        f"{measured.indices.min()} to {measured.indices.max()}, every {settings['every']}",
        model=settings["model_name_or_path"],
    )
    calibration.save(folder / CALIBRATION_FILE)
    return calibration


def predict_counts(
    predictor: CountPredictor, measured: Counts, folder: str | Path, batch_size: int = 256
) -> FloatArray:
    """
    What a count head says of images that were counted.

    Args:
        predictor: the count head.
        measured: which images, and at which noise levels.
        folder: a model whose image processor prepares the images.
        batch_size: images in one forward pass.

    Returns:
        Predicted class frequencies `(rows, classes)`.

    Raises:
        ValueError: for images that are no longer those counted.
    """
    images = measured.open()
    images.meet(predictor.class_names, Preparation.of(AutoImageProcessor.from_pretrained(folder)))
    wanted, rows = np.unique(measured.indices, return_inverse=True)
    found = np.empty((len(rows), len(predictor.class_names)))
    for first in tqdm(range(0, len(wanted), batch_size), "asking the count head", leave=False):
        pixels = torch.stack(
            [images.pixels(images.source[int(index)]) for index in wanted[first : first + batch_size]]
        )
        for sigma in np.unique(measured.sigmas):
            here = (rows >= first) & (rows < first + batch_size) & (measured.sigmas == sigma)
            found[here] = predictor(pixels, float(sigma)).double().cpu().numpy()[rows[here] - first]
    return found


def _refuse_training_images(folder: Path, settings: dict[str, Any]) -> None:
    training = folder / "results" / "training.json"
    trained_on = json.loads(training.read_text())["counts"] if training.exists() else {}
    if (trained_on.get("dataset_name"), trained_on.get("split")) == (settings["dataset_name"], settings["split"]):
        raise ValueError(
            f"The count head was trained on the split {settings['split']!r} of {settings['dataset_name']!r}: calibrate "
            "it on images that it has not seen, or its errors there say nothing of others."
        )
