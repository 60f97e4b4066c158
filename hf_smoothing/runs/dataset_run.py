"""Certifies a dataset: with any number of processes, resumable, one record per image and noise level.

Processes take images one at a time from a counter that they share, so that none idles while there is work, however much
the images differ in cost. The noise of an image depends only on the seed and its pixels, so it does not matter which
process takes it, when, or in which batch.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from ..core.certificates import ABSTAIN
from ..core.noise import GaussianNoise
from ..core.smoothing import SmoothedClassifier
from ..core.surrogate_rule import SurrogateRule
from ..data.labelled_images import ModelInputs
from ..utils.processes import on_main_first
from .identity import describe_run, describe_session, load_classifier, open_images
from .recorder import Recorder
from .records import Record, error_record, record
from .run_folder import RunFolder, RunState, RunSummary
from .settings import RunSettings


def certify_dataset(
    settings: RunSettings,
    output_dir: str | Path,
    *,
    accelerator: Accelerator,
    batch_size: int = 128,
    streaming: bool = False,
    resume: bool = True,
    device: str | None = None,
) -> RunSummary | None:
    """
    Certify the images of a dataset, or resume doing so, and merge the records to `output_dir/certificates.parquet`.

    See [`RunFolder`] for the files. An image whose content is not a picture, or that has another shape after the image
    processor than the first one, gets a record with an `error`.

    Args:
        settings: what decides the records.
        output_dir: a new or empty folder, or the folder of a run with the same settings, which is resumed.
        accelerator: the processes, from [`start_processes`].
        batch_size: draws in one forward pass.
        streaming: read the dataset as a stream, once for each sigma, without storing it.
        resume: resume a run; otherwise the folder must not hold one.
        device: where to compute; by default where the accelerator is.

    Returns:
        A summary, on the main process; `None` on the others.

    Raises:
        ValueError: before any work, for a model or dataset that cannot be loaded, a missing column, an empty split, classes
            that do not match, a folder with a run under other settings or that hosts do not share; for a label outside
            the classes.
        OSError: for a folder that cannot be written to, a full disk, an image whose file cannot be read. All records
            written before are kept, and the same call resumes the run.
        KeyboardInterrupt: on the user's, with a message that says how many records there are.
    """
    folder = RunFolder(output_dir)
    if settings.revision is not None and Path(settings.model_name_or_path).is_dir():
        raise ValueError(
            f"revision={settings.revision!r} is for models on the Hub; {settings.model_name_or_path!r} is a local folder."
        )
    on_main_first(accelerator, partial(folder.check, resume))
    folder.check_shared(accelerator)
    requested = {**asdict(settings), "noise_resolution": settings.resolution}
    with accelerator.main_process_first():  # the main process prepares the dataset, the others read from its cache
        images = open_images(requested, streaming)
    smoothed = load_classifier(requested, device or accelerator.device, batch_size)
    if settings.delta is not None or settings.false_claims is not None:
